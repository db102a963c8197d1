"""Visiting the blocks of a model in order, with what calibration shows of each, and committing.

For every block: load its weights, run it on all batches and collect statistics, let the method
change it, run it again with the new weights, which gives the next block's inputs, and commit.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from compress.core.activations import Activations
from compress.core.blocks import BlockModel, call_block
from compress.core.commits import Commits, numbered
from compress.core.errors import InputError
from compress.core.kv_sizes import attention_of, measuring
from compress.core.processes import Processes, processes
from compress.core.progress import say, track
from compress.core.stage import Block, BlockSamples
from compress.core.statistics import collecting

TOKENS_PER_BATCH = 4096  # large enough to keep matrix products busy, small enough for caches


class Clock:
    """Seconds of work so far, those before the run was broken off included."""

    def __init__(self) -> None:
        self._zero = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._zero

    def go_on_from(self, seconds: float) -> None:
        """Count on from what was committed."""
        self._zero = time.monotonic() - seconds


class WalkedStage(Protocol):
    """What a walk needs to know of a stage (compress.core.stage.Stage)."""

    needs_reference: bool
    counts_above: float | None
    trains_blocks: bool

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class Walked(Protocol):
    """What a walk needs to know of a run."""

    @property
    def model(self) -> BlockModel: ...

    @property
    def stage(self) -> WalkedStage: ...

    @property
    def dtype(self) -> torch.dtype: ...


JobT = TypeVar("JobT", bound=Walked)


class Observed(Protocol):
    """What was seen of something that runs in a block; `what` names it."""

    @property
    def what(self) -> str: ...

    def pool(self, processes: Processes) -> None:
        """Take in what the other processes saw."""
        ...

    def is_finite(self) -> bool:
        """Whether no value was NaN or infinite."""
        ...


# Watches a block, of this number, while it runs inside the context.
Observe = Callable[[int, nn.Module], AbstractContextManager[Sequence[Observed]]]


@dataclass
class Streams:
    """What enters the next block, batch by batch.

    hidden     hidden states as the compressed blocks before it give them
    originals  the same of the original model, where a method compares with it
    kwargs     for each batch the other arguments of every block
    """

    hidden: Activations
    originals: Activations | None
    kwargs: list[list[dict[str, Any]]]


@dataclass
class Walk(Generic[JobT]):
    """A way over all blocks that can be broken off and taken up again.

    activations        a folder for hidden states
    activation_memory  bytes of them that are kept in memory too
    tokens             calibration sequences of this process, int64 [N, S]; None for no calibration
    title              of the progress bar
    observe            watches the blocks, by number, for `Block.observed`; None for statistics of
                       the linears' inputs, `Block.inputs`
    measures_cache     where blocks are run again, measure their keys and values: each commit has
                       `cache_sizes`, the largest |key| and |value|
    """

    job: JobT
    commits: Commits
    activations: Path
    activation_memory: int
    clock: Clock
    tokens: Tensor | None = None
    title: str = "Compressing blocks"
    observe: Observe | None = None
    measures_cache: bool = False

    @torch.no_grad()
    def visit_all(
        self,
        name: str,
        visit: Callable[[Block], Any],
        propagate: bool,
        with_originals: bool = False,
        stop: int | None = None,
    ) -> list[Any]:
        """Visit every block in order, before `stop` if given; returns what the visits returned.

        `name` is under what the visits are committed.  `propagate` runs a block again after the
        visit, so that the next one sees what it now gives.  `with_originals` also runs every block
        as it was on what the blocks before it gave as they were.
        """
        model, stage = self.job.model, self.job.stage
        done = self.commits.series(name)
        if done:
            self.clock.go_on_from(done[-1]["seconds"])
            stage.restore(done[-1]["state"])
            say(f"Going on after block {len(done)} of {model.num_blocks}")
        stop = model.num_blocks if stop is None else stop
        if len(done) == stop:  # what is in the folder of activations may be of a later walk
            return [commit["result"] for commit in done]
        streams = self._streams_before(len(done), with_originals)
        for index in track(range(len(done), stop), self.title, stop, done=len(done)):
            result, sizes = self._visit_one(index, streams, visit, propagate)
            processes().wait()  # until all have stored what enters the next block
            commit = {"result": result, "state": stage.state(), "seconds": self.clock.seconds}
            commit["cache_sizes"] = sizes
            processes().first(partial(self.commits.put, numbered(name, index), commit))
            self._remove_all_but(streams)
        self._remove_all_but(None)
        return [commit["result"] for commit in self.commits.series(name)]

    def _visit_one(
        self,
        index: int,
        streams: Streams | None,
        visit: Callable[[Block], Any],
        propagate: bool,
    ) -> tuple[Any, list[float] | None]:
        """Visit a block, and move the streams on to the next one.

        Returns what the visit returned, and what was measured of keys and values.  The first
        process visits, and hands the block's new weights to the others.
        """
        model = self.job.model
        module = model.load_block(index)
        seen: Sequence[Any] = []
        probe = None
        kwargs = [given[index] for given in streams.kwargs] if streams else []
        if streams:
            probe = probe_of(streams.hidden[0], kwargs[0], model.device)
            seen = self._observe(index, module, streams, kwargs, propagate)
        name, dtype = model.block_name(index), self.job.dtype
        inputs, observed = (seen, ()) if self.observe is None else ((), seen)
        samples = self._samples(streams, kwargs)
        block = Block(index, name, module, inputs, probe, dtype, samples, observed)
        result = processes().first(partial(visit, block))
        processes().spread(module)
        sizes = None
        if streams and propagate and (self.measures_cache or index + 1 < model.num_blocks):
            del block, seen, inputs, observed, samples  # their memory, before the block is copied
            sizes = self._run_again(index, module, streams, kwargs)
        return result, sizes

    def _run_again(
        self, index: int, module: nn.Module, streams: Streams, kwargs: list[dict[str, Any]]
    ) -> list[float] | None:
        """Run a block as it has become; returns the largest |key| and |value|, where asked for.

        Raises InputError where these are NaN or infinite.
        """
        model, name = self.job.model, self.job.model.block_name(index)
        runner = model.compute_copy(module)
        pairs = zip(streams.hidden.drain(), kwargs, strict=True)
        outputs = (model.run_block(runner, *pair) for pair in pairs)
        measures: AbstractContextManager[Tensor | None] = nullcontext()
        if self.measures_cache:
            measures = measuring(runner, attention_of(runner, name))
        with measures as sizes:
            if index + 1 < model.num_blocks:
                streams.hidden = self._store("hidden", index + 1, outputs)
            for _ in outputs:  # those of the last block, which nothing stores
                continue
        if sizes is None:
            return None
        sizes = sizes.nan_to_num(nan=torch.inf, posinf=torch.inf)
        processes().largest(sizes)
        if not sizes.isfinite().all():
            raise InputError(
                f"keys or values of {name} are NaN or infinite in "
                f"{str(model.compute_dtype).removeprefix('torch.')}; try --compute-dtype float32"
            )
        return sizes.tolist()

    def _observe(
        self,
        index: int,
        module: nn.Module,
        streams: Streams,
        kwargs: list[dict[str, Any]],
        propagate: bool,
    ) -> Sequence[Observed]:
        """Run a block as it is on all batches; returns what was seen of it.

        Raises InputError where that is NaN or infinite, which the weights need not be for it.
        """
        model = self.job.model
        runner = model.compute_copy(module)
        paired = streams.originals is not None and self.job.stage.needs_reference
        goes_on = index + 1 < model.num_blocks
        if streams.originals is not None and not paired:
            pairs = zip(streams.originals.drain(), kwargs, strict=True)
            outputs = (model.run_block(runner, *pair) for pair in pairs)
            streams.originals = self._store("originals", index + 1, outputs)
        if self.observe is None:
            watched: AbstractContextManager[Sequence[Observed]]
            bound = self.job.stage.counts_above
            watched = collecting(runner, paired, outputs=not propagate, bound=bound)
        else:
            watched = self.observe(index, runner)
        with watched as seen:
            if paired and streams.originals is not None:
                pairs = zip(streams.originals.drain(), streams.hidden, kwargs, strict=True)
                outputs = (self._run_pair(runner, *pair) for pair in pairs)
                if goes_on or self.job.stage.trains_blocks:
                    streams.originals = self._store("originals", index + 1, outputs)
            else:
                pairs = zip(streams.hidden, kwargs, strict=True)
                outputs = (model.run_block(runner, *pair) for pair in pairs)
                if goes_on and not propagate:
                    streams.hidden = self._store("hidden", index + 1, outputs)
            for _ in outputs:  # those that nothing has stored
                continue
        for one in seen:
            one.pool(processes())
            if not one.is_finite():
                raise InputError(
                    f"what enters {one.what} of {model.block_name(index)} is NaN or infinite in "
                    f"{str(model.compute_dtype).removeprefix('torch.')}; try --compute-dtype "
                    "float32, and if it comes again the model is broken"
                )
        return seen

    def _samples(
        self, streams: Streams | None, kwargs: list[dict[str, Any]]
    ) -> BlockSamples | None:
        """What a stage that trains blocks trains the current one on."""
        if streams is None or streams.originals is None or not self.job.stage.trains_blocks:
            return None
        return BlockSamples(streams.hidden, streams.originals, kwargs)

    def _run_pair(
        self, runner: nn.Module, original: Tensor, states: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """Run a block on the original model's hidden states, then on the compressed one's.

        Returns the output for the original's; of the other only the statistics are wanted.
        """
        output = self.job.model.run_block(runner, original, kwargs)
        self.job.model.run_block(runner, states, kwargs)
        return output

    def _streams_before(self, index: int, with_originals: bool) -> Streams | None:
        """What enters block `index`: from the embeddings, or as a broken-off run has stored it."""
        tokens = self.tokens
        if tokens is None:
            return None
        size = max(1, TOKENS_PER_BATCH // tokens.shape[1])
        kwargs: list[list[dict[str, Any]]] = []

        def first_inputs() -> Iterator[Tensor]:
            for states, given in self.job.model.capture_inputs(tokens.split(size)):
                kwargs.append(given)
                yield states

        if index == 0:
            hidden = self._store("hidden", 0, first_inputs())
            return Streams(hidden, hidden if with_originals else None, kwargs)
        for _ in first_inputs():  # for the other arguments, which are not stored
            continue
        originals = Activations(self._place("originals", index)) if with_originals else None
        streams = Streams(Activations(self._place("hidden", index)), originals, kwargs)
        self._remove_all_but(streams)
        return streams

    def _store(self, stream: str, index: int, batches: Iterator[Tensor]) -> Activations:
        memory = self.activation_memory
        if self.job.stage.needs_reference or self.job.stage.trains_blocks:
            memory //= 2
        return Activations.store(self._place(stream, index), batches, memory)

    def _place(self, stream: str, index: int) -> Path:
        return self.activations / f"{numbered(stream, index)}-process-{processes().rank}"

    def _remove_all_but(self, streams: Streams | None) -> None:
        """Remove this process's hidden states, except for those that enter the next block."""
        kept = set()
        if streams:
            found = (streams.hidden, streams.originals)
            kept = {stored.folder for stored in found if stored is not None}
        for folder in self.activations.glob(f"*-process-{processes().rank}"):
            if folder not in kept:
                Activations(folder).remove()


def probe_of(
    hidden: Tensor, kwargs: dict[str, Any], device: torch.device
) -> Callable[[nn.Module], Tensor]:
    """A function that runs a float32 block on the first batch's first sequence."""
    states = hidden[:1].to(device, torch.float32)

    def to_float(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value[:1] if value.shape[:1] == hidden.shape[:1] else value
            return value.float() if value.is_floating_point() else value
        if isinstance(value, tuple):
            return tuple(to_float(item) for item in value)
        return value

    one = {name: to_float(value) for name, value in kwargs.items()}
    return lambda block: call_block(block, states, one)
