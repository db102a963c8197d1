"""One batch, from its prompts to its last token: prefill, and then decode, each timed by itself.

Prefill ends when every sequence has its first token.  Decode are the steps after that, in which
every sequence gets one.  Both include the scheduler and the sampler: what a user waits for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.bench.bandwidth import copy_bandwidth, read_bandwidth
from compress.bench.peers import Peer
from compress.bench.percentiles import percentile
from compress.bench.subject import Subject, memory_bytes
from compress.core.errors import InputError
from compress.core.progress import track
from compress.roofline import ideal_step
from compress.runtime.engine import Engine
from compress.runtime.loading import MOST_TOKENS
from compress.runtime.sampling_params import SamplingParams

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Shape:
    """A batch: `new_tokens`, 2 or more, include the first, which prefill gives."""

    prompt_tokens: int
    new_tokens: int
    batch: int = 1

    @property
    def mixed_steps(self) -> int:
        """Most steps in which some of the batch decode while others' prompts are computed.

        A CPU's; a GPU takes fewer.
        """
        if self.batch == 1:
            return 0
        return -(-self.batch * self.prompt_tokens // (MOST_TOKENS["cpu"] - self.batch)) + 1

    @property
    def cached_tokens(self) -> int:
        """Tokens of the sequence that gets most: the first, which decodes in every mixed step."""
        return self.prompt_tokens + self.new_tokens + self.mixed_steps

    @property
    def mean_context(self) -> float:
        """Tokens that a decode step reads of a sequence, on average."""
        return self.prompt_tokens + self.new_tokens / 2


@dataclass(frozen=True)
class Run:
    """Seconds: to each sequence's first token, of prefill, of each decode step; and new tokens."""

    firsts: list[float]
    prefill: float
    steps: list[float]
    tokens: int

    def decode_rate(self, shape: Shape) -> float:
        """New tokens/s of the whole batch, once all of it decodes."""
        return shape.batch * len(self.steps) / sum(self.steps)

    def prefill_rate(self, shape: Shape) -> float:
        """Tokens/s of the prompts."""
        return shape.batch * shape.prompt_tokens / self.prefill

    @property
    def rate(self) -> float:
        """New tokens/s of all of it, prompts included."""
        return self.tokens / (self.prefill + sum(self.steps))


def measure_latency(
    subject: Subject, shape: Shape, repeats: int, peer: Peer | None = None
) -> dict[str, Any]:
    """Measure a batch, in turn with a peer if there is one; returns the report.

    Raises InputError when the batch does not fit in the model's context.
    """
    prompts = subject.prompts([shape.prompt_tokens] * shape.batch)
    engine = engine_for(subject, shape)
    short = Shape(shape.prompt_tokens, min(WARM_UP_TOKENS, shape.new_tokens), shape.batch)
    run_once(engine, prompts, short)
    if peer is not None:
        peer.run(prompts[0], short.new_tokens)
    ours, theirs = [], []
    for _ in track(range(repeats), "Measuring"):  # in turn: the machine's drift hits both
        ours.append(run_once(engine, prompts, shape))
        if peer is not None:
            prefill, steps = peer.run(prompts[0], shape.new_tokens)
            theirs.append(Run([prefill], prefill, steps, 1 + len(steps)))
    report = {**subject.facts, **vars(shape), "repeats": repeats, **_rates(ours, shape)}
    report |= _times(ours) | _traffic(subject, shape, report["decode_tokens_per_s"])
    report["memory_bytes"] = memory_bytes()
    if peer is not None:
        report["peer"] = peer.facts | _rates(theirs, shape) | _times(theirs)
        for part in ("decode", "prefill"):
            for end in ("", "_best"):
                key = f"{part}_tokens_per_s{end}"
                report[f"{part}_ratio{end}"] = round(report[key] / report["peer"][key], 3)
    return report


def check(subject: Subject, shape: Shape) -> None:
    """Raise InputError for a batch that cannot be measured."""
    subject.check(shape.batch, shape.cached_tokens)


def engine_for(subject: Subject, shape: Shape) -> Engine:
    """An engine that holds the batch."""
    return subject.engine(shape.batch, shape.cached_tokens)


def run_once(engine: Engine, prompts: Sequence[list[int]], shape: Shape) -> Run:
    """Answer the prompts together, greedily and past any end, and time every step.

    Raises InputError for a model whose logits are NaN.
    """
    limit = shape.new_tokens + shape.mixed_steps
    params = SamplingParams(max_tokens=limit, temperature=0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    firsts: dict[str, float] = {}
    steps: list[float] = []
    prefill, tokens = 0.0, 0
    began = last = time.perf_counter()
    while len(steps) < shape.new_tokens - 1:
        increments = engine.step()
        now = time.perf_counter()
        if prefill:
            steps.append(now - last)
        last = now
        tokens += len(increments)
        for increment in increments:
            if increment.error:
                raise InputError(f"the model cannot be timed: {increment.error}")
            firsts.setdefault(increment.request_id, now - began)
        if not prefill and len(firsts) == len(prompts):
            prefill = now - began
    for number in range(len(prompts)):
        engine.abort(str(number))
    engine.step()  # takes what the aborted have to say
    return Run(list(firsts.values()), prefill, steps, tokens)


def _rates(runs: list[Run], shape: Shape) -> dict[str, float]:
    """Tokens/s, the median of the runs and the best."""
    decode = [run.decode_rate(shape) for run in runs]
    prefill = [run.prefill_rate(shape) for run in runs]
    return {
        "decode_tokens_per_s": round(statistics.median(decode), 2),
        "decode_tokens_per_s_best": round(max(decode), 2),
        "prefill_tokens_per_s": round(statistics.median(prefill), 2),
        "prefill_tokens_per_s_best": round(max(prefill), 2),
    }


def _times(runs: list[Run]) -> dict[str, Any]:
    """Time to the first token, and between tokens, over the steps of all runs."""
    steps = [seconds * 1000 for run in runs for seconds in run.steps]
    return {
        "time_to_first_token_s": round(
            statistics.median(first for run in runs for first in run.firsts), 5
        ),
        "inter_token_ms": {
            "median": round(statistics.median(steps), 4),
            "p90": round(percentile(steps, 90), 4),
            "p99": round(percentile(steps, 99), 4),
        },
    }


def _traffic(subject: Subject, shape: Shape, decode_rate: float) -> dict[str, Any]:
    """Bytes that a decode step reads, by the second, beside what this machine's memory gives, and
    the rate that would be if it gave all of that: the roofline of `compress.roofline`.
    """
    decoder = subject.decoder
    cached = round(shape.batch * decoder.kv_bytes_read(shape.mean_context))
    read = read_bandwidth(decoder.weight_bytes + cached)
    roof = ideal_step(decoder.weight_bytes, cached, read, shape.batch)
    return {
        "kv_bytes_per_step": cached,
        "bytes_per_step": round(roof.bytes),
        "bytes_per_s": round(roof.bytes * decode_rate / shape.batch),
        "read_bytes_per_s": round(read),
        "copy_bytes_per_s": round(copy_bandwidth()),
        "roofline_tokens_per_s": round(roof.tokens_per_s, 2),
        "share_of_read": round(decode_rate / roof.tokens_per_s, 3),
    }
