"""A server under load, as its clients see it: latencies, throughput and goodput.

Requests arrive by themselves at a rate, whether or not earlier ones are answered, or a number of
clients each send the next one when they have an answer.  No request is sent twice.  For an answer
of N tokens:

    TTFT  from sending to the first event with text
    TPOT  (E2E - TTFT) / (N - 1)
    ITL   between one event with text and the next.  An event may bring several tokens, as from a
          server that drafts: `tokens_per_event`.  Where each says how many, they share its time
    E2E   from sending to the event with the finish reason

Goodput is the number of requests a second that met every objective (DistServe, arXiv:2401.09670).
N is the server's own count.  The names of results are those of vLLM's benchmark.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Any

from compress.bench.client import Answer, Server, ask
from compress.bench.percentiles import percentile
from compress.bench.prompts import Prompt
from compress.core.errors import InputError, shown
from compress.core.progress import say

Send = Callable[[Prompt, float], Coroutine[Any, Any, Answer]]


@dataclass(frozen=True)
class Load:
    """Requests a second (infinite: all at once), or how many clients send one after another."""

    request_rate: float = math.inf
    concurrency: int | None = None

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} at a time"
        return "all at once" if self.request_rate == math.inf else f"{self.request_rate:g}/s"


@dataclass(frozen=True)
class Objective:
    """What a good answer keeps to, in milliseconds; None asks for nothing."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read "ttft:500,tpot:50".  Raises InputError."""
        names = [entry.name for entry in fields(cls)]
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, limit = part.strip().partition(":")
            try:
                limits[name] = float(limit)
            except ValueError:
                limits[name] = math.nan
            if name not in names or not 0 < limits[name] < math.inf:
                raise InputError(
                    f"objective {shown(part)}; give milliseconds of {', '.join(names)}, such as "
                    "ttft:500,tpot:50"
                )
        return cls(**limits)

    def met(self, answer: Answer) -> bool:
        """Whether there is an answer and it keeps to all of it; one token has no TPOT."""
        found = {"ttft": answer.ttft, "tpot": answer.tpot or 0.0, "e2e": answer.e2e}
        limits = [(found[name], limit) for name, limit in vars(self).items() if limit is not None]
        return answer.error is None and all(1000 * seconds <= limit for seconds, limit in limits)


async def measure_serving(
    server: Server,
    prompts: Iterator[Prompt],
    settings: dict[str, Any],
    loads: Sequence[Load],
    count: int,
    objective: Objective,
    seed: int,
    warmup: int,
) -> list[dict[str, Any]]:
    """`count` requests under each load in turn; a report for each.

    `settings` go into every request that brings none of its own.  Raises InputError when the
    warm-up fails, or when no request of an only load is answered.
    """
    reports = []
    async with server.session() as client:

        async def send(prompt: Prompt, due: float) -> Answer:
            return await ask(client, server, settings | prompt.body(server.endpoint), due)

        for prompt in itertools.islice(prompts, warmup):
            _check([await send(prompt, perf_counter())])
        for load in loads:
            answers = await run_load(send, list(itertools.islice(prompts, count)), load, seed)
            if len(loads) == 1:
                _check(answers)
            report = summary(answers, load, objective)
            say(
                f"{load}: {report['completed']} of {count} answered in {report['duration']:.1f} s, "
                f"{report['output_throughput']:.1f} tokens/s"
            )
            reports.append(report | {"requests": [record(answer, answers) for answer in answers]})
    return reports


def _check(answers: list[Answer]) -> None:
    """Raise InputError when there is no answer at all."""
    if all(answer.error for answer in answers):
        first = answers[0]
        raise InputError(
            f"none of {len(answers)} requests was answered; the first: {first.error}: "
            f"{first.message}; check --url, --model and --api-key"
        )


async def run_load(send: Send, prompts: list[Prompt], load: Load, seed: int) -> list[Answer]:
    """Send all prompts under a load; answers in the order of the prompts."""
    if load.concurrency is None:
        return await _by_rate(send, prompts, arrivals(len(prompts), load.request_rate, seed))
    return await _by_clients(send, prompts, load.concurrency)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds of arrival of a Poisson process that has `count` arrivals in `count` / `rate` s.

    Given their number, a Poisson process's arrivals are independent and evenly distributed: so
    the rate is exact however few they are, and other rates have the same pattern, scaled.
    """
    draw = random.Random(seed)
    return sorted(draw.random() * count / rate for _ in range(count))


async def _by_rate(send: Send, prompts: list[Prompt], times: list[float]) -> list[Answer]:
    began = perf_counter()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for prompt, at in zip(prompts, times, strict=True):
            await asyncio.sleep(began + at - perf_counter())
            tasks.append(group.create_task(send(prompt, began + at)))
    return [task.result() for task in tasks]


async def _by_clients(send: Send, prompts: list[Prompt], clients: int) -> list[Answer]:
    waiting = iter(enumerate(prompts))
    answers: dict[int, Answer] = {}

    async def work() -> None:
        for number, prompt in waiting:
            answers[number] = await send(prompt, perf_counter())

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(work())
    return [answers[number] for number in range(len(prompts))]


def summary(answers: list[Answer], load: Load, objective: Objective) -> dict[str, Any]:
    """Statistics of the answers to one load: milliseconds, seconds, and counts a second."""
    done = [answer for answer in answers if answer.error is None]
    failed = [answer for answer in answers if answer.error is not None]
    duration = max(one.ended for one in answers) - min(one.sent for one in answers)
    prompt_tokens = sum(answer.prompt_tokens or 0 for answer in done)
    output_tokens = sum(answer.tokens for answer in done)
    events = sum(len(answer.texts) for answer in done)
    good = sum(objective.met(answer) for answer in done)
    by_rate = load.concurrency is None
    report: dict[str, Any] = {
        "request_rate": load.request_rate if by_rate and load.request_rate < math.inf else None,
        "max_concurrency": load.concurrency,
        "duration": round(duration, 4),
        "completed": len(done),
        "failed": len(failed),
        "errors": dict(Counter(str(answer.error) for answer in failed)),
        "error_messages": {str(answer.error): answer.message for answer in reversed(failed)},
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "tokens_counted_by": _counted_by(done),
        "tokens_per_event": round(output_tokens / events, 4) if events else None,
        "request_throughput": round(len(done) / duration, 4),
        "output_throughput": round(output_tokens / duration, 3),
        "total_token_throughput": round((prompt_tokens + output_tokens) / duration, 3),
        "request_goodput": round(good / duration, 4),
        "good": good,
    }
    report |= _times("ttft", [answer.ttft for answer in done])
    report |= _times("tpot", [answer.tpot for answer in done if answer.tpot is not None])
    report |= _times("itl", [gap for answer in done for gap in answer.gaps])
    report |= _times("e2e", [answer.e2e for answer in done])
    # what the client itself was late by: large where it, not the server, was short of time
    report |= _times("late", [answer.sent - answer.due for answer in answers])
    return report


def _counted_by(done: list[Answer]) -> str:
    counted = all(answer.output_tokens is not None for answer in done)
    return "the server" if counted else "events with text"


def _times(name: str, seconds: list[float]) -> dict[str, float | None]:
    """Milliseconds; None where nothing was measured."""
    found: dict[str, float | None] = dict.fromkeys(("mean", "median", "p90", "p99"))
    if seconds:
        found["mean"] = statistics.fmean(seconds)
        found["median"] = statistics.median(seconds)
        found |= {f"p{percent}": percentile(seconds, percent) for percent in (90, 99)}
    return {
        f"{kind}_{name}_ms": None if value is None else round(1000 * value, 4)
        for kind, value in found.items()
    }


def record(answer: Answer, answers: list[Answer]) -> dict[str, Any]:
    """One request, for the file of results; seconds since the first was sent."""
    began = min(one.sent for one in answers)
    return {
        "sent": round(answer.sent - began, 6),
        "ttft": None if answer.error else round(answer.ttft, 6),
        "e2e": round(answer.e2e, 6),
        "itl": [round(gap, 6) for gap in answer.gaps],
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.tokens,
        "error": answer.error,
        "message": answer.message,
    }
