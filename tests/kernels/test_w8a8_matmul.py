"""Linear layers that round their inputs: the reference by hand, PyTorch's operations and AVX-512.

The last are skipped where the processor or the compiler is missing.
"""

from dataclasses import replace

import pytest
import torch

from compress.core.errors import InputError
from compress.kernels.eager import Eager
from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.lowbit_matmul.weight import MOST_FOUND, InputRounding
from compress.kernels.program.build import reason_against
from compress.kernels.w8a8_matmul import MOST_COLUMNS, avx512, check, cpu, reference
from compress.kernels.w8a8_matmul.cpu import RoundingLinear
from tests.kernels.rounding import KINDS, THRESHOLD, error, outlying, rounding_weight
from tests.kernels.test_program import ROWS, batch_of, recorder, run

program = pytest.mark.skipif(reason_against() is not None, reason=str(reason_against()))
CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32]


def surplus_of(x, weight):
    inputs = replace(weight.inputs, outlier_weight=None)
    return sum(reference.round_token(token, inputs).surplus for token in x)


def test_the_reference_by_hand():
    """Column 1 is a stored outlier, column 3 is found; -2.5 / 0.5 = -5, 1.25 / 0.5 = 2.5 -> 2."""
    inputs = InputRounding("int8", 5.0, torch.tensor([1]), torch.tensor([[0.5], [2.0]]), 6.0)
    codes = torch.tensor([[10, 99, -20, 3, 1], [1, 99, 1, -2, 0]], dtype=torch.int8)
    bias = torch.tensor([0.0, 1000.0])
    weight = LinearWeight(None, codes, torch.tensor([[0.25], [2.0]]), None, 5, 8, bias, inputs)
    x = torch.tensor([[-2.5, 100.0, 1.25, 8.0, 0.0]])
    first = 0.25 * (0.5 * (-5 * 10 + 2 * -20) + 8 * 3) + 100 * 0.5
    second = 2 * (0.5 * (-5 * 1 + 2 * 1) + 8 * -2) + 100 * 2 + 1000
    assert reference.linear(x, weight).tolist() == [[first, second]]


@pytest.mark.parametrize(
    ("largest", "expected"), [(127.0, [127, -127, 0]), (127.5, [127, -128, 0])]
)
def test_both_ends_of_int8(largest, expected):
    """127.5 is half-way to 128, which is even and clamped at the positive end."""
    token = reference.round_token(torch.tensor([3.0, -3.0, 0.0]), InputRounding("int8", largest))
    assert token.codes.tolist() == expected


def test_a_token_has_room_for_so_many():
    """The lowest columns are found; the rest is rounded, and its size counts for the scale."""
    x = torch.full((100,), 0.5)
    x[20:70] = torch.arange(10.0, 60.0)
    token = reference.round_token(x, InputRounding("int8", 127.0, threshold=6.0))
    assert token.found == list(range(20, 20 + MOST_FOUND))
    assert token.surplus == 50 - MOST_FOUND
    assert token.scale == torch.tensor(59.0) / 127
    assert token.codes[69] == 127


def test_dequantized_weights_have_the_stored_outlier_columns():
    for kind in KINDS:
        weight = rounding_weight(kind, 6, 40)
        expected = weight.codes.float() * weight.scale
        if kind == "llm.int8":
            expected[:, weight.inputs.outlier_index] = weight.inputs.outlier_weight.float()
        assert torch.equal(weight.dequantize(torch.float32), expected)
        assert torch.equal(weight.dequantize(torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_pytorch_operations(kind, dtype, exact, monkeypatch):
    """float32: sums of codes are exact or float32's.  16 bits: y is rounded (2^-12 of it on average
    in float16), and in bfloat16 emulated sums of codes once before that: 2^-9 twice."""
    monkeypatch.setattr(cpu, "int_mm_is_exact", lambda: exact)
    bound = {torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    for rows, columns, tokens in ((33, 77, 1), (64, 576, 20)):
        weight = rounding_weight(kind, rows, columns, bias=True)
        surplus = torch.zeros(1, dtype=torch.int64)
        layer = RoundingLinear(weight, dtype, CPU, surplus)
        whole = exact and kind != "fp8"
        assert layer.kind.endswith("(aten)" if whole else "(emulated)")
        x = outlying(tokens, columns).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert error(y, reference.linear(x, weight)) < bound
        assert surplus.item() == surplus_of(x, weight)
        held = 1 if whole else dtype.itemsize if dtype == torch.bfloat16 else 4
        stored = 3 * 4 if kind == "llm.int8" else 0
        assert layer.bytes == rows * (columns * held + 4 + stored)


def test_a_saturating_product_is_noticed(monkeypatch):
    """As oneDNN's without VNNI: one side becomes unsigned, pairs of products are added in 16 bits,
    and what that adds to the sum is taken off again."""

    def saturating(x, w):
        u, w = x.int() + 128, w.int()
        pairs = u[:, 0::2, None] * w[None, 0::2] + u[:, 1::2, None] * w[None, 1::2]
        return pairs.clamp(-(1 << 15), (1 << 15) - 1).sum(dim=1) - 128 * w.sum(dim=0)

    wrapped = cpu.int_mm_is_exact.__wrapped__
    assert wrapped()
    monkeypatch.setattr(cpu.torch, "_int_mm", saturating)
    assert not wrapped()


def test_eager_counts_what_had_no_room():
    do = Eager(torch.float32, CPU)
    weight = rounding_weight("llm.int8", 8, 96)
    packed = do.pack(weight, silu_mul=True)
    x = outlying(3, 96)
    y = do.linear("gate_up", x, packed)
    gate, up = reference.linear(x, weight).chunk(2, dim=1)
    assert error(y, torch.nn.functional.silu(gate) * up) < 2**-18
    assert do.surplus_outliers == surplus_of(x, weight) > 0


@program
@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_program(kind, dtype, fallback, monkeypatch):
    """Sums of codes are exact, or float32's; so are products with a few outliers.  y is float32."""
    if fallback:
        monkeypatch.setattr(avx512, "processor_has", lambda flag: False)
    for rows, columns in ((45, 77), (64, 64), (130, 576)):
        weight = rounding_weight(kind, rows, columns, bias=rows == 130)
        do = recorder(dtype)
        packed = do.pack(weight)
        assert (packed.kind == avx512.BF16) == fallback
        x = outlying(256, columns).to(dtype)
        y = do.linear("y", x, packed)
        told = 0
        for count in (1, 6, 7, 64, 130):
            run(do, batch_of([(0, count)]))
            assert error(y[:count], reference.linear(x[:count], weight)) < 2**-20, count
            told += surplus_of(x[:count], weight)
        assert do.surplus_outliers == told


@program
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_program_with_gate_and_up(kind, dtype):
    """silu(gate) * up comes out in the activations' dtype: one rounding of it, 2^-9 or 2^-24."""
    weight = rounding_weight(kind, 2 * 45, 48, bias=True)
    do = recorder(dtype)
    x = outlying(256, 48).to(dtype)
    y = do.linear("y", x, do.pack(weight, silu_mul=True))
    run(do, batch_of([(0, 30)]))
    gate, up = reference.linear(x[:30], weight).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    unit = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y[:30].double(), expected, rtol=unit, atol=unit / 10)


@program
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_threads(kind, threads):
    weight = rounding_weight(kind, 150, 160)
    before = torch.get_num_threads()
    results = []
    for silu_mul in (False, True):
        try:
            torch.set_num_threads(threads)
            do = recorder(torch.bfloat16)
        finally:
            torch.set_num_threads(before)
        x = outlying(256, 160).bfloat16()
        y = do.linear("y", x, do.pack(weight, silu_mul))
        run(do, batch_of([(0, 200)]))
        together, saved = y[:200].clone(), x.clone()
        for count in ROWS:
            x[:count] = saved[200 - count : 200]
            run(do, batch_of([(0, count)]))
            assert torch.equal(y[:count], together[200 - count :]), count
            x.copy_(saved)
        results.append(together)
    alone = results[0], recorder(torch.bfloat16)
    x = outlying(256, 160).bfloat16()
    y = alone[1].linear("y", x, alone[1].pack(weight))
    run(alone[1], batch_of([(0, 200)]))
    assert torch.equal(y[:200], alone[0])


@program
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_in_its_row(kind, dtype):
    weight = rounding_weight(kind, 40, 96)
    do = recorder(dtype)
    x = outlying(256, 96).to(dtype)
    y = do.linear("y", x, do.pack(weight))
    run(do, batch_of([(0, 10)]))
    plain = y[:10].clone()
    for bad in (torch.nan, torch.inf):
        x[4, 50] = bad
        run(do, batch_of([(0, 10)]))
        assert not y[4].isfinite().any()
        rest = [row for row in range(10) if row != 4]
        assert torch.equal(y[rest], plain[rest])
        eager = RoundingLinear(weight, dtype, CPU, torch.zeros(1, dtype=torch.int64))(x[:10])
        assert eager.isfinite().all(dim=1).tolist() == [row != 4 for row in range(10)]


@program
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_program_rounds_every_ratio_as_pytorch_does(kind):
    """W is the identity, so that y are the codes: all of them, and halves between two."""
    whole = torch.arange(-128.0, 128)
    if kind == "fp8":
        whole = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
        whole = whole[whole.isfinite()].sort().values
    largest = 127.0 if kind == "int8" else 448.0
    points = torch.cat([whole, (whole[1:] + whole[:-1]) / 2])
    points = torch.cat([points, points.nextafter(torch.tensor(9e9))]).clamp(-largest, largest)
    columns = 64
    points = torch.nn.functional.pad(points, (0, -len(points) % (columns - 1))).view(
        -1, columns - 1
    )
    x = torch.cat([torch.full((len(points), 1), largest), points], dim=1)
    expected = x.round() if kind == "int8" else x.to(torch.float8_e4m3fn).float()
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    weight = LinearWeight(
        None, torch.eye(columns).to(dtype), torch.ones(columns, 1), None, columns, 8, None,
        InputRounding(kind, largest),
    )  # fmt: skip
    do = recorder(torch.float32)
    y = do.linear("y", x, do.pack(weight))
    run(do, batch_of([(0, len(x))]))
    assert torch.equal(y[: len(x)], expected)


@program
@pytest.mark.parametrize("fallback", [False, True])
def test_program_knows_every_weight_in_fp8(fallback, monkeypatch):
    """Inputs are the identity: y are the codes, times a scale of 448 / 448 in float32."""
    if fallback:
        monkeypatch.setattr(avx512, "processor_has", lambda flag: False)
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()].repeat(2)[None]
    columns = codes.shape[1]
    weight = LinearWeight(
        None, codes, torch.ones(1, 1), None, columns, 8, None, InputRounding("fp8", 448.0)
    )
    do = recorder(torch.float32)
    x = torch.eye(columns)[:256]
    y = do.linear("y", x, do.pack(weight))
    for count in (1, 12, 13, 254):  # codes become bfloat16 in place, and before the product
        y.fill_(torch.nan)
        saved = x.clone()
        x[:count] = saved[254 - count : 254]
        run(do, batch_of([(0, count)]))
        torch.testing.assert_close(
            y[:count, 0], codes[0, 254 - count : 254].float(), rtol=2**-22, atol=0
        )  # 1 / 448 and the product with it are rounded
        x.copy_(saved)


@program
def test_a_layer_may_store_no_outlier_column():
    weight = rounding_weight("llm.int8", 70, 48, outliers=0)
    do = recorder(torch.bfloat16)
    x = outlying(256, 48).bfloat16()
    y = do.linear("y", x, do.pack(weight))
    run(do, batch_of([(0, 9)]))
    assert error(y[:9], reference.linear(x[:9], weight)) < 2**-20
    by_pytorch = RoundingLinear(weight, torch.float32, CPU, torch.zeros(1, dtype=torch.int64))
    assert error(by_pytorch(x[:9].float()), reference.linear(x[:9], weight)) < 2**-20


@program
def test_bytes_are_those_of_the_checkpoint():
    """A byte a code, four a scale, two for each stored outlier of float16."""
    do = recorder(torch.bfloat16)
    assert do.pack(rounding_weight("fp8", 64, 96)).bytes == 64 * (96 + 4)
    assert do.pack(rounding_weight("llm.int8", 64, 96)).bytes == 64 * (96 + 4 + 3 * 2)


def test_what_no_kernel_is_right_for_is_refused():
    wide = torch.zeros(1, dtype=torch.int8).expand(2, MOST_COLUMNS + 1)
    scale = torch.ones(2, 1)
    weight = LinearWeight(
        None, wide, scale, None, wide.shape[1], 8, None, InputRounding("int8", 127.0)
    )
    with pytest.raises(InputError, match=r"reads 131,072 columns, .* up to 131,071"):
        check(weight)
    check(replace(weight, codes=wide[:, 1:], group_size=MOST_COLUMNS))
    weight = rounding_weight("fp8", 4, 16)
    weight.codes[2, 3] = torch.nan
    with pytest.raises(InputError, match="4 x 16 in float8_e4m3fn holds NaN"):
        check(weight)


def test_inputs_of_tests_exceed_the_threshold():
    """Of both kinds: some elements, and more than a token has room for."""
    inputs = InputRounding("int8", 127.0, threshold=THRESHOLD)
    tokens = [reference.round_token(token, inputs) for token in outlying(8, 96)]
    assert all(token.found for token in tokens[1:3])
    assert tokens[2].surplus > 0
