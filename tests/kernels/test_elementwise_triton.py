"""Triton's norm, gate and rotary embedding against their references."""

import pytest
import torch

from compress.kernels.paged_attention import write_kv
from compress.kernels.paged_attention.cache import FP8, INT8, QuantizedBlocks, quantize, tensors_of
from compress.kernels.rms_norm import reference as rms_norm_reference
from compress.kernels.rms_norm import triton as rms_norm_kernels
from compress.kernels.rope import reference as rope_reference
from compress.kernels.rope import triton as rope_kernels
from compress.kernels.silu_mul import reference as silu_mul_reference
from compress.kernels.silu_mul import triton as silu_mul_kernels
from tests.kernels.guarded import MARGIN, SENTINEL, Guard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter computes in bfloat16 in a way of its own.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
EPS = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def guard(monkeypatch):
    guard = Guard()
    monkeypatch.setattr(torch, "empty", guard.empty)
    monkeypatch.setattr(torch, "empty_like", guard.empty_like)
    yield guard
    monkeypatch.undo()
    guard.check()


def random(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).to(DEVICE)


def assert_steps(found, expected, dtype, steps):
    """Equal but for `steps` steps of the dtype at the larger of the value and 2^-6."""
    close = {"rtol": steps * EPS[dtype], "atol": steps * EPS[dtype] / 64}
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 576, 4096, 16384])
def test_rms_norm(dtype, width):
    """The sum is exact.  The norm is rounded twice in 16 bits, and where a sum in another order
    falls on the other side of the first rounding, the result is up to two steps away; float32 has
    the sum's own error of a few steps, and that of the approximate root."""
    x, residual = random(3, width, dtype=dtype), random(3, width, seed=2, dtype=dtype)
    gain = random(width, seed=1)
    expected = rms_norm_reference.rms_norm(x, gain, 1e-5, residual)
    total, normed = rms_norm_kernels.rms_norm(x, gain, 1e-5, residual)
    assert torch.equal(total, expected[0])
    assert_steps(normed, expected[1], dtype, 8 if dtype == torch.float32 else 2)
    if dtype != torch.float32:
        assert (normed != expected[1]).float().mean() < 0.01
    same, normed = rms_norm_kernels.rms_norm(x.view(3, 1, width), gain, 1e-5)
    assert same.data_ptr() == x.data_ptr()
    expected = rms_norm_reference.rms_norm(x.view(3, 1, width), gain, 1e-5)
    assert_steps(normed, expected[1], dtype, 8 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 1000, 1536])
def test_silu_mul(dtype, width):
    """Two roundings, either of which may fall on the other side; exp is approximate in float32."""
    x = random(3, 2 * width, dtype=dtype) * 4
    x[0, :4] = torch.tensor([-1000.0, 1000.0, 0.0, -20.0])
    expected = silu_mul_reference.silu_mul(x)
    found = silu_mul_kernels.silu_mul(x)
    assert_steps(found, expected, dtype, 16 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("count", [1, 5, 300])
def test_angles(count):
    """Positions to 131072: cosine and sine of the rounded angle to float32's last steps."""
    positions = torch.linspace(0, 131072, count).long().to(DEVICE)
    inv_freq = (500000.0 ** (-torch.arange(0, 1, 2 / 48))).to(DEVICE)
    found = rope_kernels.angles(positions, inv_freq, 1.25)
    rounded = (positions[:, None].float() * inv_freq).double()
    expected = torch.cat([rounded.cos(), rounded.sin()], dim=1) * 1.25
    torch.testing.assert_close(found.double(), expected, atol=2.5e-7, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotated"),
    [(9, 3, 64, 64), (6, 2, 8, 8), (28, 4, 128, 128), (4, 4, 80, 32), (3, 1, 48, 48)],
)
def test_rope_and_write(heads, kv_heads, head_dim, rotated, norm, dtype):
    tokens, blocks = 5, 4
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    gains = [random(head_dim, seed=seed) + 1 if norm else None for seed in (3, 4)]
    positions = torch.tensor([0, 1, 7, 2047, 31], device=DEVICE)
    inv_freq = 10000.0 ** -torch.arange(0, 1, 2 / rotated, device=DEVICE)
    slots = torch.tensor([5, 16, -1, 3 * 16 + 15, 40], device=DEVICE)
    shape = (blocks, kv_heads, 16, head_dim)
    caches, wholes = [], []
    for _ in range(2):
        whole = torch.full((shape[0] * shape[1] * 16 * head_dim + 2 * MARGIN,), float(SENTINEL))
        wholes.append(whole.to(dtype).to(DEVICE))
        caches.append(wholes[-1][MARGIN:-MARGIN].view(shape))
    table = rope_kernels.angles(positions, inv_freq, 1.0)
    found = rope_kernels.rope_and_write(
        qkv, table, *caches, slots, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        q_gain=gains[0], k_gain=gains[1], eps=1e-6,
    )  # fmt: skip

    # Norm in the reference's rounding, the rotation in float32, one rounding.
    q, k, v = qkv.view(tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if norm:
        q, k = (
            rms_norm_reference.rms_norm(x, gain, 1e-6)[1]
            for x, gain in zip((q, k), gains, strict=True)
        )
    cos_sin = rope_reference.rope_table(positions, inv_freq, 1.0, torch.float32)
    q, k = (x.to(dtype) for x in rope_reference.apply_rope(q.float(), k.float(), *cos_sin))
    # float32's errors are of values of order 4 where the turn's two terms cancel: 8 of its steps.
    # In 16 bits these decide about the last step of the result, and with a norm of its input too.
    close = {"rtol": 2 * EPS[dtype], "atol": (8 * EPS[dtype]) if norm else 2**-20}
    torch.testing.assert_close(found.float(), q.float(), **close)
    expected = [torch.full(shape, float(SENTINEL), dtype=dtype, device=DEVICE) for _ in range(2)]
    kept = slots >= 0
    write_kv(*expected, k[kept], v[kept], slots[kept])
    torch.testing.assert_close(caches[0].float(), expected[0].float(), **close)
    assert torch.equal(caches[1], expected[1])
    for whole in wholes:
        assert (whole[:MARGIN] == SENTINEL).all()
        assert (whole[-MARGIN:] == SENTINEL).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fixed", [None, 0.02])
@pytest.mark.parametrize("codes", [INT8, FP8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotated"),
    [(9, 3, 64, 64), (28, 4, 128, 128), (4, 4, 80, 32)],
)
def test_rope_and_write_codes(heads, kv_heads, head_dim, rotated, codes, fixed, dtype):
    """Values are not turned: their codes and scales are the reference's, bit for bit.  Keys are
    rounded from float32 products that may be fused here, so a few are one step away."""
    tokens, blocks = 7, 4
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    qkv *= (10.0 ** torch.arange(-4, 3, device=DEVICE))[:, None].to(dtype)
    qkv[5], qkv[6, -1] = 0, float("nan")
    positions = torch.tensor([0, 1, 7, 2047, 31, 5, 6], device=DEVICE)
    inv_freq = 10000.0 ** -torch.arange(0, 1, 2 / rotated, device=DEVICE)
    slots = torch.tensor([5, 16, -1, 3 * 16 + 15, 40, 41, 42], device=DEVICE)
    rows = (blocks, kv_heads, 16)
    cache = [
        QuantizedBlocks(
            codes,
            torch.full((*rows, head_dim), SENTINEL, dtype=torch.uint8, device=DEVICE).view(
                codes.dtype
            ),
            torch.full(rows, float(SENTINEL), device=DEVICE),
            fixed,
        )
        for _ in range(2)
    ]
    table = rope_kernels.angles(positions, inv_freq, 1.0)
    rope_kernels.rope_and_write(
        qkv, table, *cache, slots, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        q_gain=None, k_gain=None, eps=1e-6,
    )  # fmt: skip
    _, k, v = qkv.view(tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    cos_sin = rope_reference.rope_table(positions, inv_freq, 1.0, torch.float32)
    _, k = rope_reference.apply_rope(k.float(), k.float(), *cos_sin)
    kept = slots >= 0
    blocks_of, offsets = slots[kept] // 16, slots[kept] % 16
    for part, x, exact in ((cache[0], k, False), (cache[1], v, True)):
        expected, scales = quantize(x[kept], codes, fixed)
        found = part.codes[blocks_of, :, offsets]
        torch.testing.assert_close(
            part.scales[blocks_of, :, offsets], scales, rtol=0 if exact else 1e-5, atol=0,
            equal_nan=True,
        )  # fmt: skip
        apart = (found.float() != expected.float()) & scales.isfinite()[..., None]
        assert apart.float().mean() <= (0 if exact else 0.01)
        step = 1 if codes is INT8 else 32
        assert ((found.float() - expected.float()).abs()[apart] <= step).all()
        untouched = torch.ones(rows, dtype=torch.bool, device=DEVICE)
        untouched[blocks_of, :, offsets] = False
        assert (part.scales[untouched] == SENTINEL).all()
        assert (part.codes.view(torch.uint8)[untouched] == SENTINEL).all()


@pytest.mark.parametrize("codes", [None, INT8])
@pytest.mark.parametrize("norm", [False, True])
def test_queries_alone_are_turned_and_nothing_is_written(norm, codes):
    """Of a layer that uses the keys and values of another: bit for bit as with some of its own."""
    heads, kv_heads, head_dim, tokens = 6, 2, 24, 5
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim)
    gain = random(head_dim, seed=3) + 1 if norm else None
    table = rope_kernels.angles(
        torch.tensor([0, 1, 7, 2047, 31], device=DEVICE),
        10000.0 ** -torch.arange(0, 1, 2 / head_dim, device=DEVICE),
        1.0,
    )
    slots = torch.tensor([5, 16, -1, 47, 40], device=DEVICE)
    found = []
    for own in (kv_heads, 0):
        shape = (4, kv_heads, 16, head_dim)
        caches = [torch.full(shape, float(SENTINEL), device=DEVICE) for _ in range(2)]
        if codes is not None:
            caches = [
                QuantizedBlocks(
                    codes,
                    torch.full(shape, SENTINEL, dtype=torch.uint8, device=DEVICE).view(codes.dtype),
                    torch.full(shape[:-1], float(SENTINEL), device=DEVICE),
                    None,
                )
                for _ in range(2)
            ]
        tensors = [tensor for cache in caches for tensor in tensors_of(cache)]
        before = [tensor.clone() for tensor in tensors]
        wide = qkv[:, : (heads + 2 * own) * head_dim].contiguous()
        turned = rope_kernels.rope_and_write(
            wide, table, *caches, slots, heads=heads, kv_heads=own, head_dim=head_dim,
            q_gain=gain, k_gain=gain, eps=1e-6,
        )  # fmt: skip
        found.append(turned)
        kept = [torch.equal(*pair) for pair in zip(tensors, before, strict=True)]
        assert not any(kept) if own else all(kept)
    assert torch.equal(*found)
