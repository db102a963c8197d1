"""Steps of a model with attention on latents beside those of one with grouped queries, on a CPU.

    python benchmarks/latent_steps.py --threads 1 --contexts 64,2048,8192

Both are random, of SmolLM2-135M's shape: 9 heads on 3 KV heads of 64 dimensions, 384 numbers a
token and layer, against latents of 128 numbers and a key of 32.  Times are a process's CPU time for
a step of one token, and of a chunk of 512, on a cache filled with one number; the two models take
turns, so that the machine's drift hits both.  With one thread CPU time says what a step takes even
where other processes run.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from compress.core.source import ModelSource
from compress.kernels.paged_attention.cache import tensors_of
from compress.runtime.batch import Batch
from compress.runtime.decoder import Decoder
from compress.runtime.loading import MOST_TOKENS, load_decoder

SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 9,
    "kv_lora_rank": 128,
    "q_lora_rank": None,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "first_k_dense_replace": 30,
}
CHUNK = MOST_TOKENS["cpu"]


@click.command()
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--contexts", default="64,2048,8192", show_default=True, help="With commas.")
@click.option("--kv-cache-dtype", default="auto", show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=12, show_default=True)
def main(threads: int, contexts: str, kv_cache_dtype: str, repeat: int) -> None:
    """Print one JSON object: median and least CPU milliseconds of a step, by model and context."""
    torch.set_num_threads(threads)
    sizes = [int(context) for context in contexts.split(",")]
    decoders = {
        "grouped": decoder_of(LlamaConfig(**SIZES, num_key_value_heads=3), kv_cache_dtype),
        "latent": decoder_of(DeepseekV3Config(**SIZES, **LATENT), kv_cache_dtype),
    }
    for decoder in decoders.values():
        fill(decoder, -(-max(sizes) // decoder.block_size))
    report: dict[str, Any] = {"threads": threads, "kv_cache_dtype": kv_cache_dtype}
    report["cache_bytes_per_token"] = {
        name: decoder.bytes_per_block // decoder.block_size for name, decoder in decoders.items()
    }
    for context in sizes:
        for new in (1, CHUNK):
            if new <= context:
                times = milliseconds(decoders, batch_of(context, new), repeat if new == 1 else 2)
                report[f"{new} of {context}"] = times
    click.echo(json.dumps(report, indent=2))


def decoder_of(config: Any, kv_cache_dtype: str) -> Decoder:
    """A random model in bfloat16, as the runtime computes it here."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
        source = ModelSource(folder, Path(folder))
        return load_decoder(source, torch.device("cpu"), "bfloat16", kv_cache_dtype=kv_cache_dtype)


def fill(decoder: Decoder, blocks: int) -> None:
    """A cache with a number everywhere, and in memory of its own."""
    decoder.allocate(blocks)
    for tensor in (t for layer in decoder._cache for part in layer for t in tensors_of(part)):
        tensor.view(torch.int8).fill_(1) if tensor.dtype.itemsize == 1 else tensor.fill_(0.05)


def batch_of(context: int, new: int) -> Batch:
    """The last `new` tokens of one sequence."""
    places = torch.arange(context - new, context)
    return Batch(
        tokens=torch.randint(0, SIZES["vocab_size"], (new,)),
        positions=places,
        slots=places,
        starts=torch.tensor([0, new], dtype=torch.int32),
        contexts=torch.tensor([context], dtype=torch.int32),
        block_tables=torch.arange(-(-context // 16), dtype=torch.int32)[None],
        rows=torch.tensor([new - 1]),
    )


def milliseconds(decoders: dict[str, Decoder], batch: Batch, repeat: int) -> dict[str, list[float]]:
    """Of each model: the median and the least of `repeat` steps."""
    found: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(repeat + 1):
        for name, decoder in decoders.items():
            started = time.process_time()
            decoder.forward(batch)
            if turn:  # the first warms up
                found[name].append(1000 * (time.process_time() - started))
    return {
        name: [round(statistics.median(times), 1), round(min(times), 1)]
        for name, times in found.items()
    }


if __name__ == "__main__":
    main()
