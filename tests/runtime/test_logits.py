"""The decoder gives transformers' logits, in prefill and decode, for every family and format.

In float32 both do the same arithmetic in another order (fused projections, attention by blocks).
Logits here have a spread of 1 to 20; sums of up to 80 terms in two layers leave some 1e-6 of that,
and 2e-5 of the largest is allowed.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.core.source import ModelSource
from compress.export import export_model
from compress.kernels.program.build import reason_against
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.recipe import build_recipe
from compress.runtime.batch import Batch
from compress.runtime.loading import make_decoder
from compress.runtime.weights import load_weights

SHARING = ["llama_cla", "qwen2_cla", "qwen3_cla", "mistral_cla"]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "cwm", "deepseek_v3", "youtu", *SHARING]
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
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [0.3, 1.7, 40.0, 2.0],
    "long_factor": [0.3, 1.7, 40.0, 2.0],
    "attention_factor": 1.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
WINDOW = {"sliding_window": 21}
QWEN_WINDOW = {**WINDOW, "use_sliding_window": True}


@pytest.fixture(params=["program", "PyTorch"], autouse=True)
def operations(request, monkeypatch):
    """Both ways of computing: the recorded program where it can run, and PyTorch's operations."""
    if request.param == "PyTorch":
        monkeypatch.setenv("COMPRESS_CPU_KERNELS", "torch")
    elif reason := reason_against():
        pytest.skip(reason)
    return request.param


def decode(folder, chunks=CHUNKS, dtype=torch.float32):
    """Logits [T, V] of one sequence, in chunks, on a paged cache of blocks that lie anywhere."""
    weights = load_weights(ModelSource(str(folder), folder))
    decoder = make_decoder(weights, torch.device("cpu"), dtype, most_tokens=40)
    groups = len(decoder.layout.windows)
    decoder.allocate(groups * BLOCKS)
    blocks = torch.randperm(groups * BLOCKS, generator=torch.Generator().manual_seed(0))
    blocks = blocks.view(groups, BLOCKS)
    logits, done = [], 0
    for count in chunks:
        positions = torch.arange(done, done + count)
        done += count
        batch = Batch(
            tokens=TOKENS[positions],
            positions=positions,
            slots=blocks[:, positions // BLOCK] * BLOCK + positions % BLOCK,
            starts=torch.tensor([0, count], dtype=torch.int32),
            contexts=torch.tensor([done], dtype=torch.int32),
            block_tables=blocks[:, None].int(),
            rows=torch.arange(count),
        )
        logits.append(decoder.forward(batch))
    return torch.cat(logits)


def assert_same_logits(folder, model=None):
    model = model or load_model(folder, "float32", torch.device("cpu"))
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0]
    found = decode(folder)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def turned(dims):
    """Attention on latents with so many turned dimensions, which config.json says twice."""
    return {"qk_rope_head_dim": dims, "head_dim": dims}


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
        with torch.no_grad():  # transformers makes this row zero whenever it loads a Youtu
            model.get_input_embeddings().weight[old.pad_token_id] = 0
        folder = tmp_path / "variant"
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_folders(family, dtype, model_folder):
    assert_same_logits(model_folder(family, dtype))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", WINDOW),
        ("mistral_cla", WINDOW),
        ("llama_cla", {"num_hidden_layers": 5}),
        ("qwen3_cla", {"num_hidden_layers": 4, "kv_share": 3}),
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
        ("llama", {"rope_parameters": LONGROPE}),
        ("deepseek_v3", {"rope_interleave": False, "tie_word_embeddings": True}),
        ("deepseek_v3", {"rope_interleave": False, "rope_parameters": LONGROPE}),
        ("deepseek_v3", {"q_lora_rank": 24, "attention_bias": True}),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
        ("deepseek_v3", {"rope_parameters": LLAMA3, "attention_bias": True}),
        ("deepseek_v3", {"kv_lora_rank": 128, "v_head_dim": 64, **turned(32)}),
        ("deepseek_v3", {"kv_lora_rank": 5, "qk_nope_head_dim": 7, "v_head_dim": 7}),
        ("youtu", {"q_lora_rank": None, "rope_interleave": False, "rope_parameters": LINEAR}),
        ("youtu", {"num_attention_heads": 1, "num_key_value_heads": 1, **turned(2)}),
    ],
)
def test_switches(family, changes, variant):
    assert_same_logits(variant(family, **changes))


def test_windows_are_felt(variant):
    """The windows of the test above are shorter than its sequence, so they change logits."""
    folder = variant("mistral", **WINDOW)
    windowed = decode(folder)
    torch.testing.assert_close(decode(folder, (20,)), windowed[:20], rtol=0, atol=1e-4)
    plain = decode(variant("mistral", sliding_window=None))
    assert (plain - windowed)[21:].abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family, model_folder):
    """bfloat16 rounds activations, whatever the order of sums.  transformers' own bfloat16 is that
    far from its float32; ours may be no further (times 1.5, since these are single maxima)."""
    folder = model_folder(family, torch.bfloat16)
    cpu = torch.device("cpu")
    with torch.no_grad():
        exact, rounded = (
            load_model(folder, dtype, cpu)(TOKENS[None]).logits[0].float()
            for dtype in ("float32", "bfloat16")
        )
    theirs = (rounded - exact).square().mean().sqrt()
    ours = (decode(folder, dtype=torch.bfloat16) - exact).square().mean().sqrt()
    assert 0 < ours < 1.5 * theirs


def test_a_token_has_the_same_bits_in_any_chunk(operations, model_folder):
    """What the program promises; PyTorch's products depend on the number of rows."""
    if operations == "PyTorch":
        pytest.skip("not promised")
    for dtype in (torch.bfloat16, torch.float32):
        expected = decode(model_folder("qwen3"), dtype=dtype)
        for chunks in ((1,) * 100, (40, 40, 20), (3, 16, 17, 31, 33)):
            assert torch.equal(decode(model_folder("qwen3"), chunks, dtype), expected), chunks


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
