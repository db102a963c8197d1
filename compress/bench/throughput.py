"""Many requests: speed by batch size, and the two arguments for how a server holds them.

**Continuous against static batching.**  Static: a batch begins when the one before has ended, and
lasts as long as its longest request.  Continuous: a slot that is free goes to the next request, at
the next step.  Both run here on the same engine, so a static batch does not even pay for the slots
whose request has ended: on hardware that pads, it would.

**Paged against contiguous memory.**  Contiguous: a request reserves room for as long as it could
get.  Paged: a block at a time.  Waste is the share of reserved room that holds no token, summed
over the steps of the continuous run; blocks are counted in the block tables.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from compress.bench.latency import Shape, engine_for, percentile, run_once
from compress.bench.subject import Subject, memory_bytes
from compress.bench.workload import Job, Workload
from compress.core.errors import InputError
from compress.core.progress import track
from compress.runtime.engine import Engine
from compress.runtime.sampling_params import SamplingParams

POLICIES = ("static", "continuous")


@dataclass
class Replay:
    """What a workload took: latencies are seconds from arrival to the last token."""

    seconds: float = 0.0
    steps: int = 0
    busy: int = 0  # slots that held a request, summed over steps
    latencies: list[float] = field(default_factory=list)
    held: int = 0  # tokens in the cache, summed over steps
    reserved: Counter[str] = field(default_factory=Counter)  # room for tokens, by policy, likewise


def measure_throughput(
    subject: Subject, shape: Shape, batches: list[int], workload: Workload, repeats: int
) -> dict[str, Any]:
    """Measure batches of one shape, then the workload in as many slots as the largest has."""
    slots = max(batches)
    longest = max(job.prompt_tokens + job.new_tokens for job in workload.jobs)
    subject.check(slots, longest)
    report = {**subject.facts, "prompt_tokens": shape.prompt_tokens}
    report |= {"new_tokens": shape.new_tokens, "repeats": repeats}
    report["batches"] = _by_batch(subject, shape, batches, repeats)
    report |= {"requests": len(workload.jobs), "lengths": workload.lengths, "slots": slots}
    runs: dict[str, list[Replay]] = {policy: [] for policy in POLICIES}
    turns = [policy for _ in range(repeats) for policy in POLICIES]
    for policy in track(turns, "Replaying"):
        engine = subject.engine(slots, longest)
        runs[policy].append(replay(engine, subject, workload.jobs, slots, policy))
    tokens = sum(job.new_tokens for job in workload.jobs)
    report["batching"] = {policy: _summary(runs[policy], tokens, slots) for policy in POLICIES}
    speeds = [report["batching"][policy]["tokens_per_s"] for policy in POLICIES]
    report["continuous_ratio"] = round(speeds[1] / speeds[0], 3)
    report["memory"] = _memory(runs["continuous"][0])
    report["memory_bytes"] = memory_bytes()
    return report


def _by_batch(
    subject: Subject, shape: Shape, batches: list[int], repeats: int
) -> list[dict[str, Any]]:
    """Aggregate tokens/s of each batch size: once all decode, and prompts included."""
    rows: list[dict[str, Any]] = []
    for batch in track(batches, "Batches"):
        one = Shape(shape.prompt_tokens, shape.new_tokens, batch)
        engine = engine_for(subject, one)
        prompts = subject.prompts([one.prompt_tokens] * batch)
        run_once(engine, prompts, Shape(one.prompt_tokens, 2, batch))
        runs = [run_once(engine, prompts, one) for _ in range(repeats)]
        decode = statistics.median(run.decode_rate(one) for run in runs)
        total = statistics.median(run.rate for run in runs)
        row = {"batch": batch, "decode_tokens_per_s": decode, "tokens_per_s": total}
        rows.append({key: round(value, 2) for key, value in row.items()})
    first = rows[0]
    for row in rows:
        for key in ("decode_tokens_per_s", "tokens_per_s"):
            row[key.replace("tokens_per_s", "speed_up")] = round(row[key] / first[key], 3)
    return rows


def replay(engine: Engine, subject: Subject, jobs: list[Job], slots: int, policy: str) -> Replay:
    """Run jobs as they arrive, by one of POLICIES.

    Raises InputError for a model whose logits are NaN.
    """
    prompts = subject.prompts([job.prompt_tokens for job in jobs])
    longest = max(job.cached_tokens for job in jobs)
    waiting = deque(range(len(jobs)))
    found = Replay()
    began = time.perf_counter()
    while waiting or engine.has_work():
        now = time.perf_counter() - began
        for number in _admitted(waiting, jobs, slots, policy, now, engine.has_work()):
            params = SamplingParams(
                max_tokens=jobs[number].new_tokens, temperature=0, ignore_eos=True
            )
            engine.add_request(str(number), prompts[number], params)
        if not engine.has_work():
            next_arrival = jobs[waiting[0 if policy == "continuous" else _last(waiting, slots)]]
            time.sleep(max(0.0, next_arrival.arrival_s - now))
            continue
        ended = [step for step in engine.step() if step.finish_reason]
        if errors := [one.error for one in ended if one.error]:
            raise InputError(f"the model cannot be timed: {errors[0]}")
        now = time.perf_counter() - began
        found.steps += 1
        found.busy += len(engine.scheduler.running) + len(ended)
        found.latencies += [now - jobs[int(one.request_id)].arrival_s for one in ended]
        for sequence in engine.scheduler.running:
            found.held += sequence.computed
            job = jobs[int(sequence.request.id)]
            paged = sequence.blocks_held // engine.pool.groups * engine.pool.block_size
            room = _room(job, paged, longest, engine.model.max_context)
            found.reserved.update(room)
    found.seconds = time.perf_counter() - began
    return found


def _admitted(
    waiting: deque[int], jobs: list[Job], slots: int, policy: str, now: float, busy: bool
) -> Iterator[int]:
    """Take from `waiting` what may begin now."""
    if policy == "static":
        if busy or not waiting or jobs[waiting[_last(waiting, slots)]].arrival_s > now:
            return
        for _ in range(min(slots, len(waiting))):
            yield waiting.popleft()
        return
    while waiting and jobs[waiting[0]].arrival_s <= now:
        yield waiting.popleft()


def _last(waiting: deque[int], slots: int) -> int:
    """Place of the last request of the next static batch."""
    return min(slots, len(waiting)) - 1


def _room(job: Job, paged: int, longest: int, context: int) -> dict[str, int]:
    """Tokens that a running request has reserved, by policy."""
    return {
        "paged": paged,
        "contiguous, own length known": job.cached_tokens,
        "contiguous, longest of the trace": longest,
        "contiguous, the model's context": context,
    }


def _summary(runs: list[Replay], tokens: int, slots: int) -> dict[str, Any]:
    latencies = [seconds for run in runs for seconds in run.latencies]
    return {
        "tokens_per_s": round(tokens / statistics.median(run.seconds for run in runs), 2),
        "tokens_per_s_best": round(tokens / min(run.seconds for run in runs), 2),
        "latency_mean_s": round(statistics.fmean(latencies), 4),
        "latency_p99_s": round(percentile(latencies, 99), 4),
        "steps": runs[0].steps,
        "slot_occupancy": round(
            sum(run.busy for run in runs) / sum(run.steps for run in runs) / slots, 4
        ),
    }


def _memory(run: Replay) -> dict[str, Any]:
    """Share of reserved room that holds no token, and the room as a multiple of paged."""
    return {
        name: {
            "waste": round(1 - run.held / reserved, 4),
            "of_paged": round(reserved / run.reserved["paged"], 3),
        }
        for name, reserved in run.reserved.items()
    }
