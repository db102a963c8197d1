"""Weights as the runtime loads them: equal to what the checkpoint's readers say, or refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.errors import InputError
from compress.core.source import ModelSource, resolve_model
from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.w8a8_matmul import reference
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.quant.packed import PackedFolder
from compress.quant.weight import QuantizedWeight
from compress.recipe import build_recipe
from compress.runtime.stored import linear_of
from compress.runtime.weights import GATE_UP, QKV, join, load_weights, rounded_by_row
from tests.kernels.rounding import outlying, rounding_weight

# attribute of LayerWeights -> the linears whose rows it holds
PARTS = {"qkv": QKV, "gate_up": GATE_UP, "out": ("self_attn.o_proj",), "down": ("mlp.down_proj",)}
FORMATS = ["compressed-tensors", "gptq", "awq"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def quantize(folder, out, **settings):
    stage = {"method": "rtn", "group_size": 16, **settings}
    run_recipe(build_recipe({"model": str(folder), "out": out, "stages": [stage]}))
    return out


def source_of(folder):
    return ModelSource(str(folder), folder)


def change(folder, out, tensors=None, drop=(), **config):
    """A copy of a folder with other tensors and other entries in config.json."""
    out.mkdir()
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in drop}
    save_file(kept | (tensors or {}), out / "model.safetensors", {"format": "pt"})
    stated = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(stated | config))
    return out


def assert_values(weights, dense_of):
    """Every linear of the layers, de-quantized, is what `dense_of(name)` says."""
    for index, layer in enumerate(weights.layers):
        for attribute, parts in PARTS.items():
            names = [f"model.layers.{index}.{part}" for part in parts]
            expected = torch.cat([dense_of(name) for name in names])
            assert torch.equal(getattr(layer, attribute).dequantize(torch.float32), expected)


def dense_by_transformers(folder):
    state = load_model(folder, "float32", torch.device("cpu")).state_dict()
    return lambda name: state[f"{name}.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_weights_stay_in_their_dtype(dtype, model_folder):
    folder = model_folder("qwen2", dtype)
    weights = load_weights(source_of(folder))
    assert_values(weights, dense_by_transformers(folder))
    layer = weights.layers[0]
    assert {layer.qkv.dense.dtype, layer.down.dense.dtype, weights.embedding.dtype} == {dtype}
    assert layer.qkv.shape == (80, 48)
    floats = (layer.input_norm, layer.post_norm, layer.qkv.bias, weights.final_norm)
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    assert (layer.out.bias, layer.q_norm, layer.k_norm, layer.window) == (None,) * 4
    facts = (weights.heads, weights.kv_heads, weights.head_dim, weights.vocab_size)
    assert facts == (6, 2, 8, 128)
    assert (weights.max_context, weights.rope_scaling) == (128, 1.0)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, "channel"])
def test_quantized_weights_are_exact(format_name, symmetric, group_size, model_folder, tmp_path):
    """16-bit scales: codes * scale + shift is (codes - zero_point) * scale without rounding."""
    settings = {"symmetric": symmetric, "group_size": group_size, "format": format_name}
    folder = quantize(model_folder("llama", torch.bfloat16), tmp_path / "out", **settings)
    weights = load_weights(source_of(folder))
    assert_values(weights, dense_by_transformers(folder))
    qkv = weights.layers[0].qkv
    assert (qkv.bits, qkv.codes.dtype, qkv.scale.dtype) == (4, torch.int8, torch.float32)
    assert qkv.group_size == (16 if group_size == 16 else 48)
    assert (qkv.shift is None) == symmetric


def test_differing_grids_are_joined(model_folder, tmp_path, capsys):
    overrides = {
        "k_proj": {"bits": 8, "group_size": 12},
        "v_proj": {"symmetric": False},
        "layers.1.mlp.up_proj": {"group_size": "channel"},
    }
    folder = quantize(
        model_folder("qwen3", torch.float16),
        tmp_path / "out",
        overrides=overrides,
        ignore=["layers.0.mlp.up_proj"],
    )
    weights = load_weights(source_of(folder))
    assert_values(weights, dense_by_transformers(folder))
    qkv, gate_up = weights.layers[0].qkv, weights.layers[1].gate_up
    assert (qkv.bits, qkv.group_size) == (8, 4)
    assert not qkv.shift[: 6 * 16 + 2 * 16].any()
    assert (gate_up.bits, gate_up.group_size, gate_up.shift) == (4, 16, None)
    assert weights.layers[0].gate_up.dense.dtype == torch.float32
    message = "model.layers.0: mlp.gate_proj and mlp.up_proj are not all quantized"
    assert message in capsys.readouterr().err


def test_activation_order_is_dequantized(model_folder, tmp_path, capsys):
    start = quantize(model_folder("llama", torch.float16), tmp_path / "start", format="gptq")
    tensors = load_file(start / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    moved = {f"{name}.g_idx": tensors[f"{name}.g_idx"][order].contiguous()}
    folder = change(start, tmp_path / "moved", moved)
    weights = load_weights(source_of(folder))
    assert_values(weights, dense_by_transformers(folder))
    assert weights.layers[0].qkv.dense is not None
    assert weights.layers[1].qkv.codes is not None
    assert "1 linears are grouped in activation order" in capsys.readouterr().err


def test_int_quantized(model_folder, tmp_path):
    """Codes that are not packed, as compressed-tensors writes weights of 8 bits beside int8
    activations; with activations on a grid of one scale for all it is refused."""
    start = quantize(model_folder("llama", torch.float16), tmp_path / "start", bits=8)
    packed = PackedFolder(source_of(start))
    suffixes = ("weight_packed", "weight_shape")
    drop = [f"{name}.{suffix}" for name in packed.linears for suffix in suffixes]
    codes = {f"{name}.weight": packed.weight(name).codes for name in packed.linears}
    scheme = json.loads(json.dumps(packed.scheme).replace("pack-quantized", "int-quantized"))
    folder = change(start, tmp_path / "plain", codes, drop, quantization_config=scheme)
    weights = load_weights(source_of(folder))
    assert_values(weights, dense_by_transformers(start))
    assert weights.layers[0].down.bits == 8
    scheme["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int"}
    folder = change(start, tmp_path / "activations", codes, drop, quantization_config=scheme)
    with pytest.raises(InputError, match="quantized activations other than 8 bits"):
        load_weights(source_of(folder))


@pytest.mark.parametrize("bits", [3, 8])
def test_a_group_that_the_width_cuts_off(bits):
    codes = torch.randint(-4, 4, (5, 40), generator=torch.Generator().manual_seed(0))
    scale, offset = torch.arange(1.0, 31.0).view(2, 5, 3)
    weight = QuantizedWeight(codes.to(torch.int8), scale, None, bits, 16, offset)
    linear = linear_of(weight)
    assert (linear.group_size, linear.scale.shape) == (8, (5, 5))
    assert torch.equal(linear.dequantize(torch.float32), weight.dequantize())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_gguf(kind, tied, tmp_path, write_gguf):
    """The blocks of the file, the head's included; equal to transformers' float32 copy."""
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    head = {"token_embd": "Q8_0", "output": None} if tied else {"output": "Q8_0"}
    write_gguf(tmp_path / "tiny.gguf", dict.fromkeys(names, kind) | head)
    source = resolve_model(str(tmp_path / "tiny.gguf"))
    weights = load_weights(source)
    assert_values(weights, dense_by_transformers(source.folder))
    layer = weights.layers[0]
    for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
        assert (linear.bits, linear.group_size) == (8 if kind == "Q8_0" else 4, 32)
        assert (linear.shift is None) == (kind != "Q4_1")
    assert (weights.head.bits, weights.head.group_size) == (8, 32)
    plain = load_weights(source_of(source.folder))
    assert torch.equal(weights.head.dequantize(torch.float32), plain.head.dense)
    assert torch.equal(weights.embedding, plain.embedding)
    assert load_weights(source, lm_head_bits=8).head.group_size == 32  # 8 bits already


def test_a_gguf_file_with_rotary_frequencies_is_refused(tmp_path, write_gguf):
    """Llama 3's scaling, which transformers does not read from the file."""
    import gguf
    import numpy as np

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, path=None):
            self.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
            super().write_header_to_file(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        write_gguf(tmp_path / "tiny.gguf", {"ffn_down": "Q4_0"})
    with pytest.raises(InputError, match=r"holds rope_freqs\.weight, which transformers cannot"):
        load_weights(resolve_model(str(tmp_path / "tiny.gguf")))


def test_heads(model_folder, tmp_path):
    tied = load_weights(source_of(model_folder("llama")))
    assert tied.head.dense is tied.embedding
    folder = model_folder("mistral", torch.bfloat16)
    own = load_weights(source_of(folder))
    assert torch.equal(own.head.dense, load_file(folder / "model.safetensors")["lm_head.weight"])
    # A stored head counts, whatever config.json says of tying: so it does in transformers.
    stated = load_weights(source_of(change(folder, tmp_path / "tied", tie_word_embeddings=True)))
    assert torch.equal(stated.head.dense, own.head.dense)
    rounded = load_weights(source_of(folder), lm_head_bits=8).head
    dense = own.head.dense.float()
    assert rounded.codes.amax(dim=1).maximum(-rounded.codes.amin(dim=1)).eq(127).all()
    error = (rounded.dequantize(torch.float32) - dense).abs()
    assert (error <= 0.5001 * dense.abs().amax(dim=1, keepdim=True) / 127).all()
    with pytest.raises(InputError, match="lm_head_bits = 4 is not possible; give 8"):
        load_weights(source_of(folder), lm_head_bits=4)


def test_rounding_by_row_takes_rows_of_zeros_and_runs_of_rows(monkeypatch):
    weight = torch.randn(33, 16, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    whole = rounded_by_row(LinearWeight.of_dense(weight))
    assert not whole.codes[7].any()
    monkeypatch.setattr("compress.runtime.weights.CHUNK_ELEMENTS", 100)
    assert torch.equal(rounded_by_row(LinearWeight.of_dense(weight)).codes, whole.codes)


def test_biases_are_joined():
    one, two = torch.ones(3, 4), torch.ones(2, 4)
    joined = join([LinearWeight.of_dense(one), LinearWeight.of_dense(two, torch.ones(2))], "x")
    assert joined.bias.tolist() == [0, 0, 0, 1, 1]
    assert replace(joined, bias=None).shape == (5, 4)


@pytest.mark.parametrize("kind", ["w8a8", "llm.int8", "fp8"])
def test_linears_that_round_alike_are_joined(kind, capsys):
    parts = [rounding_weight(kind, rows, 40, bias=rows == 5) for rows in (5, 3)]
    if kind == "llm.int8":
        index = parts[0].inputs.outlier_index
        parts[1] = replace(parts[1], inputs=replace(parts[1].inputs, outlier_index=index))
    joined = join(parts, "q and k")
    assert (joined.shape, joined.group_size, joined.codes.dtype) == (
        (8, 40), 40, parts[0].codes.dtype,
    )  # fmt: skip
    x = outlying(3, 40)
    expected = torch.cat([reference.linear(x, part) for part in parts], dim=1)
    assert torch.equal(reference.linear(x, joined), expected)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "other",
    [
        {"largest": 127.5},
        {"threshold": 7.0},
        {"threshold": None},
        {"outlier_index": torch.tensor([1, 2, 3])},
        {"outlier_index": None, "outlier_weight": None},
        None,
    ],
)
def test_linears_that_do_not_round_alike_are_dequantized(other, capsys):
    first, second = (rounding_weight("llm.int8", rows, 40) for rows in (5, 3))
    index = first.inputs.outlier_index
    inputs = replace(second.inputs, outlier_index=index)
    second = replace(second, inputs=inputs and other and replace(inputs, **other))
    joined = join([first, second], "q and k")
    expected = torch.cat([part.dequantize(torch.float32) for part in (first, second)])
    assert torch.equal(joined.dense, expected)
    assert joined.inputs is None
    said = "q and k do not all round their inputs alike; they are de-quantized"
    assert said in capsys.readouterr().err


def test_what_nobody_uses_is_refused(model_folder, tmp_path, capsys):
    folder = model_folder("llama")
    name = "model.layers.0.self_attn.q_proj"
    scale = {f"{name}.input_scale": torch.ones(1)}
    with pytest.raises(InputError, match=f"1 tensors that a LlamaForCausalLM.*{name}.input_scale"):
        load_weights(source_of(change(folder, tmp_path / "scale", scale)))
    extra = {f"model.layers.2.{n}": torch.ones(1) for n in ("a", "b")}
    with pytest.raises(InputError, match=r"holds 2 tensors .* such as model\.layers\.2\.a"):
        load_weights(source_of(change(folder, tmp_path / "layers", extra)))
    bias = {f"{name}.bias": torch.zeros(48)}  # as GPTQ tools store for classes without biases
    assert load_weights(source_of(change(folder, tmp_path / "z", bias))).layers[0].qkv.bias is None
    with pytest.raises(InputError, match=f"does not use, such as {name}.bias"):
        load_weights(source_of(change(folder, tmp_path / "b", {f"{name}.bias": torch.ones(48)})))
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    load_weights(source_of(change(folder, tmp_path / "table", table)))
    assert "1 stored tables of rotary frequencies are computed anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.bias",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_missing_and_wrong_tensors_are_named(name, model_folder, tmp_path):
    folder = model_folder("qwen2")
    with pytest.raises(InputError, match=f"no tensor {name}"):
        load_weights(source_of(change(folder, tmp_path / "missing", drop=[name])))
    wrong = {name: torch.ones(3, dtype=torch.float32)}
    with pytest.raises(InputError, match=rf"{name} in .* is \[3\], and config.json asks for \["):
        load_weights(source_of(change(folder, tmp_path / "shape", wrong)))
    shape = load_file(folder / "model.safetensors")[name].shape
    wrong = {name: torch.ones(shape, dtype=torch.int8)}
    with pytest.raises(InputError, match=rf"{name} in .* is torch.int8"):
        load_weights(source_of(change(folder, tmp_path / "dtype", wrong)))
