"""A random-weight model in the shape of Llama-3-8B, end to end: engine, scheduler, graphs, draws.

Decode is the time of whole steps on the host's clock, while one step is launched ahead of the last:
what a user waits for.  The roofline is the time to read all weights, and keys and values of the
mean context, at the measured copy bandwidth.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import compress.kernels.launched
from compress.runtime.engine import Engine
from compress.runtime.loading import make_decoder
from compress.runtime.sampling_params import SamplingParams
from gpu.place import Place
from gpu.weights import decoder_weights, shape_of

Pack = Callable[..., Any]


def measure(
    place: Place, batches: tuple[int, ...], pack: Pack | None = None, prefill: bool = True
) -> dict[str, Any]:
    """Milliseconds a step at each batch size, and tokens/s of prompts; W4 in groups of 128.

    `pack` lays weights out for other kernels in the linears: it stands in for `pack_for_triton`.
    """
    context, new, prompt, chunk = 512, 128, 2048, 2048
    if place.stand_in:
        context, new, prompt, chunk, batches = 18, 4, 24, 16, (1, 2)
    module: Any = compress.kernels.launched
    kept = module.pack_for_triton
    if pack is not None:
        module.pack_for_triton = pack
    try:
        weights = decoder_weights(shape_of(place), 4, 128, place)
        decoder = make_decoder(weights, place.device, place.dtype, most_tokens=max(chunk, 512))
    finally:
        module.pack_for_triton = kept
    found: dict[str, Any] = {
        "kernels": decoder.description,
        "weight_bytes": decoder.weight_bytes,
        "context": context,
        "decode": [],
    }
    for batch in batches:
        half = new // 2  # prompts are that much shorter, so that `context` is the mean
        engine = _engine(decoder, batch, context + new, chunk)
        taken = _decode(engine, batch, context - half, new, decoder.vocab_size)
        cached = batch * decoder.kv_bytes_read(context)
        row = {"batch": batch, "seconds": taken, "bytes": decoder.weight_bytes + cached}
        found["decode"].append(row)
    if prefill:
        engine = _engine(decoder, 4, prompt + 1, chunk)
        found["prefill_tokens_per_s"] = _prefill(engine, 4, prompt, decoder.vocab_size)
    return found


def _engine(decoder: Any, batch: int, context: int, chunk: int) -> Engine:
    blocks = batch * (-(-context // decoder.block_size) + 1)
    # a sequence may grow to the model's whole context, as when serving: attention is split for that
    blocks = max(blocks, decoder.max_context // decoder.block_size)
    return Engine(
        decoder, blocks, max_tokens_per_step=chunk, max_sequences=batch, prefix_caching=False
    )


def _decode(engine: Engine, batch: int, prompt: int, new: int, vocabulary: int) -> float:
    """Median seconds of a step in which the whole batch decodes."""
    _add(engine, batch, prompt, new + batch, vocabulary)
    started: set[str] = set()
    while len(started) < batch:
        started |= {increment.request_id for increment in engine.step()}
    for _ in range(2):
        engine.step()
    # the host waits for one step in each, so a run of steps is their sum
    ends = [time.perf_counter()]
    for _ in range(max(2, new - 8)):
        engine.step()
        ends.append(time.perf_counter())
    _drop(engine, batch)
    return statistics.median(after - before for before, after in itertools.pairwise(ends))


def _prefill(engine: Engine, batch: int, prompt: int, vocabulary: int) -> float:
    """Tokens/s of prompts, the second time: kernels are compiled in the first."""
    taken = 0.0
    for _ in range(2):
        _add(engine, batch, prompt, 1, vocabulary)
        began = time.perf_counter()
        while engine.requests:
            engine.step()
        taken = time.perf_counter() - began
        _drop(engine, 0)
    return batch * prompt / taken


def _add(engine: Engine, batch: int, prompt: int, new: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(0, vocabulary, (batch, prompt), generator=generator).tolist()
    params = SamplingParams(max_tokens=new, temperature=1.0, seed=0, ignore_eos=True)
    for number in range(batch):
        engine.add_request(str(number), tokens[number], params)


def _drop(engine: Engine, batch: int) -> None:
    """End what runs, and take what is still to come."""
    for number in range(batch):
        engine.abort(str(number))
    while engine.has_work():
        engine.step()
