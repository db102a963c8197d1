"""The roofline's formulas: the lecture's numbers, other people's counts, and what must grow."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from compress.core.errors import InputError
from compress.devices import DEVICES, Efficiency
from compress.roofline import (
    Mla,
    ModelShape,
    Precision,
    attention_intensity,
    bits,
    decode,
    device_intensity,
    expected_tokens,
    ideal_step,
    kv_bytes,
    kv_bytes_per_token,
    kv_read_bytes,
    largest_batch,
    linear_expected_tokens,
    linear_speculative_speedup,
    link_bytes,
    matmul_intensity,
    memory,
    parameters,
    precision,
    prefill,
    shard,
    speculative_speedup,
    time_of,
    weight_bytes,
)
from compress.shapes import find_shape

H100 = DEVICES["h100"]
BF16 = precision()
NOTE = Path(__file__).parents[2] / "docs" / "roofline.md"


@pytest.fixture(scope="module")
def llama_13b():
    return find_shape("llama-2-13b")


@pytest.fixture(scope="module")
def llama_70b():
    return find_shape("llama-2-70b")


# The lecture's numbers (CS336, lecture 10)


@pytest.mark.parametrize(
    ("batch", "printed_gb", "printed_ms", "printed_rate"),
    [(1, 26.84, 8.0, 125), (64, 79.6, 23.8, 2690), (256, 240, 71.6, 3575)],
)
def test_llama_13b_on_h100(llama_13b, batch, printed_gb, printed_ms, printed_rate):
    """13e9 parameters of 2 bytes, and keys and values of 1,024 tokens.

    The table is within 0.4 % of the formula: it cuts the KV cache to 53.6 and 214 GB, and divides
    the batch by rounded milliseconds.  Doing the same gives its figures to the last digit.
    """
    kv = batch * kv_bytes(llama_13b, BF16, 1024)
    step = ideal_step(13e9 * 2, kv, H100.bandwidth, batch)
    assert step.bytes / 1e9 == pytest.approx(printed_gb, rel=0.004)
    assert step.seconds * 1000 == pytest.approx(printed_ms, rel=0.004)
    assert step.tokens_per_s == pytest.approx(printed_rate, rel=0.004)

    cut = {1: 0.84e9, 64: 53.6e9, 256: 214e9}[batch]
    assert abs(kv - cut) < 1e9 if batch == 256 else abs(kv - cut) < 0.1e9
    theirs = ideal_step(26e9, cut, H100.bandwidth, batch)
    assert theirs.bytes / 1e9 == pytest.approx(printed_gb, rel=1e-9)
    milliseconds = round(theirs.seconds * 1000, 1)
    assert milliseconds == printed_ms
    assert round(batch / milliseconds * 1000, -1) == pytest.approx(printed_rate, abs=5)


def test_kv_cache_of_llama_70b(llama_70b):
    assert kv_bytes(llama_70b, BF16, 4096) == 1_342_177_280
    assert kv_bytes_per_token(llama_70b, BF16) == 327_680
    mha = dataclasses.replace(llama_70b, kv_heads=llama_70b.heads)
    assert kv_bytes(mha, BF16, 4096) / kv_bytes(llama_70b, BF16, 4096) == 8


def test_intensities():
    assert math.floor(matmul_intensity(295, 4096, 11008)) == 268
    assert matmul_intensity(1, 4096, 11008) == pytest.approx(1, rel=1e-3)
    assert round(device_intensity(H100)) == 295
    assert attention_intensity(4096, 4096) == 2048
    assert attention_intensity(4096, 1) < 1


def test_mla_against_mha():
    """Numbers a token and layer: keys of 64 heads of 128, and the latent of rank 512 with 64."""
    mla = ModelShape("mla", 8192, 8192, 64, 64, 128, 1, 1000, mla=Mla(512, 64, 128, 128, 1536))
    mha = dataclasses.replace(mla, mla=None)
    assert mha.heads * mha.head_dim == 8192
    assert mla.kv_numbers == 576
    assert round(8192 / mla.kv_numbers) == 14
    # the latent stands for keys and values, so in bytes it is twice that
    assert kv_bytes(mha, BF16, 100) / kv_bytes(mla, BF16, 100) == pytest.approx(2 * 8192 / 576)


def test_speculation():
    assert linear_expected_tokens(0.8, 4) == pytest.approx(4.2)
    assert round(linear_speculative_speedup(0.8, 4, 0.11), 1) == 2.9
    assert expected_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert speculative_speedup(0.8, 4, 0.11) == pytest.approx(3.3616 / 1.44)
    assert speculative_speedup(1, 4, 0.11) == linear_speculative_speedup(1, 4, 0.11)


def test_expected_tokens_by_simulation():
    generator = torch.Generator().manual_seed(0)
    accepted = torch.rand(200_000, 5, generator=generator) < 0.7
    tokens = 1 + accepted.long().cumprod(1).sum(1).double()
    # five standard errors of the mean
    error = 5 * tokens.std().item() / math.sqrt(len(tokens))
    assert tokens.mean().item() == pytest.approx(expected_tokens(0.7, 5), abs=error)


def _disagreements():
    """Figures that the formulas do not give, by their row in docs/roofline.md: printed, formula."""
    big, huge = find_shape("llama-2-13b"), find_shape("llama-2-70b")
    h100 = H100.bandwidth

    def step(batch, context, shape=big):
        return ideal_step(26e9, batch * kv_bytes(shape, BF16, context), h100, batch)

    grouped = dataclasses.replace(big, kv_heads=8)
    mla = Mla(512, 64, 128, 128, 1536)
    deepseek = ModelShape("DeepSeek-V2", 5120, 12288, 128, 128, 128, 60, 102400, mla=mla)
    D, F, roof = 4096, 11008, device_intensity(H100)
    found = {
        "13B, batch 64: memory, GB": (79.6, step(64, 1024).bytes / 1e9),
        "13B, batch 256: memory, GB": (240, step(256, 1024).bytes / 1e9),
        "13B, batch 256: latency, ms": (71.6, step(256, 1024).seconds * 1e3),
        "13B, batch 256: tokens/s": (3575, step(256, 1024).tokens_per_s),
        "13B, batch 1: memory with all 13,015,864,320 parameters, GB": (
            26.84,
            memory(big, BF16, 1, 1024).total / 1e9,
        ),
        "13B: KV of 1,000 tokens, GB": (1.28, kv_bytes(big, BF16, 1000) / 1e9),
        "13B with 8 KV heads, batch 16: memory, GB": (30.9, step(16, 1000, grouped).bytes / 1e9),
        "13B with 8 KV heads, batch 16: tokens/s": (671, step(16, 1000, grouped).tokens_per_s),
        "70B: first token of 100 on an H100, ms": (
            30,
            time_of(prefill(huge, BF16, 1, 100), H100, BF16).seconds * 1e3,
        ),
        "70B, batch 64 at 32,768: KV, GB": (172, 64 * kv_bytes(huge, BF16, 32768) / 1e9),
        "70B, batch 64 at 32,768: KV over weights": (
            1.2,
            64 * kv_bytes(huge, BF16, 32768) / 140e9,
        ),
        "H100's intensity at 3.3 TB/s": (295, 989 / 3.3),
        "intensity of 295 rows": (270, matmul_intensity(295, D, F)),
        "intensity of 4,096 rows": (2731, matmul_intensity(4096, D, F)),
        "rows from which compute limits": (295, roof / (1 - roof * (1 / D + 1 / F))),
        "FLOP a token and parameter, forward": (6, 2),
        "attention's intensity, prompt of 4,096": (4096, attention_intensity(4096, 4096)),
        "attention's intensity by its formula, T = 1": (4, attention_intensity(4096, 1)),
        "MLA of DeepSeek-V2: keys, numbers a token": (16_000, 128 * 128),
        "MLA of DeepSeek-V2: latent, numbers a token": (512, deepseek.kv_numbers),
        "MLA against MHA of 64 heads, in bytes": (14, 2 * 8192 / deepseek.kv_numbers),
        "MLA against MHA of DeepSeek-V2's 128 heads, in bytes": (
            14,
            2 * 128 * 128 / deepseek.kv_numbers,
        ),
        "tokens a pass, a = 0.9, k = 4": (4.6, expected_tokens(0.9, 4)),
        "tokens a pass, a = 0.8, k = 4": (4.2, expected_tokens(0.8, 4)),
        "speed-up, a = 0.8, k = 4, r = 0.11": (2.9, speculative_speedup(0.8, 4, 0.11)),
        "int3 in groups of 128 against bf16": (4, 16 / bits("int3")),
        "int4 in groups of 128, part of bf16": (0.25, bits("int4") / 16),
    }
    printed = {1: (27.3, 8.0, 124), 16: (46.5, 38.4, 416)}
    printed |= {64: (108.1, 146.9, 436), 256: (354.3, 587.8, 436)}
    for batch, (gb, ms, rate) in printed.items():
        got, where = step(batch, 1000), f"13B at 1,000 tokens, batch {batch}"
        found[f"{where}: memory, GB"] = (gb, got.bytes / 1e9)
        if batch > 1:  # at 1 it agrees
            found[f"{where}: latency, ms"] = (ms, got.seconds * 1e3)
        found[f"{where}: tokens/s"] = (rate, got.tokens_per_s)
    return found


def test_note_says_where_the_lecture_differs():
    """Every row of the note is what the formulas give, and no row is missing."""
    rows = {}
    for line in NOTE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 5 and cells[3].endswith("%"):
            rows[cells[0]] = cells[1:4]
    expected = {
        what: [f"{printed:,g}", f"{formula:,.5g}", f"{printed / formula - 1:+.1%}"]
        for what, (printed, formula) in _disagreements().items()
    }
    assert rows == expected


# Against other counts


def brute_attention(shape, context, tokens):
    """Pairs of a query and a key it sees, and keys that anybody sees, one by one."""
    pairs = keys = 0
    for window in shape.windows:
        seen = set()
        for position in range(context - tokens, context):
            first = 0 if window is None else max(0, position - window + 1)
            pairs += position - first + 1
            seen |= set(range(first, position + 1))
        keys += len(seen)
    return pairs, keys


@given(
    context=st.integers(1, 40),
    tokens=st.integers(1, 40),
    window=st.none() | st.integers(1, 45),
    batch=st.integers(1, 3),
)
def test_attention_counted_one_by_one(context, tokens, window, batch):
    tokens = min(tokens, context)
    shape = ModelShape("x", 8, 16, 4, 2, 4, 2, 32, windows=(window, None))
    work = decode(shape, BF16, batch, context, tokens)
    pairs, keys = brute_attention(shape, context, tokens)
    assert work.flops["attention"] == batch * pairs * 4 * 4 * 4
    assert work.bytes["attention"] == batch * keys * 2 * 2 * 4 * 2
    if tokens == 1:
        assert work.bytes["attention"] == batch * kv_read_bytes(shape, BF16, context)


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-0.6b", "gemma-2-2b", "minicpm3-4b"])
def test_flops_as_torch_counts_them(name):
    """PyTorch's counter on transformers' own forward of two layers, without memory.

    It counts all pairs of queries and keys, also those that the mask takes away.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from compress.shapes import known_models, shape_of

    config = dict(known_models()[name]["config"]) | {"num_hidden_layers": 2}
    shape = shape_of(config, name)
    made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
        ids = torch.zeros(3, 50, dtype=torch.long)
        positions, mask = torch.arange(50)[None], torch.zeros(3, 1, 50, 50)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(ids, mask, position_ids=positions, use_cache=False, logits_to_keep=1)
    work = prefill(shape, BF16, 3, 50)
    by_kind = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = by_kind.get("aten.mm", 0) + by_kind.get("aten.addmm", 0)
    assert products == work.total_flops - work.flops["attention"]
    pairs = work.flops["attention"] / (51 / 2) * 50
    # rotary angles count as products of [H / 2, 1] x [1, T]
    assert by_kind["aten.bmm"] == pytest.approx(pairs, rel=0.01)


def test_cache_as_transformers_fills_it(model_folder):
    from transformers import AutoModelForCausalLM

    folder = model_folder()
    shape = find_shape(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = model(torch.zeros(2, 7, dtype=torch.long)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 2 * kv_bytes(shape, dataclasses.replace(BF16, kv=32), 7)


# What must grow, and what must add up


@st.composite
def shapes(draw, mla=(True, False)):
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    layers = draw(st.integers(1, 6))
    windows = draw(st.lists(st.none() | st.integers(1, 5000), min_size=layers, max_size=layers))
    latent = (
        Mla(64, 16, 32, 32, draw(st.none() | st.just(96))) if draw(st.sampled_from(mla)) else None
    )
    return ModelShape(
        name="drawn",
        hidden=draw(st.sampled_from([64, 512, 4096])),
        ffn=draw(st.sampled_from([64, 1024, 11008])),
        heads=8,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 128])),
        layers=layers,
        vocab=draw(st.sampled_from([256, 32000])),
        tied=draw(st.booleans()),
        windows=tuple(windows),
        mla=latent,
        kv_share=draw(st.integers(1, 3)),
        gated=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        head_bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from(["none", "head", "all"])),
    )


NAMES = ("int2", "int3", "int4", "int8", "bf16", "fp32")
batches, contexts = st.integers(1, 512), st.integers(1, 20_000)


@given(shape=shapes(), batch=batches, context=contexts, more=st.integers(1, 500))
def test_more_is_never_less(shape, batch, context, more):
    small, large = decode(shape, BF16, batch, context), decode(shape, BF16, batch + more, context)
    longer = decode(shape, BF16, batch, context + more)
    drafted = decode(shape, BF16, batch, context, min(context, 4))
    for grown in (large, longer, drafted):
        assert all(grown.bytes[part] >= moved for part, moved in small.bytes.items())
    for grown in (large, longer):
        assert all(grown.flops[part] >= flops for part, flops in small.flops.items())
        seconds = time_of(grown, H100, BF16).seconds
        assert seconds >= time_of(small, H100, BF16).seconds
    # a batch is never slower than its sequences one after the other
    alone = time_of(decode(shape, BF16, 1, context), H100, BF16).seconds
    assert time_of(small, H100, BF16).seconds <= batch * alone * (1 + 1e-9)
    first, second = (prefill(shape, BF16, batch, n) for n in (context, context + more))
    assert second.total_bytes >= first.total_bytes
    assert second.total_flops > first.total_flops
    fits = largest_batch(shape, BF16, H100, context)
    assert fits >= largest_batch(shape, BF16, H100, context + more)
    assert memory(shape, BF16, fits, context).total <= H100.memory
    assert memory(shape, BF16, fits + 1, context).total > H100.memory


@given(shape=shapes(), batch=batches, context=contexts)
def test_more_bits_are_never_less(shape, batch, context):
    held, taken = [], []
    for name in NAMES:
        chosen = precision(name, kv=name, embeddings=name, head=name)
        held.append(memory(shape, chosen, batch, context).total)
        taken.append(time_of(decode(shape, chosen, batch, context), H100, chosen).seconds)
    assert held == sorted(held)
    assert taken == sorted(taken)


@given(shape=shapes(), context=contexts)
def test_windows_and_shared_caches_never_cost(shape, context):
    plain = dataclasses.replace(shape, windows=(None,) * shape.layers)
    alone = dataclasses.replace(plain, kv_share=1)
    assert kv_bytes(shape, BF16, context) <= kv_bytes(plain, BF16, context)
    assert kv_bytes(plain, BF16, context) <= kv_bytes(alone, BF16, context)
    assert kv_bytes(alone, BF16, context) == context * kv_bytes_per_token(alone, BF16)
    # a shared cache is held once, and read by every layer
    assert kv_bytes(alone, BF16, context) == kv_read_bytes(plain, BF16, context)
    assert kv_read_bytes(shape, BF16, context) <= kv_read_bytes(plain, BF16, context)
    assert parameters(shape).total <= parameters(alone).total


@given(shape=shapes(), batch=batches, context=contexts)
def test_a_step_reads_what_is_held(shape, batch, context):
    """All weights, less the rows of the embedding that are not looked up, and the caches."""
    stored, work = weight_bytes(shape, BF16), decode(shape, BF16, batch, context)
    rows = batch * shape.hidden * 2
    table = 0 if shape.tied else stored["embedding"]
    kv = batch * kv_read_bytes(shape, BF16, context)
    assert work.total_bytes == pytest.approx(sum(stored.values()) - table + rows + kv)
    assert sum(stored.values()) == 2 * parameters(shape).total


@given(shape=shapes(mla=(False,)), devices=st.sampled_from([1, 2, 4, 8]), batch=batches)
def test_shards_sum_up(shape, devices, batch):
    """But for what each device has: norms, and KV heads where devices are more than those."""
    part = shard(shape, devices)
    whole, each = parameters(shape), parameters(part)
    assert devices * each.mlp == whole.mlp
    assert devices * each.embedding >= whole.embedding
    copies = max(1, devices // shape.kv_heads)
    assert devices * kv_bytes(part, BF16, 99) == copies * kv_bytes(shape, BF16, 99)
    if copies == 1:
        assert devices * each.attention == whole.attention
        works = (decode(part, BF16, batch, 99), decode(shape, BF16, batch, 99))
        for name in ("attention_projections", "attention", "mlp"):
            assert devices * works[0].flops[name] == pytest.approx(works[1].flops[name])
            assert devices * works[0].bytes[name] == pytest.approx(works[1].bytes[name])
    assert each.total <= whole.total
    assert (link_bytes(shape, batch, devices) == 0) == (devices == 1)


def test_tensor_parallel_of_mla_keeps_the_latent():
    shape = find_shape("minicpm3-4b")
    half = shard(shape, 2)
    assert kv_bytes(half, BF16, 100) == kv_bytes(shape, BF16, 100)
    down = 62 * 2560 * (768 + 256 + 32)  # from D to the ranks and the rotary part
    assert 2 * parameters(half).attention == parameters(shape).attention + down


def test_tensor_parallel_over_the_link(llama_70b):
    part, sent = shard(llama_70b, 2), link_bytes(llama_70b, 8, 2)
    assert sent == 161 * 8 * 8192 * 2  # 2 x 80 + 1 all-reduces, of which half is sent twice
    work = decode(part, BF16, 8, 1024)
    timing = time_of(work, H100, BF16, link_bytes=sent)
    assert timing.parts["link"].seconds == sent / 450e9
    assert timing.seconds == pytest.approx(
        time_of(work, H100, BF16).seconds + timing.parts["link"].seconds
    )
    unlinked = dataclasses.replace(H100, link=None)
    with pytest.raises(InputError, match="no link"):
        time_of(work, unlinked, BF16, link_bytes=sent)
    with pytest.raises(InputError, match="3 devices cannot share"):
        shard(llama_70b, 3)


# Time


def test_which_limit(llama_13b):
    assert time_of(decode(llama_13b, BF16, 1, 1024), H100, BF16).limit == "memory"
    prompt = time_of(prefill(llama_13b, BF16, 1, 2048), H100, BF16)
    assert prompt.limit == "compute"
    assert prompt.parts["mlp"].limit == "compute"
    # a part of a large batch is limited by compute while attention is not
    step = time_of(decode(llama_13b, BF16, 512, 1024), H100, BF16)
    assert step.parts["mlp"].limit == "compute"
    assert step.parts["attention"].limit == "memory"


def test_efficiency_and_overhead(llama_13b):
    work = decode(llama_13b, BF16, 1, 1024)
    ideal = time_of(work, H100, BF16)
    slower = dataclasses.replace(H100, efficiency=Efficiency(0.5, 1.0, 0.003))
    timing = time_of(work, slower, BF16)
    assert timing.seconds == pytest.approx(2 * ideal.seconds + 0.003)
    assert timing.parts["overhead"].limit == "overhead"


def test_compute_by_precision(llama_13b):
    """8-bit units double the linears' rate and not attention's; a device without has bf16's."""
    fast = precision("fp8")
    work = prefill(llama_13b, fast, 4, 2048)
    ours, plain = time_of(work, H100, fast), time_of(work, H100, BF16)
    ratio = plain.parts["mlp"].seconds / ours.parts["mlp"].seconds
    assert ratio == pytest.approx(1979 / 989)
    assert ours.parts["attention"] == plain.parts["attention"]
    a100 = DEVICES["a100"]
    assert time_of(work, a100, fast).parts["mlp"] == time_of(work, a100, BF16).parts["mlp"]


def test_mla_reads_latents_and_prompts_whole_keys():
    shape = find_shape("minicpm3-4b")
    N, rank, rope, nope, value = 40, 256, 32, 64, 64
    step = decode(shape, BF16, 2, 100)
    assert step.flops["attention"] == 62 * 2 * 100 * 2 * N * (2 * rank + rope)
    assert step.bytes["attention"] == 62 * 2 * 100 * (rank + rope) * 2
    prompt = prefill(shape, BF16, 1, 100)
    assert prompt.flops["attention"] == 62 * (101 * 50) * 2 * N * (nope + rope + value)


# Names of precisions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bf16", 16),
        ("fp8", 8),
        ("int8", 8.125),
        ("int4", 4.125),
        ("int4-g64", 4.25),
        ("int3", 3.125),
    ],
)
def test_bits(name, expected):
    assert bits(name) == expected


@pytest.mark.parametrize("name", ["int5", "bf16-g64", "int4-g0", "int4-g", "", "INT4", "int4-g64x"])
def test_unknown_bits(name):
    with pytest.raises(InputError, match=r"precision .* is unknown"):
        bits(name)


def test_precision_by_names():
    assert precision() == Precision()
    chosen = precision("w8a8", kv="fp8", head="int8")
    assert chosen == Precision(8, 16, 8.125, 8, "int8")
    assert precision("int4").compute == "bf16"
    assert precision("bf16", embeddings="int8").head == 8.125


def test_a_tied_head_in_other_bits_is_a_copy():
    shape = find_shape("smollm2-135m")
    table = shape.vocab * shape.hidden
    assert weight_bytes(shape, BF16)["head"] == 0
    assert decode(shape, BF16, 1, 1).bytes["head"] == table * 2
    copied = precision("bf16", head="int8")
    assert weight_bytes(shape, copied)["head"] == table * 8.125 / 8
    assert decode(shape, copied, 1, 1).bytes["head"] == table * 8.125 / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0, "windows": ()}, "layers = 0"),
        ({"heads": 40, "kv_heads": 3}, "40 heads on 3 KV heads"),
        ({"windows": (4,)}, "1 windows for 40 layers"),
        ({"windows": (0,) * 40}, "window 0"),
        ({"hidden": 2.5}, "hidden = 2.5"),
        ({"vocab": True}, "vocab = True"),
    ],
)
def test_impossible_shapes(llama_13b, change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(llama_13b, **change)
