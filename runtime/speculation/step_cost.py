"""How long a step takes, by its number of tokens: measured once, then followed.

    log seconds(T) = pace + level(T)          level is linear between nodes

The pace is one number for all steps, and wanders fast: other programs on the machine make all
steps slower alike.  The levels are particular to a number of tokens and wander slowly; those of
neighbours go together.  A Kalman filter follows them: with each step it divides the surprise among
pace and levels by how uncertain each is, and remembers which of their sums are known.  A step that
is surprisingly long says nothing unless the last one of its size was, too: it may have been
interrupted.
"""

from __future__ import annotations

import math
import time
from array import array
from bisect import bisect_right
from collections.abc import Mapping

import numpy as np
import torch

from compress.runtime.batch import AsynchronousModel, Draws, Model
from compress.runtime.batch_builder import Stretch, build_batch

# Numbers of tokens that are told apart: each where kernels change their way, then coarser.
NODES = (*range(1, 11), 12, 14, 16, 17, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 1024)

# Standard deviations, in logarithms of seconds.
NOISE = 0.05  # of one step
PACE_WANDERS, LEVEL_WANDERS = 0.1, 0.003  # from a step to the next
UNKNOWN = 0.2  # of a level, as measured with nothing else going on, to what it turns out to be
LIKENESS = 1.0  # levels at T and 2 T go together by exp(-1)
MOST_SURPRISE = 2.5  # standard deviations that count

# Sizes to measure, most telling first, since there may be time for a few alone.
SIZES = (1, 4, 8, 2, 16, 3, 32, 6, 12, 9, 5, 17, 64, 7, 24, 10, 14, 128, 256)
CONTEXT = 64  # tokens in the cache of the steps that are measured
SECONDS = 0.8  # to measure for


class StepCost:
    """Seconds of a step by its number of tokens, from `measured` ones: a few, at least one.

    Between these a line is drawn, which goes on beyond the last.  They are made to rise with the
    number of tokens, as all but noise does.
    """

    def __init__(self, measured: Mapping[int, float]) -> None:
        sizes = sorted(measured)
        seconds = _rising([measured[size] for size in sizes])
        logs = [math.log(_on_line(sizes, seconds, node)) for node in NODES]
        self._state = np.array([0.0, *logs])  # pace, levels
        place = np.log2(NODES)
        self._covariance = np.zeros((len(NODES) + 1, len(NODES) + 1))
        self._covariance[0, 0] = 1.0
        apart = np.abs(place[:, None] - place)
        self._covariance[1:, 1:] = UNKNOWN**2 * np.exp(-LIKENESS * apart)
        wander = [PACE_WANDERS] + [LEVEL_WANDERS] * len(NODES)
        self._wander = np.diag(np.square(wander))
        self._known = self._state.tolist()
        self._seconds: dict[int, float] = {}  # that were asked for since the last step
        self._too_long: set[int] = set()  # sizes of which the last step was surprisingly long

    def seconds(self, tokens: int) -> float:
        """Estimate for a step of so many tokens."""
        if tokens not in self._seconds:
            self._seconds[tokens] = math.exp(self._log_seconds(tokens))
        return self._seconds[tokens]

    def observe(self, tokens: int, seconds: float) -> None:
        """Take note that a step of so many tokens took so long."""
        surprise = math.log(max(seconds, 1e-9)) - self._log_seconds(tokens)
        place, share = _between(tokens)
        covariance = self._covariance
        covariance += self._wander
        column = covariance[0] + (1 - share) * covariance[place] + share * covariance[place + 1]
        variance = column[0] + (1 - share) * column[place] + share * column[place + 1] + NOISE**2
        most = MOST_SURPRISE * math.sqrt(variance)
        if surprise <= most:
            self._too_long.discard(tokens)
        elif tokens not in self._too_long:
            self._too_long.add(tokens)
            return
        gain = column / variance
        self._state += max(-most, min(most, surprise)) * gain
        covariance -= np.outer(gain, column)
        self._known = self._state.tolist()
        self._seconds.clear()

    def _log_seconds(self, tokens: int) -> float:
        place, share = _between(tokens)
        levels = self._known
        return levels[0] + (1 - share) * levels[place] + share * levels[place + 1]


def _between(tokens: int) -> tuple[int, float]:
    """The places in the state of the nodes around a number of tokens, and the second's share.

    Beyond the last node the line of the last two goes on.
    """
    place = bisect_right(NODES, tokens, 1, len(NODES) - 1)
    low, high = NODES[place - 1], NODES[place]
    return place, (tokens - low) / (high - low)


def _rising(values: list[float]) -> list[float]:
    """The nearest values, in least squares, that never fall (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # sum, count
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] * count >= total * pools[-1][1]:
            before, several = pools.pop()
            total, count = total + before, count + several
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def _on_line(sizes: list[int], seconds: list[float], size: int) -> float:
    """The value at `size` of the line through (sizes, seconds); beyond the last, its latest rise.

    That is from half the last size on, since what two neighbours differ by is mostly noise.
    """
    if size <= sizes[-1]:
        return float(np.interp(size, sizes, seconds))
    half = float(np.interp(sizes[-1] / 2, sizes, seconds))
    return seconds[-1] + (size - sizes[-1]) * (seconds[-1] - half) / (sizes[-1] / 2)


def measure_steps(model: Model, num_blocks: int, most_tokens: int) -> dict[int, float]:
    """Seconds of steps of up to `most_tokens` tokens, with logits of all of them.

    They are of one sequence; on a device they are shared out to as many sequences as there are
    tokens, since its fast way of a step takes only few of each (compress.runtime.captured).
    For a model whose cache of `num_blocks` blocks holds nothing yet.  Takes a second, or as long
    as some four steps where these are long.  Of several times the least is taken.
    """
    groups = len(model.layout.windows)
    room = min(num_blocks // groups * model.block_size, model.max_context)
    context = min(CONTEXT, room // 2)
    most = min(most_tokens, room - context, max(SIZES))
    each = -(-(context + most) // model.block_size)
    tables = [array("i", range(group * each, (group + 1) * each)) for group in range(groups)]
    tokens = array("q", (place % model.vocab_size for place in range(context + most)))
    end = time.perf_counter() + SECONDS
    if context:
        _seconds(model, [Stretch(tokens, tables, 0, min(context, most_tokens))])
    measured: dict[int, float] = {}
    for size in (size for _ in range(4) for size in SIZES if size <= most):
        if len(measured) > 1:
            below = max((other for other in measured if other <= size), default=size)
            if time.perf_counter() > end:
                break
            if measured.get(below, 0) * size / below > SECONDS / 2:
                continue
        for _ in range(1 if size in measured else 2):  # the first may compile kernels
            parts = [Stretch(tokens, tables, context, size)]
            if isinstance(model, AsynchronousModel):  # on the same blocks, at the same positions
                parts = [Stretch(tokens, tables, context + place, 1) for place in range(size)]
            seconds = _seconds(model, parts)
            measured[size] = min(measured.get(size, math.inf), seconds)
    return measured


@torch.inference_mode()
def _seconds(model: Model, parts: list[Stretch]) -> float:
    """How long a step takes; a device draws the likeliest tokens."""
    began = time.perf_counter()
    batch = build_batch(parts, model.block_size)
    if isinstance(model, AsynchronousModel):
        zeros = np.zeros(len(batch.tokens))
        single, whole = zeros.astype(np.float32), zeros.astype(np.int32)
        rows = np.arange(len(batch.tokens))
        model.launch(batch, Draws(rows, zeros, single, whole, single + 1, single)).tokens()
    else:
        model.forward(batch)
    return time.perf_counter() - began
