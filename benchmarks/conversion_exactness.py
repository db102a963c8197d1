"""Conversions that ought to change nothing, on real models: how far do the logits go, in Markdown.

    python benchmarks/conversion_exactness.py WORK_FOLDER --calibration c4.txt --out FILE.md \\
        smollm2 build/stories260K

A model is first given more KV heads than it has: copies of each, their keys turned and scaled pair
by pair, their values rotated, queries and outputs undoing it, and all of them shuffled.  That
computes the same function.  `compress convert --to gqa` must find the copies, undo what was done
and come back to as many heads as there were.  `--to mla` with a latent of all values and RoPE on
all channels of keys has nothing to leave out.

Weights are stored in float32, and the logits are transformers', in float32 and in float64: in
float32 the order of sums alone changes them, which the first row of a model shows
(benchmarks/llama2c.py makes folders of llama2.c files).
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scored import compress
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.core.source import resolve_model
from compress.prune.attention import AttentionWeights, Pairs
from compress.prune.parts import parts_of

DTYPES = (torch.float32, torch.float64)
TOKENS = (4, 128)  # sequences and their length, drawn at random
CALIBRATION = ("--samples", "16", "--seq-len", "256", "--compute-dtype", "float32")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("models", nargs="+", help="ids, folders or aliases")
    parser.add_argument("--calibration", default="self", help="a text file, or self")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row for model in options.models for row in measured(model, options)]
    text = page(rows)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text)


def measured(ref: str, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row for each thing that is done to a model."""
    source, name = resolve_model(ref), Path(ref).name
    original = options.work / f"{name}-float32"
    shutil.rmtree(original, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    model.save_pretrained(original)
    expected = {dtype: logits_of(original, dtype) for dtype in DTYPES}
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    more = next(k for k in range(kv_heads + 1, heads + 1) if heads % k == 0 and k % kv_heads == 0)
    expanded = options.work / f"{name}-{more}-heads"
    expand(model, more, expanded)
    for path in source.folder.glob("*token*"):
        shutil.copy(path, expanded)
    converted = options.work / f"{name}-back"
    latents = options.work / f"{name}-latents"
    width = str(kv_heads * model.model.layers[0].self_attn.head_dim)
    for path in source.folder.glob("*token*"):
        shutil.copy(path, original)
    for start, asked, made in (
        (expanded, ("gqa", "--kv-heads", str(kv_heads)), converted),
        (original, ("mla", "--kv-rank", width, "--rope-dim", width), latents),
    ):
        data = ("--calibration", options.calibration, *CALIBRATION)
        target = ("--dtype", "float32", "--out", str(made), "--overwrite")
        compress("convert", str(start), "--to", *asked, *data, *target)
    rounding = (expected[torch.float32] - expected[torch.float64]).abs().max()
    largest = f"{expected[torch.float64].abs().max():.0f}"
    rows = [(name, "nothing; float32 against float64", f"{rounding:.1e}", "0", largest)]
    for folder, what in (
        (expanded, f"{kv_heads} KV heads made {more}, turned, rotated, shuffled"),
        (converted, f"these {more} merged to {kv_heads}"),
        (latents, f"latents of {width} and keys of {width}"),
    ):
        single, double = (
            f"{(logits_of(folder, dtype) - expected[dtype]).abs().max():.1e}" for dtype in DTYPES
        )
        rows.append((name, what, single, double, largest))
    print(*rows, sep="\n", file=sys.stderr)
    return rows


@torch.no_grad()
def expand(model: PreTrainedModel, kv_heads: int, out: Path) -> None:
    """Write a model with more KV heads that computes what `model` does."""
    generator = torch.Generator().manual_seed(0)
    head_dim = model.model.layers[0].self_attn.head_dim
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index, block in enumerate(model.model.layers):
        parts = parts_of(block, str(out))
        weights = AttentionWeights.of(block, parts, head_dim)
        many(weights, kv_heads, generator)
        for name, tensor in weights.tensors(parts).items():
            tensors[f"model.layers.{index}.{name}"] = tensor
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    entries: dict[str, Any] = model.config.to_dict() | {"num_key_value_heads": kv_heads}
    config = AutoConfig.for_model(**entries)
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def many(weights: AttentionWeights, kv_heads: int, generator: torch.Generator) -> None:
    """Put `kv_heads` heads of keys and values in the place of fewer, in place."""
    before, head_dim = weights.k.shape[:2]
    copies = kv_heads // before
    half = head_dim // 2
    pairs = Pairs(torch.arange(half), torch.arange(half, head_dim))  # as transformers' Llama has it
    size = (kv_heads, half, 1)
    angle = torch.rand(size, generator=generator, dtype=torch.float64) * 2 * torch.pi
    size_of = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    factor = torch.polar(size_of, angle)
    noise = torch.randn(kv_heads, head_dim, head_dim, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(noise)[0]
    order = torch.randperm(kv_heads, generator=generator)

    def by_head(heads: Tensor) -> Tensor:
        return heads.unflatten(0, (kv_heads, -1))  # [K', N / K', ...]

    keys = pairs.to_complex(weights.k.repeat_interleave(copies, 0)) * factor
    queries = pairs.to_complex(by_head(weights.q)) / factor[:, None].conj()
    weights.k = pairs.to_real(keys)[order]
    weights.q = pairs.to_real(queries)[order].flatten(0, 1)
    weights.v = (rotation @ weights.v.repeat_interleave(copies, 0))[order]
    weights.o = (by_head(weights.o) @ rotation[:, None].mT)[order].flatten(0, 1)


@torch.inference_mode()
def logits_of(folder: Path, dtype: torch.dtype) -> Tensor:
    """Transformers' logits on random tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, TOKENS, generator=generator)
    return model(tokens).logits


def page(rows: list[tuple[str, ...]]) -> str:
    """The record."""
    lines = [
        "# Conversions that ought to change nothing",
        "",
        f"Logits of transformers on {TOKENS[0]} sequences of {TOKENS[1]} random tokens: the "
        "largest change in float32 and in float64, and the largest logit. Weights are stored in "
        "float32.",
        "",
        "| model | what was done | float32 | float64 | largest logit |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
