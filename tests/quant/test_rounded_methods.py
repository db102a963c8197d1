"""LLM.int8, SmoothQuant and FP8 on one block, against other implementations and by hand."""

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from compress.core.errors import InputError
from compress.core.statistics import InputStatistics
from compress.kernels.lowbit_matmul.weight import MOST_FOUND
from compress.quant.channel_scaling import ChannelScaling
from compress.quant.formats.compressed_tensors import quantization_config, unpack_weight
from compress.quant.fp8 import Fp8Config, rounded_to_fp8
from compress.quant.llm_int8 import LlmInt8Config, outlier_columns, vectorwise
from compress.quant.smoothquant import Smoothing, SmoothQuantConfig
from compress.recipe import build_stage


def seen(x, bound=6.0):
    stats = InputStatistics(("a",), x.shape[1], x.device, bound)
    for part in x.split(7):
        stats.add(part)
    return stats


def weight(rows=24, columns=48):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    values[3] = 0
    return values


# LLM.int8


def test_share_above_is_counted():
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(seen(x, 5.0).share_above, (x.abs() >= 5.0).float().mean(dim=0))


def test_the_largest_columns_and_the_common_ones_are_kept():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    x[0, 9] = 2.0  # largest, below the threshold
    x[:, 30] = 1.0
    x[::10, 41] = 7.0  # in 10% of the tokens
    x[5, 50] = 6.5  # once
    assert outlier_columns(seen(x), least=0).tolist() == [41]
    assert outlier_columns(seen(x), least=2).tolist() == [41, 50]
    assert outlier_columns(seen(x), least=3).tolist() == [9, 41, 50]
    assert len(outlier_columns(seen(x), least=1000)) == 64 // 16


def test_what_is_left_to_the_run_time_fits_its_buffer():
    """400 columns that are outliers in 5% of the tokens each are 20 a token: too many are left."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 400, generator=generator)
    x[torch.rand(1000, 400, generator=generator) < 0.05] = 8.0
    kept = outlier_columns(seen(x), least=0)
    left = x.clone()
    left[:, kept] = 0
    a_token = (left.abs() >= 6).sum(dim=1).float()
    assert MOST_FOUND / 8 < a_token.mean() <= MOST_FOUND / 4
    assert (a_token <= MOST_FOUND).all()
    # the commonest were taken
    share = seen(x).share_above
    others = [i for i in range(400) if i not in set(kept.tolist())]
    assert share[kept].min() >= share[others].max()


def test_codes_cover_each_row():
    codes, scale = vectorwise(weight())
    assert codes.abs().amax(dim=1).tolist() == [127 if i != 3 else 0 for i in range(24)]
    assert ((codes * scale - weight()).abs() <= scale / 2 * (1 + 1e-5)).all()


def test_llm_int8_keeps_outlier_columns(one_block, apply):
    block, _ = one_block()
    before = {n: p.clone() for n, p in block.module.named_parameters()}
    outcome = apply(LlmInt8Config(outlier_columns=2), block)
    for report in outcome.layers:
        name = report.name.removeprefix(block.name + ".")
        index = outcome.beside[f"{name}.outlier_index"].long()
        exact = outcome.beside[f"{name}.outlier_weight"]
        assert len(index) >= 2
        assert f"{len(index)} of" in report.note
        assert (report.method, report.bits, report.inputs) == ("llm-int8", 8, "int8")
        assert report.group_size is None
        assert torch.equal(exact, before[f"{name}.weight"][:, index])
        assert torch.equal(block.module.get_parameter(f"{name}.weight")[:, index], exact)
        assert 0 < report.output_error < 1e-3
    assert not any("outlier" in name for name in outcome.tensors)


def test_threshold_zero_needs_no_data_and_keeps_nothing(one_block, apply):
    block, _ = one_block()
    config = LlmInt8Config(outlier_threshold=0)
    assert not config.stage({}).needs_statistics
    block.inputs = []
    outcome = apply(config, block)
    assert all(not len(t) for n, t in outcome.beside.items() if n.endswith("outlier_index"))


# SmoothQuant


def test_smoothing_is_the_papers_formula():
    """Channel by channel, for two weights that share an input and heads that share a channel."""

    class Shared:
        def largest_of(self, channels):
            return channels.view(2, 2, 12).amax(dim=1).flatten()

    x = torch.randn(30, 48, generator=torch.Generator().manual_seed(2))
    x[:, 5] *= 40
    x[:, [7, 19]] = 0  # two consumer channels of one producer channel
    first, second = weight(), weight() * 3
    smoothing = Smoothing(0.3, {})
    scale, alpha = smoothing.search([(first, None), (second, None)], seen(x), Shared())
    assert alpha == 0.3
    for channel in range(24):
        head, within = divmod(channel, 12)
        read = [24 * head + within, 24 * head + 12 + within]
        x_max = x[:, read].abs().max().item()
        w_max = max(w[:, read].abs().max().item() for w in (first, second))
        expected = x_max**0.3 / w_max**0.7 if channel != 7 else 1.0
        assert scale[channel].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_smoothing_changes_no_function_and_evens_out_inputs(family, one_block):
    block, before = one_block(family)
    spread_before = [s.max_abs.max() / s.max_abs.median() for s in block.inputs]
    linears = dict(block.module.named_modules())
    grids = {block.full_name(n): None for s in block.inputs for n in s.linears}
    chosen = {n: linears[n] for s in block.inputs for n in s.linears}
    notes = Smoothing(0.5, grids).apply(block, chosen)
    assert sum("scaled into" in note for note in notes) >= 3
    # float32 in another order: 1e-4 of the output is far below what a wrong fold does (order 1)
    after = block.probe(block.module)
    assert (after - before).norm() <= 1e-4 * before.norm()
    evened = [s.max_abs.max() / s.max_abs.median() for s in block.inputs]
    assert evened[0] < 0.7 * spread_before[0]


def test_smoothquant_rounds_as_compressed_tensors(one_block, apply):
    block, _ = one_block()
    config = SmoothQuantConfig()
    widths = {block.full_name(n): 1 for s in block.inputs for n in s.linears}
    grids = config.grids(widths)[0]
    stage = config.stage(grids)
    values = weight()
    rounded = stage.round(values, torch.float32)
    scheme = scheme_of(grids)
    theirs = IntQuantizationCompressor.compress(
        {"weight": values, "weight_scale": rounded.scale}, scheme
    )
    assert torch.equal(theirs["weight"], rounded.codes)
    assert torch.equal(rounded.scale.squeeze(1)[:3], (values.abs().amax(dim=1) / 127.5)[:3])
    outcome = apply(config, block)
    assert {report.inputs for report in outcome.layers} == {"int8"}
    assert outcome.beside is None


def test_folds_are_carried_from_block_to_block(one_block, apply, monkeypatch):
    block, _ = one_block()
    grids = SmoothQuantConfig().grids({block.full_name(n): 1 for n in ("a",)})[0]
    stage = SmoothQuantConfig().stage(grids)
    stage.smoothing._fold_of(block, block.inputs[0].linears)
    other = SmoothQuantConfig().stage(grids)
    other.restore(stage.state())
    monkeypatch.setattr("compress.quant.channel_scaling.find_fold", None)
    assert other.smoothing._fold_of(block, block.inputs[0].linears) is not None
    assert isinstance(other.smoothing, ChannelScaling)


# FP8


def scheme_of(grids):
    (group,) = quantization_config(grids, [])["config_groups"].values()
    return QuantizationScheme(**group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_weights_are_the_nearest(dtype):
    values = weight()
    values[4, 4] = 1000.0
    rounded = rounded_to_fp8(values, dtype)
    assert rounded.codes.dtype == torch.float8_e4m3fn
    assert rounded.scale.dtype == dtype
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    table = table[table.isfinite()]
    scaled = values / rounded.scale.float()
    best = (table - scaled.unsqueeze(-1)).abs().amin(dim=-1)
    assert torch.equal((rounded.codes.float() - scaled).abs(), best)
    assert rounded.codes.float().abs().max() == 448


def test_fp8_needs_no_data(one_block, apply):
    block, _ = one_block()
    block.inputs = []
    outcome = apply(Fp8Config(), block)
    assert {report.inputs for report in outcome.layers} == {"fp8"}
    assert all(0 < report.weight_error < 2**-8 for report in outcome.layers)


@pytest.mark.parametrize("config", [SmoothQuantConfig(), Fp8Config()])
def test_config_is_valid_for_compressed_tensors_and_is_read_back(config):
    grids = config.grids({"a": 48, "b": 80})[0]
    stated = quantization_config(grids, ["lm_head"])
    (scheme,) = QuantizationConfig(**stated).config_groups.values()
    assert scheme.input_activations.dynamic
    assert scheme.input_activations.strategy == "token"
    assert scheme.weights.type == scheme.input_activations.type
    codes = torch.zeros(3, 48, dtype=torch.int8)
    if scheme.weights.type == "float":
        codes = codes.to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.ones(3, 1)}
    read = unpack_weight(tensors, stated, "a")
    assert read.inputs.kind == grids["a"].inputs
    wrong = tensors | {"weight": torch.zeros(3, 48, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match=r"codes are torch\.uint8"):
        unpack_weight(wrong, stated, "a")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("llm-int8", {"bits": 4}, "method llm-int8: bits = 4: Input should be 8"),
        ("llm-int8", {"group_size": 64}, "unknown key 'group_size' for method llm-int8"),
        ("llm-int8", {"format": "gptq"}, "method llm-int8: format = 'gptq'"),
        ("llm-int8", {"outlier_threshold": -1}, "outlier_threshold = -1"),
        ("llm-int8", {"outlier_threshold": float("nan")}, "outlier_threshold = nan"),
        ("fp8", {"symmetric": False}, "unknown key 'symmetric' for method fp8"),
        ("smoothquant", {"alpha": 1.5}, "alpha = 1.5"),
        ("awq", {"outlier_threshold": 6.0}, "unknown key 'outlier_threshold' for method awq"),
    ],
)
def test_settings_that_make_no_sense_are_refused(method, settings, message):
    with pytest.raises(InputError) as error:
        build_stage(method, settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ignored_linears_stay(one_block, apply):
    block, _ = one_block()
    outcome = apply(Fp8Config(ignore=("down_proj",)), block)
    left = [report.name for report in outcome.layers if report.method is None]
    assert [name.rpartition(".")[2] for name in left] == ["down_proj"]
    with pytest.raises(InputError, match="names no linear"):
        Fp8Config(ignore=("nothing",)).grids({"a.b": 3})
