"""Many requests: how long each is, and when it comes."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from compress.core.config import build
from compress.core.errors import InputError, reason_of, shown

SEED = 0


@dataclass(frozen=True)
class Job:
    """A request by its lengths and the second of its arrival."""

    prompt_tokens: int
    new_tokens: int
    arrival_s: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.new_tokens < 1 or not 0 <= self.arrival_s < 1e9:
            raise ValueError("tokens are 1 or more, seconds 0 or more")

    @property
    def cached_tokens(self) -> int:
        """Tokens that are in the cache at its end; the last is never read again."""
        return self.prompt_tokens + self.new_tokens - 1


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival, and where their lengths come from."""

    jobs: list[Job]
    lengths: str


def fixed(count: int, prompt_tokens: int, new_tokens: int) -> Workload:
    """Requests of one length, all there at once."""
    words = f"all {prompt_tokens} + {new_tokens} tokens"
    return Workload([Job(prompt_tokens, new_tokens)] * count, words)


def uniform(count: int, prompt_tokens: int, new_tokens: int) -> Workload:
    """Requests of lengths drawn evenly from 1 to twice the mean, less one; all there at once."""
    draw = random.Random(SEED).randint
    jobs = [Job(draw(1, 2 * prompt_tokens - 1), draw(1, 2 * new_tokens - 1)) for _ in range(count)]
    words = (
        f"even from 1 to {2 * prompt_tokens - 1} + 1 to {2 * new_tokens - 1} tokens, seed {SEED}"
    )
    return Workload(jobs, words)


def read_trace(path: Path) -> Workload:
    """Read {"prompt_tokens": N, "new_tokens": N, "arrival_s": SECONDS} a line.

    Raises InputError with the number of a wrong line.
    """
    jobs = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read trace '{path}': {reason_of(error)}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: no JSON: {reason_of(error)}") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}, line {number}: {shown(values)} is no object")
        jobs.append(build(Job, values, f"{path}, line {number}"))
    if not jobs:
        raise InputError(f"trace '{path}' holds no request; give one JSON object a line")
    return Workload(sorted(jobs, key=lambda job: job.arrival_s), f"those of {path.name}")
