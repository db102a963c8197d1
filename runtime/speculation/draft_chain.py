"""Drafts on a device with a queue: all tokens of all drafts without waiting in between.

    launch 1: what the cache lacks, draw | launch 2: that token, draw | ... | wait for all of them

A token that is being drawn stands in its sequence as -1 - i, "draw i of the launch before", which
the device reads from its own memory (compress.runtime.batch).  So the host is ahead of the device,
and waits once for a draft of any length.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from compress.runtime.batch import AsynchronousModel, Launched
from compress.runtime.batch_builder import Part, build_batch
from compress.runtime.sampler import SamplingState, draws_of


def draft_chain(
    model: AsynchronousModel,
    parts: Items[Part],
    states: Items[SamplingState],
    wanted: Items[int],
) -> list[list[int]]:
    """Draw `wanted` tokens behind each of `parts`, each with the number that decides its place.

    The first launch computes the `count` next tokens of each; who is not complete then gets none.
    `computed` goes on with the launches, and `tokens` stays.  A draft ends early before a token
    that could not be drawn, for NaN.

    states  none of which asks for what only the host does (`SamplingState.on_host`); left as it is
    wanted  1 or more
    """
    launches: list[tuple[list[int], Launched]] = []
    going = list(range(len(parts)))
    made = [0] * len(parts)
    while going:
        step = [parts[place] for place in going]
        drawing = [place for place in going if parts[place].count == parts[place].remaining]
        draws = draws_of(
            range(len(drawing)),
            [(states[place], states[place].produced + made[place]) for place in drawing],
        )
        launches.append((drawing, model.launch(build_batch(step, model.block_size), draws)))
        for part in step:
            part.computed += part.count
        for draw, place in enumerate(drawing):
            parts[place].tokens.append(-1 - draw)
            parts[place].count = 1
            made[place] += 1
        going = [place for place in drawing if made[place] < wanted[place]]
    for part, count in zip(parts, made, strict=True):
        del part.tokens[len(part.tokens) - count :]
    return _waited_for(launches, len(parts))


def _waited_for(launches: list[tuple[list[int], Launched]], count: int) -> list[list[int]]:
    """What the launches drew for each of `count` drafts, up to the first that failed."""
    drafts: list[list[int]] = [[] for _ in range(count)]
    broken = set()
    for drawing, launched in launches:
        for place, token in zip(drawing, launched.tokens(), strict=True):
            if token < 0:
                broken.add(place)
            elif place not in broken:
                drafts[place].append(token)
    return drafts
