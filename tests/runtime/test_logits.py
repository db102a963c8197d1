"""Loaded weights and reference operations make a decoder, whose logits are transformers'.

In float32 both do the same arithmetic in another order (fused projections, attention by blocks).
Logits here have a spread of 1 to 20; sums of up to 80 terms in two layers leave some 1e-6 of that,
and 2e-5 of the largest is allowed.
"""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from compress.core.source import ModelSource
from compress.export import export_model
from compress.kernels.lowbit_matmul.reference import linear
from compress.kernels.paged_attention.reference import paged_attention, write_kv
from compress.kernels.rms_norm import rms_norm
from compress.kernels.rope import apply_rope, rope_table
from compress.kernels.silu_mul import silu_mul
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.recipe import build_recipe
from compress.runtime.weights import load_weights

BLOCK, BLOCKS = 16, 8
TOKENS = torch.randint(3, 120, (100,), generator=torch.Generator().manual_seed(3))
CHUNKS = (37, 40, 20, 1, 1, 1)  # contexts over many blocks, prefill in pieces, then decode
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
WINDOW = {"sliding_window": 21}
QWEN_WINDOW = {**WINDOW, "use_sliding_window": True}


def layer_forward(layer, weights, x, cache, batch, table):
    """One decoder layer on new tokens of one sequence: x [t, D] -> [t, D]."""
    heads, kv_heads, size = weights.heads, weights.kv_heads, weights.head_dim
    normed = rms_norm(x, layer.input_norm, weights.norm_eps)[1]
    qkv = linear(normed, layer.qkv).view(len(x), -1, size)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    if layer.q_norm is not None:
        q = rms_norm(q, layer.q_norm, weights.norm_eps)[1]
        k = rms_norm(k, layer.k_norm, weights.norm_eps)[1]
    q, k = apply_rope(q, k, *table)
    slots, *places = batch
    write_kv(*cache, k, v, slots)
    attended = paged_attention(q, *cache, *places, size**-0.5, layer.window)
    attended = linear(attended.flatten(1), layer.out)
    x, normed = rms_norm(attended, layer.post_norm, weights.norm_eps, x)
    return x + linear(silu_mul(linear(normed, layer.gate_up)), layer.down)


@torch.no_grad()
def decode(weights, tokens=TOKENS, chunks=CHUNKS):
    """Logits [T, V] of one sequence, run in chunks on a paged cache."""
    shape = (BLOCKS, weights.kv_heads, BLOCK, weights.head_dim)
    caches = [torch.full((2, *shape), float("nan")) for _ in weights.layers]
    blocks = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0))
    logits, done = [], 0
    for count in chunks:
        positions = torch.arange(done, done + count)
        slots = blocks[positions // BLOCK] * BLOCK + positions % BLOCK
        done += count
        starts, contexts = torch.tensor([0, count]), torch.tensor([done])
        batch = (slots, starts, contexts, blocks[None].to(torch.int32))
        table = rope_table(positions, weights.inv_freq, weights.rope_scaling, torch.float32)
        x = F.embedding(tokens[positions], weights.embedding).float()
        for layer, cache in zip(weights.layers, caches, strict=True):
            x = layer_forward(layer, weights, x, cache, batch, table)
        logits.append(linear(rms_norm(x, weights.final_norm, weights.norm_eps)[1], weights.head))
    return torch.cat(logits)


def assert_same_logits(folder, model=None):
    model = model or load_model(folder, "float32", torch.device("cpu"))
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0]
    found = decode(load_weights(ModelSource(str(folder), folder)))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.fixture
def variant(model_folder, tmp_path):
    """A function that saves a tiny model of a family with some settings changed."""

    def make(family, **changes):
        old = AutoConfig.from_pretrained(model_folder(family))
        kept = {k: v for k, v in old.to_dict().items() if k != "layer_types"}
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(type(old)(**kept | changes))
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1)
        folder = tmp_path / "variant"
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_plain_folders(family, dtype, model_folder):
    assert_same_logits(model_folder(family, dtype))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", WINDOW),
        ("qwen2", QWEN_WINDOW | {"max_window_layers": 1}),
        ("qwen3", QWEN_WINDOW | {"max_window_layers": 0}),
        ("qwen3", QWEN_WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen2", {"max_window_layers": 0}),  # windows switched off
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen3", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
        ("mistral", {"rope_parameters": YARN}),
        ("qwen2", {"rope_parameters": YARN | {"attention_factor": 0.7}}),
        ("llama", {"rope_parameters": LINEAR}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"num_key_value_heads": 6}),
        ("mistral", {"num_key_value_heads": 1, "head_dim": 24}),
        ("llama", {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4}),
    ],
)
def test_switches(family, changes, variant):
    assert_same_logits(variant(family, **changes))


def test_windows_are_felt(variant):
    """The windows of the test above are shorter than its sequence, so they change logits."""
    folder = variant("mistral", **WINDOW)
    weights = load_weights(ModelSource("windowed", folder))
    assert [layer.window for layer in weights.layers] == [21, 21]
    short = decode(weights, TOKENS[:20], (20,))
    torch.testing.assert_close(short, decode(weights)[:20], rtol=0, atol=1e-4)
    plain = load_weights(ModelSource("plain", variant("mistral", sliding_window=None)))
    assert (decode(plain) - decode(weights))[21:].abs().max() > 0.1


def quantize(folder, out, **settings):
    stage = {"method": "rtn", "group_size": 16, **settings}
    run_recipe(build_recipe({"model": str(folder), "out": out, "stages": [stage]}))
    return out


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_quantized_folders(family, symmetric, format_name, model_folder, tmp_path):
    folder = model_folder(family, torch.bfloat16)
    assert_same_logits(quantize(folder, tmp_path / "out", symmetric=symmetric, format=format_name))


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 8, "group_size": "channel"},
        {"bits": 3, "group_size": 48},
        {"bits": 2, "overrides": {"v_proj": {"bits": 8, "group_size": 8, "symmetric": False}}},
        {"ignore": ["v_proj", "re:.*layers.1.*"]},
    ],
)
def test_grids(settings, model_folder, tmp_path):
    assert_same_logits(quantize(model_folder("qwen3", torch.float16), tmp_path / "out", **settings))


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_exported_folders(family, model_folder, tmp_path):
    start = quantize(model_folder(family, torch.float16), tmp_path / "start")
    for format_name in ("gptq", "awq"):
        export_model(str(start), format_name, tmp_path / format_name)
        assert_same_logits(tmp_path / format_name)
