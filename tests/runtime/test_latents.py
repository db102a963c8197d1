"""Checkpoints with attention on latents: what is read of them, and what their cache takes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.errors import InputError
from compress.core.source import ModelSource
from compress.kernels.program.build import reason_against
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.recipe import build_recipe
from compress.runtime.loading import load_decoder, make_decoder
from compress.runtime.scoring import Span, logits
from compress.runtime.weights import load_weights
from tests.runtime.test_families import changed

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(3))
NAMES = "model.layers.{}.self_attn."


def weights_of(folder):
    return load_weights(ModelSource(str(folder), folder))


def all_logits(decoder):
    span = Span(TOKENS.numpy(), first=1)
    return torch.cat([piece.logits for piece in logits(decoder, [span], most_tokens=32)])


def exact_logits(folder):
    with torch.no_grad():
        return load_model(folder, "float32", CPU)(TOKENS[None]).logits[0, :-1]


@pytest.mark.parametrize("way", ["program", "torch", "triton"])
@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_bytes_of_a_block(kind, way, model_folder, monkeypatch):
    """A latent of 20 numbers and a key of 8, and a scale for each in 8 bits; the program has whole
    vectors, of 32 and 16."""
    if way != "program":
        monkeypatch.setenv("COMPRESS_CPU_KERNELS", way)
    elif reason := reason_against():
        pytest.skip(reason)
    source = ModelSource("m", model_folder("youtu"))
    decoder = load_decoder(source, CPU, "float32", None, 32, kind)
    numbers = 32 + 16 if way == "program" else 20 + 8
    assert decoder.bytes_per_block == 2 * 16 * (4 * numbers if kind == "auto" else numbers + 8)


@pytest.mark.parametrize("family", ["deepseek_v3", "youtu"])
def test_bytes_of_weights_are_all_matrices(family, model_folder, monkeypatch):
    """In PyTorch's way of computing, where nothing is padded; norms are no matrices."""
    monkeypatch.setenv("COMPRESS_CPU_KERNELS", "torch")
    folder = model_folder(family)
    decoder = make_decoder(weights_of(folder), CPU, torch.float32, 32)
    tensors = load_file(folder / "model.safetensors")
    stored = {name: tensor.nbytes for name, tensor in tensors.items() if tensor.dim() == 2}
    if family == "deepseek_v3":  # the table of embeddings is not read but for a row
        del stored["model.embed_tokens.weight"]
    assert decoder.weight_bytes == sum(stored.values())


def neutralised(folder, out, dtype):
    """The model with its latents' norm switched off: rows times 2^-20, gains sqrt(eps) 2^20."""
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        rows = tensors[NAMES.format(layer) + "kv_a_proj_with_mqa.weight"]
        rows[:20] *= 2.0**-20
        gain = tensors[NAMES.format(layer) + "kv_a_layernorm.weight"]
        gain.fill_(1e-6**0.5 * 2.0**20)
    out.mkdir()
    save_file(
        {name: t.to(dtype) for name, t in tensors.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config | {"dtype": name}))
    return out


@pytest.mark.parametrize("way", ["program", "torch", "triton"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_norm_that_is_switched_off(dtype, way, model_folder, tmp_path, monkeypatch):
    """float16 has no numbers of 2^-20 of a weight: what was stored in float32 or bfloat16 is on
    another scale when it comes there.  16 bits round activations, here by a hundredth in all; with
    rows of zeros, attention would see no key without a position and no value."""
    if way != "program":
        monkeypatch.setenv("COMPRESS_CPU_KERNELS", way)
    elif reason_against() or dtype == "float16":
        pytest.skip(reason_against() or "float16 is PyTorch's on a CPU")
    if way == "triton" and dtype == "bfloat16":
        pytest.skip("the interpreter is wrong in bfloat16")
    stored = torch.float32 if dtype == "float32" else torch.bfloat16
    folder = neutralised(model_folder("deepseek_v3"), tmp_path / "switched-off", stored)
    decoder = load_decoder(ModelSource("m", folder), CPU, dtype, None, 32)
    expected = exact_logits(folder)
    apart = (all_logits(decoder) - expected).square().mean().sqrt() / expected.std()
    assert apart < (1e-5 if dtype == "float32" else 0.05)
    for layer in weights_of(folder).layers:
        rows = layer.qkv.dequantize(torch.float32)[-28:-8]
        assert 1 <= rows.abs().max() < 2


@pytest.mark.parametrize("way", ["program", "torch", "triton"])
@pytest.mark.parametrize("family", ["deepseek_v3", "youtu"])  # queries as they are, and compressed
@pytest.mark.parametrize(
    "settings",
    [{"overrides": {"kv_a_proj_with_mqa": {"bits": 8}}}, {"ignore": ["kv_a_proj_with_mqa"]}],
)
def test_queries_keep_their_bits_beside_wider_latents(
    settings, family, way, model_folder, tmp_path, monkeypatch
):
    """They are a linear of their own then: one with the latents would have the wider codes."""
    if way != "program":
        monkeypatch.setenv("COMPRESS_CPU_KERNELS", way)
    elif reason := reason_against():
        pytest.skip(reason)
    out = tmp_path / "out"
    stage = {"method": "rtn", "bits": 4, "group_size": 4, **settings}
    recipe = {"model": str(model_folder(family)), "out": str(out), "stages": [stage]}
    run_recipe(build_recipe(recipe))
    for layer in weights_of(out).layers:
        assert layer.latent.apart.bits == 4
        assert layer.qkv.shape[0] == 20 + 8
    expected = exact_logits(out)
    decoder = load_decoder(ModelSource("m", out), CPU, "float32", None, 32)
    apart = (all_logits(decoder) - expected).square().mean().sqrt() / expected.std()
    assert apart < 1e-5  # sums in another order
    stage["overrides"] = {"kv_a_proj_with_mqa": {"bits": 4}}
    alike = tmp_path / "alike"
    run_recipe(build_recipe(recipe | {"out": str(alike), "stages": [stage | {"ignore": []}]}))
    assert all(layer.latent.apart is None for layer in weights_of(alike).layers)


def test_up_projections_of_codes_are_their_values(model_folder, tmp_path):
    stage = {"method": "rtn", "group_size": 4}
    recipe = {"model": str(model_folder("youtu")), "out": str(tmp_path / "out")}
    run_recipe(build_recipe({**recipe, "stages": [stage]}))
    model = load_model(tmp_path / "out", "float32", CPU)
    for index, layer in enumerate(weights_of(tmp_path / "out").layers):
        stored = model.model.layers[index].self_attn.kv_b_proj
        up = layer.latent.weights.up
        heads = torch.cat([up.keys, up.values], dim=1)
        probe = torch.eye(20)
        assert torch.equal(heads.flatten(0, 1), stored(probe).T.detach())
        assert layer.qkv.codes is not None
        assert layer.latent.q_up.codes is not None


def test_calibrated_scales_are_those_of_transformers_cache(model_folder, text_file, tmp_path):
    """Which has latents in the place of keys, and keys in that of values."""
    folder = model_folder("youtu")
    stage = {"method": "rtn", "group_size": 4}
    recipe = {"model": str(folder), "out": str(tmp_path / "out"), "kv_cache": "int8"}
    recipe["calibration"] = {"source": str(text_file), "seq_len": 32, "samples": 4}
    run_recipe(build_recipe({**recipe, "stages": [stage]}))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for index, layer in enumerate(weights_of(tmp_path / "out").layers):
        stored = [tensors[NAMES.format(index) + name].item() for name in ("v_scale", "k_scale")]
        assert layer.kv_scales == tuple(stored)
        assert stored[0] != stored[1]
    decoder = load_decoder(ModelSource("m", tmp_path / "out"), CPU, "float32", None, 32)
    assert decoder.kv_cache_dtype == "int8"
    exact = exact_logits(tmp_path / "out")
    # a step of int8 is 1/127 of the largest number; with the scales exchanged it is 0.3
    assert (all_logits(decoder) - exact).square().mean().sqrt() < 0.1 * exact.std()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "has 6 heads on 3 KV heads; the runtime serves as many"),
        ({"first_k_dense_replace": 1}, r"layers with experts \(first_k_dense_replace = 1\); the "),
        (
            {"head_dim": 4},
            "rotates 4 of 8 dimensions of a head; the runtime serves all of them",
        ),
    ],
)
def test_what_would_be_wrong_is_refused(changes, message, model_folder, tmp_path):
    folder = changed(model_folder("deepseek_v3"), tmp_path / "changed", changes)
    with pytest.raises(InputError, match=message):
        weights_of(folder)
