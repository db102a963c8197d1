"""Outcomes drawn by the engine, with speculation, as many as are asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from compress.runtime.engine import Engine
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.speculation.speculator import Speculator

from .distribution import LENGTH, Case
from .proposers import RandomLengths
from .tiny_model import BLOCK, FIRST, PROMPT, TinyMatcher, TinyModel

TOGETHER = 64  # sequences in a batch, and outputs of a request


def draw_outcomes(model: TinyModel, proposer: Any, case: Case, samples: int, seed: int) -> Counter:
    """How often each outcome came in so many outputs; FIRST, which they begin with, is left out.

    One token more than an outcome has is asked for, so that all of an outcome may be proposed.
    """
    length = 1 + LENGTH + 1
    blocks = TOGETHER * -(-(len(PROMPT) + length) // BLOCK)
    speculator = Speculator(proposer, RandomLengths(seed))
    engine = Engine(model, blocks, max_sequences=TOGETHER, seed=seed, speculator=speculator)
    params = SamplingParams(**case.settings, max_tokens=length, n=TOGETHER)
    outputs: dict[tuple[str, int], list[int]] = {}
    for number in range(-(-samples // TOGETHER)):
        if params.seed is not None:
            params = replace(params, seed=seed * samples + number)
        request = engine.prepare(str(number), PROMPT, params)
        if case.rule is not None:
            request.grammar = TinyMatcher(case.rule, model.vocab_size)  # type: ignore[assignment]
        engine.add(request)
        while engine.has_work():
            for increment in engine.step():
                assert increment.error is None, increment.error
                key = increment.request_id, increment.index
                outputs.setdefault(key, []).extend(increment.token_ids)
    assert all(output[0] == FIRST for output in outputs.values())
    assert speculator.accepted, "nothing was ever accepted"
    assert engine.pool.in_use == 0
    return Counter(tuple(output[1 : 1 + LENGTH]) for output in outputs.values())
