"""A machine, a proposer and texts that are nothing but numbers, for tests of lengths."""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

# Milliseconds of a step by its tokens: a 135M model in int4 and in bfloat16 on two cores, where a
# step of two tokens of the latter takes longer than one of three: that is left out.
INT4 = {
    1: 3.82, 2: 4.01, 3: 3.94, 4: 4.08, 5: 4.51, 6: 4.52, 7: 4.77, 8: 5.06, 9: 6.19, 12: 6.86,
    16: 8.07, 17: 9.4, 32: 14.9, 64: 31.1, 128: 61,
}  # fmt: skip
BF16 = {
    1: 7.24, 3: 7.63, 4: 7.92, 5: 7.97, 6: 7.99, 7: 8.52, 8: 8.5, 9: 10.19, 12: 10.21,
    16: 11.29, 17: 12.65, 32: 18, 64: 33, 128: 63,
}  # fmt: skip
FLAT = {1: 5.0, 64: 5.5, 128: 6.0, 256: 8.0, 512: 14.0}  # a GPU
STEEP = {1: 1.0, 2: 2.0, 64: 64.0}  # nothing is gained from computing tokens together


def seconds_on(milliseconds: dict[int, float]) -> Callable[[int], float]:
    """The line through these, in seconds, as a function of the number of tokens."""
    sizes = sorted(milliseconds)

    def seconds(tokens: int) -> float:
        place = min(max(bisect_right(sizes, tokens), 1), len(sizes) - 1)
        low, high = sizes[place - 1], sizes[place]
        rise = (milliseconds[high] - milliseconds[low]) / (high - low)
        return (milliseconds[low] + rise * (tokens - low)) / 1000

    return seconds


class Text:
    """As much of a sequence as lengths look at."""

    def __init__(self, prompt: int = 1, limit: int = 1 << 20) -> None:
        self.tokens = array("q", [0]) * prompt
        self.prompt = prompt
        self.drafted = 0  # tokens that a proposer with a cache has of it
        self.request = SimpleNamespace(limit=limit)

    @property
    def produced(self) -> int:
        return len(self.tokens) - self.prompt


@dataclass
class Guesser:
    """Claims some probabilities; its tokens are right with others."""

    claimed: Callable[[int, int], list[float]]  # (step, sequence): its outlook
    right: Callable[[int, int], float]  # (step, sequence): of each token, if those before were
    each: float = 0.0  # seconds to draft one token of any number of sequences
    learn: Callable[[int, int], None] = lambda count, accepted: None  # of each draft
    reading: float = 0.0  # seconds for a token that it has not seen yet

    bytes_per_block = 0
    most = 16

    def seconds(self, counts: list[int]) -> float:
        return self.each * max(counts, default=0)

    def behind(self, sequence: Text) -> float:
        return self.reading * (len(sequence.tokens) - 1 - sequence.drafted)


@dataclass
class Machine:
    """Steps that take as long as they should, and what a clock says of them."""

    seconds: Callable[[int], float]
    noise: float = 0.0  # of the clock: standard deviation of the logarithm
    spikes: float = 0.0  # how many steps are seen 2 to 20 times as long
    load: Callable[[int], float] = lambda step: 1.0  # what makes all steps longer alike
    asking: float = 0.0  # seconds to find out how many to propose
    waiting: float = 0.0  # seconds more of a step that was asked about
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def seen(self, seconds: float) -> float:
        seen = seconds * math.exp(self.random.gauss(0, self.noise))
        return seen * self.random.uniform(2, 20) if self.random.random() < self.spikes else seen


@dataclass
class Outcome:
    """Of a run: tokens, seconds, what plain steps would have taken; steps with proposals."""

    tokens: int = 0
    seconds: float = 0.0
    plain: float = 0.0
    steps: int = 0
    speculated: int = 0

    @property
    def speedup(self) -> float:
        return self.plain / self.seconds


def endless() -> list[Text]:
    return [Text() for _ in range(256)]


def run(lengths, guesser: Guesser, machine: Machine, steps: int, size, texts=None) -> Outcome:
    """So many steps with the first `size(step)` of the sequences; those that end are taken out."""
    outcome, texts = Outcome(), endless() if texts is None else texts
    for step in range(steps):
        texts[:] = [text for text in texts if text.produced < text.request.limit]
        present = texts[: size(step)]
        if not present:
            break
        counts, asking, waiting = [0] * len(present), 0.0, 0.0
        if not lengths.idle:
            asking, waiting = machine.asking, machine.waiting
            outlooks = [guesser.claimed(step, place) for place in range(len(present))]
            counts = lengths.plan(present, 0, outlooks)
            assert all(0 <= n <= len(o) for n, o in zip(counts, outlooks, strict=True))
        drafting = guesser.seconds([n for n in counts if n])
        for text, count in zip(present, counts, strict=True):
            if count:
                drafting += guesser.behind(text)
                text.drafted = len(text.tokens) - 1
        produced = 0
        for place, (text, count) in enumerate(zip(present, counts, strict=True)):
            accepted = 0
            while accepted < count and machine.random.random() < guesser.right(step, place):
                accepted += 1
            if count:
                guesser.learn(count, accepted)
            text.tokens.extend([0] * (accepted + 1))
            produced += accepted + 1
        load, tokens = machine.load(step), len(present) + sum(counts)
        seconds = (machine.seconds(tokens) + waiting) * load
        drafting, asking = drafting * load, asking * load
        seen = machine.seen(seconds), machine.seen(drafting)
        lengths.observe(tokens, len(present), *seen, asking)
        outcome.tokens += produced
        outcome.seconds += seconds + drafting + asking
        outcome.plain += produced * machine.seconds(len(present)) / len(present) * load
        outcome.steps += 1
        outcome.speculated += any(counts)
    return outcome


def best_speedup(machine: Machine, right: list[float], each: float = 0.0, most: int = 16) -> float:
    """The largest there is, of sequences with these acceptances: all numbers of tokens are tried.

    Independent of what it judges: sequences are given tokens one by one, to whom it brings most.
    """
    size = len(right)
    counts, gained, best = [0] * size, 0.0, 1.0
    plain = machine.seconds(size) / size
    for number in range(1, min(size * most, 256) + 1):
        place = max(
            (place for place in range(size) if counts[place] < most),
            key=lambda place: right[place] ** (counts[place] + 1),
        )
        counts[place] += 1
        gained += right[place] ** counts[place]
        taken = machine.seconds(size + number) + each * max(counts)
        best = max(best, plain * (size + gained) / taken)
    return best
