"""Finding the shape to prune to: for a number of parameters, bytes of weights, or a latency here.

    each axis alone, made and measured ─> all shapes that meet the target, ranked by what these
    predict (prune/search.py) ─> the best few made and measured ─> the one that loses least

What a shape loses is the KL divergence of its predictions from the original's, in nats a token, on
calibration sequences that nothing is computed from.  A latency is that of decoding one sequence in
our runtime, by a model of the shape with random weights.  Everything measured is committed, and a
pruned model is kept only until it is measured.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compress.core.commits import Commits
from compress.core.device import default_device, fastest_dtype
from compress.core.errors import InputError
from compress.core.processes import processes
from compress.core.progress import say, without_bars
from compress.core.source import ModelSource
from compress.engines import load_predictor, settle_engine
from compress.prune.search import (
    alone,
    candidates,
    fit_latency,
    predicted,
    smallest,
    unalike,
)
from compress.prune.shape import Shape
from compress.prune_preflight import PruneJob, Space, check_class, check_limit, stock_config

if TYPE_CHECKING:
    from compress.engines import Predictor

HELD_OUT = 8  # calibration sequences that losses are measured on
PROMPT, NEW, REPEATS = 64, 33, 5  # tokens of a sequence that is timed, and how often
TRIED = 3  # shapes timed for each that is made, at most
ROUNDS = 3  # of latencies predicted, and measured for the shapes that look best
SHOWN = 10  # shapes of the ranking that were not made, in the report


@dataclass(frozen=True)
class Found:
    """A shape that was looked at.

    predicted     nats a token, before it was made; None for what is not predicted
    kl            nats a token, measured; None where it was not made
    milliseconds  a decoded token, measured, or predicted where `kl` is None; None without a
                  target of time
    """

    shape: Shape
    parameters: int
    predicted: float | None = None
    kl: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class Search:
    """What was found, in the order of the report.

    alone     each axis alone
    measured  the shapes that were made, best first: the first is the one to take
    others    those next in the ranking, which were neither made nor timed
    count     shapes that meet the target, none of which can grow by a step
    """

    space: Space
    alone: list[Found]
    measured: list[Found]
    others: list[Found]
    count: int

    @property
    def chosen(self) -> Shape:
        return self.measured[0].shape

    @property
    def described(self) -> dict[str, Any]:
        """For compress.json."""
        asked = self.space.in_words(self.space.limit)
        return asdict(self) | {"asked": asked, "sequences": HELD_OUT}


# Makes pruned models together, committed under a name: of each folder the shape.
Make = Callable[[str, Mapping[Path, Shape]], None]


class ShapeSearch:
    """Looks for a shape; all processes take part, and the first one measures.

    space  where it looks
    place  a folder for models until they are measured
    """

    def __init__(self, job: PruneJob, space: Space, commits: Commits, place: Path) -> None:
        self.job, self.space, self.commits, self.place = job, space, commits, place
        pairs = ((axis, alone(space.start, axis)) for axis in space.axes)
        self.alone = {axis: shape for axis, shape in pairs if shape is not None}
        self.timed: dict[Shape, float] = {}

    def check(self) -> None:
        """Raise InputError for a latency that no shape can have; takes some seconds a shape."""
        if self.job.unit is not None:
            return
        start, small = self.space.start, smallest(self.space.start, self.space.axes)
        check_limit(self.space, small, self._milliseconds(start), self._milliseconds(small))
        for shape in self.alone.values():
            self._milliseconds(shape)

    def find(self, make: Make, held_out: Tensor) -> Search:
        """Find the shape that loses least; `held_out` is int64 [HELD_OUT, seq_len].

        Raises InputError where no shape meets the target.
        """
        start = self.space.start
        first = [start] if start != self.job.stage.shape else []
        losses = self._losses("alone", [*first, *self.alone.values()], make, held_out)
        by_axis = {axis: (shape, losses[shape]) for axis, shape in self.alone.items()}
        before = losses.get(start, 0.0)

        def guess(shape: Shape) -> float:
            return predicted(shape, start, before, by_axis)

        ranked, finalists = self._finalists(guess)
        losses |= self._losses("finalists", finalists, make, held_out)
        measured = [self._found(shape, guess(shape), losses[shape]) for shape in finalists]
        left = (shape for shape in ranked if shape not in losses and shape not in self.timed)
        return Search(
            self.space,
            [self._found(shape, None, loss) for shape, loss in by_axis.values()],
            sorted(measured, key=lambda found: found.kl or 0.0),
            [self._found(shape, guess(shape), None) for shape in islice(left, SHOWN)],
            len(ranked),
        )

    def _found(self, shape: Shape, guess: float | None, kl: float | None) -> Found:
        milliseconds = None
        if self.job.unit is None:
            milliseconds = self.timed.get(shape) or self._cost()(shape)
        return Found(shape, self.job.parameters_of(shape), guess, kl, milliseconds)

    def _finalists(self, guess: Callable[[Shape], float]) -> tuple[list[Shape], list[Shape]]:
        """The shapes that meet the target, best first by a guess, and those to make of them."""
        wanted = self.job.config.finalists
        for _ in range(ROUNDS):
            fitting = candidates(self.space.start, self._fits(self._cost()), self.space.axes)
            ranked = sorted(filter(self._is_stock, fitting), key=guess)
            tried = islice(unalike(ranked, self.space.start), TRIED * wanted)
            if finalists := list(islice(filter(self._keeps_time, tried), wanted)):
                return ranked, finalists
        asked = f"{self.space.target} = {self.space.in_words(self.space.limit)}"
        raise InputError(
            f"{asked} is met by no shape that transformers takes, as far as they were made and "
            "timed; give a little more"
        )

    def _keeps_time(self, shape: Shape) -> bool:
        """Whether a shape that should meet the target does, where that takes a clock."""
        return self.job.unit is not None or self._milliseconds(shape) <= self.space.limit

    def _fits(self, cost: Callable[[Shape], float]) -> Callable[[Shape], bool]:
        return lambda shape: cost(shape) <= self.space.limit

    def _cost(self) -> Callable[[Shape], float]:
        """What a shape takes, in the unit of the limit."""
        unit, count = self.job.unit, self.job.parameters_of
        if unit is not None:
            return lambda shape: unit * count(shape)
        fitted = fit_latency([(shape, count(shape), ms) for shape, ms in self.timed.items()])
        return lambda shape: fitted(shape, count(shape))

    def _is_stock(self, shape: Shape) -> bool:
        """Whether a config of transformers takes it."""
        try:
            stock_config(self.job.model, shape)
        except Exception:  # a config class may refuse by any exception
            return False
        return True

    def _losses(
        self, name: str, shapes: Sequence[Shape], make: Make, held_out: Tensor
    ) -> dict[Shape, float]:
        """Make the shapes that were not measured yet, under a name, and measure them."""
        missing = [shape for shape in shapes if self.commits.get(_named("kl", shape)) is None]
        if missing:
            for shape in missing:
                check_class(self.job.model, self.job.stage.parts, self.job.stage.shape, shape)
            make(name, {self.place / _named("shape", shape): shape for shape in missing})

        def measure() -> None:
            for shape in missing:
                folder = self.place / _named("shape", shape)
                kl = self._divergence(ModelSource(folder.name, folder), held_out)
                say(f"KL {kl:.4f} with {shape}")
                self.commits.put(_named("kl", shape), kl)
                shutil.rmtree(folder)

        processes().first(measure)
        return {shape: self.commits.get(_named("kl", shape)) for shape in shapes}

    def _divergence(self, pruned: ModelSource, held_out: Tensor) -> float:
        """Mean KL of the pruned model's predictions from the original's, in nats a token."""
        from compress.evaluate import score_windows

        predictor = load_predictor(self._engine, pruned, "float32")
        rows = score_windows([predictor, self._original], held_out.numpy())
        return float(np.mean([row[2].mean() for row in rows]))

    @cached_property
    def _engine(self) -> str:
        return settle_engine("auto", [self.job.model.source])

    @cached_property
    def _original(self) -> Predictor:
        return load_predictor(self._engine, self.job.model.source, "float32")

    def _milliseconds(self, shape: Shape) -> float:
        """What a decoded token takes with this shape, on this device."""
        if shape not in self.timed:
            name = _named("milliseconds", shape)

            def measure() -> None:
                if self.commits.get(name) is None:
                    place = self.place / _named("timed", shape)
                    self.commits.put(
                        name, time_decoding(stock_config(self.job.model, shape), place)
                    )
                    shutil.rmtree(place)

            processes().first(measure)
            self.timed[shape] = self.commits.get(name)
            say(f"{self.timed[shape]:.2f} ms a token with {shape}")
        return self.timed[shape]


def _named(what: str, shape: Shape) -> str:
    return "-".join([what, *(str(number) for number in asdict(shape).values())])


def time_decoding(config: Any, place: Path) -> float:
    """Milliseconds that a model of this config takes to decode a token in our runtime.

    Random weights in the dtype that is fastest here, written to `place`; one sequence; the median
    over steps of several turns.
    """
    from transformers import AutoModelForCausalLM

    from compress.bench.latency import Shape as Batch
    from compress.bench.latency import engine_for, run_once
    from compress.bench.subject import Subject

    dtype = getattr(torch, fastest_dtype(default_device()))
    shutil.rmtree(place, ignore_errors=True)
    with without_bars():
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(place)
    subject, batch = Subject(str(place), "auto", None, None), Batch(PROMPT, NEW)
    engine, prompts = engine_for(subject, batch), subject.prompts([PROMPT])
    runs = [run_once(engine, prompts, batch) for _ in range(1 + REPEATS)]
    return 1000 * statistics.median(step for run in runs[1:] for step in run.steps)
