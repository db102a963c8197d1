"""Timed answers with and without speculation, and what a step is made of, timed alone."""

from __future__ import annotations

import statistics
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from compress.bench.speculation import Costs, Run, Step
from compress.core.errors import InputError
from compress.runtime.batch import Model
from compress.runtime.batch_builder import Stretch, build_batch
from compress.runtime.engine import Engine
from compress.runtime.sampler import SamplingState, sample
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.sequence import Sequence
from compress.runtime.speculation.speculator import Speculator

FORWARDS = 8  # sizes of forward passes timed at a time
ROUNDS = 2  # times each

Length = int | str  # tokens to propose: a number, or "auto"


class Watched(Speculator):
    """A speculator that tells what it did in a step."""

    def __init__(self, made: Speculator) -> None:
        super().__init__(made.proposer, made.lengths)
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self.drafting = 0.0
        self.fates: list[tuple[int, int]] = []  # of each draft: tokens drafted, and accepted

    def propose(self, step: Items[Sequence]) -> None:
        """As the engine asks, timed."""
        began = time.perf_counter()
        super().propose(step)
        self.drafting += time.perf_counter() - began

    def count(self, drafted: int, accepted: int) -> None:
        """Keep what became of a draft."""
        super().count(drafted, accepted)
        self.fates.append((drafted, accepted))


@dataclass
class Arm:
    """A way of answering: proposing `length` tokens, or none."""

    length: Length
    engine: Engine
    watched: Watched | None = None

    def answer(self, prompts: list[list[int]], params: list[SamplingParams]) -> Run:
        """Answer prompts together and time every step.  InputError for logits of NaN."""
        for number, pair in enumerate(zip(prompts, params, strict=True)):
            self.engine.add_request(str(number), *pair)
        outputs: list[list[int]] = [[] for _ in prompts]
        steps: list[Step] = []
        tail: list[Step] = []
        prefill = seconds = 0.0
        decoding = False
        while self.engine.has_work():
            if self.watched:
                self.watched.begin()
            began = time.perf_counter()
            increments = self.engine.step()
            seconds += time.perf_counter() - began
            for increment in increments:
                if increment.error:
                    raise InputError(f"the model cannot be timed: {increment.error}")
                outputs[int(increment.request_id)] += increment.token_ids
            if not decoding:
                prefill += seconds
                decoding = all(outputs)
            elif not increments:
                continue  # of a step that is under way
            else:
                tokens = sum(len(increment.token_ids) for increment in increments)
                step = self._step(seconds, len(increments), tokens)
                (steps if step.sequences == len(prompts) else tail).append(step)
            seconds = 0.0
        return Run(outputs, prefill, steps, tail)

    def _step(self, seconds: float, sequences: int, tokens: int) -> Step:
        if self.watched is None:
            return Step(seconds, sequences, tokens)
        drafts = tuple(self.watched.fates)
        return Step(seconds, sequences, tokens, drafts, self.watched.drafting)


@dataclass
class Clock:
    """Times forward passes and draws alone, between runs, in the cache's `blocks`, which are free.

    Passes have the contexts of the run before, in the middle of its outputs.
    """

    model: Model
    blocks: int
    temperature: float
    forwards: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    draws: list[float] = field(default_factory=list)

    def time(self, sizes: Counter[int], prompts: list[list[int]], run: Run) -> None:
        """Time passes of some sizes that steps had: first those timed least, of these the usual."""
        done = {size: len(times) for size, times in self.forwards.items()}
        chosen = sorted(sizes, key=lambda size: (done.get(size, 0), -sizes[size]))
        self._time(chosen[0], prompts, run)  # brings the weights back into the processor's caches
        for size in chosen[:FORWARDS] * ROUNDS:
            forward, draw = self._time(size, prompts, run)
            self.forwards[size].append(forward)
            self.draws.append(draw)

    def _time(self, size: int, prompts: list[list[int]], run: Run) -> tuple[float, float]:
        batch = build_batch(self._pieces(size, prompts, run), self.model.block_size)
        began = time.perf_counter()
        logits = self.model.forward(batch)
        done = time.perf_counter()
        params = SamplingParams(temperature=self.temperature, seed=0)
        state = SamplingState(params, 0, 0, array("q"), frozenset(), self.model.vocab_size)
        drawing = time.perf_counter()
        sample(logits[:1], [state])
        return done - began, time.perf_counter() - drawing

    def _pieces(self, size: int, prompts: list[list[int]], run: Run) -> list[Stretch]:
        """`size` tokens, of as many sequences as there are tokens for."""
        sequences = min(size, len(prompts))
        room, groups = self.blocks // sequences, len(self.model.layout.windows)
        pieces = []
        for place in range(sequences):
            prompt, output = prompts[place], run.outputs[place]
            context = len(prompt) + len(output) // 2
            count = size // sequences + (place < size % sequences)
            tokens = array("q", (prompt + output + prompt * count)[: context + count])
            needed = -(-(context + count) // self.model.block_size)
            blocks = array("i", (place * room + block % room for block in range(needed)))
            pieces.append(Stretch(tokens, [blocks] * groups, context, count))
        return pieces

    def costs(self) -> Costs:
        """The medians; between sizes that were timed lie the others."""
        sizes = sorted(self.forwards)
        medians = [statistics.median(self.forwards[size]) for size in sizes]
        return Costs(
            lambda tokens: float(np.interp(tokens, sizes, medians)), statistics.median(self.draws)
        )
