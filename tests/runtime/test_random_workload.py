"""Random requests on a tiny cache: every output right, no block lost.

RANDOM_REQUESTS=2000 runs the long one.
"""

import os
import random

import pytest

from compress.runtime.engine import Engine
from compress.runtime.sampling_params import SamplingParams
from tests.runtime.fakes import VOCAB, FakeAsyncModel, FakeModel, naive, tokens_of

REQUESTS = int(os.environ.get("RANDOM_REQUESTS", "300"))


def random_request(source, prefixes):
    """A prompt, often with a prefix that others have, and settings."""
    prompt = list(source.choice(prefixes))[: source.randint(0, 30)] if source.random() < 0.6 else []
    prompt += [source.randrange(VOCAB) for _ in range(source.randint(1, 12))]
    params = SamplingParams(
        max_tokens=source.randint(1, 24),
        temperature=source.choice([0, 0, 0.7, 1.5]),
        top_p=source.choice([1, 0.8]),
        top_k=source.choice([0, 5]),
        min_p=source.choice([0, 0.05]),
        seed=source.randrange(1000),
        n=source.choice([1, 1, 1, 2, 4]),
        stop_token_ids=source.choice([(), (3, 50)]),
        repetition_penalty=source.choice([1, 1, 1.2]),
        logit_bias=source.choice([None, None, {7: 6, 8: -100}]),
        logprobs=source.choice([None, 2]),
        prompt_logprobs=source.choice([None, None, None, 0]),
    )
    return prompt, params


@pytest.mark.parametrize("kind", [FakeModel, FakeAsyncModel])
@pytest.mark.parametrize(
    ("seed", "windows"),
    [*((seed, (None,)) for seed in range(4)), (4, (6, 6)), (5, (None, 5)), (6, (5, None, 9, 9))],
)
def test_random_requests(seed, windows, kind):
    source = random.Random(seed)
    prefixes = [[source.randrange(VOCAB) for _ in range(30)] for _ in range(4)]
    model = kind(windows=windows)
    engine = Engine(
        model,
        num_blocks=model.layout.blocks_for(66)
        + source.choice([0, 7, 23] if None in windows else [3, 9, 40]),
        max_tokens_per_step=source.choice([8, 19, 64]),
        max_sequences=8,
    )
    asked, got, aborted = {}, {}, set()
    while len(asked) < REQUESTS // 4 or engine.has_work():
        while len(asked) < REQUESTS // 4 and source.random() < 0.4:
            name = str(len(asked))
            asked[name] = random_request(source, prefixes)
            engine.add_request(name, *asked[name])
        if engine.requests and source.random() < 0.02:
            name = source.choice(list(engine.requests))
            aborted.add(name)
            engine.abort(name)
            engine.check()
        for increment in engine.step():
            got.setdefault((increment.request_id, increment.index), []).append(increment)
        engine.check()
        orders = [s.order for s in [*engine.scheduler.running, *engine.scheduler.waiting]]
        assert orders == sorted(orders), "a younger sequence is ahead"
    for name, (prompt, params) in asked.items():
        for index in range(params.n):
            increments = got[name, index]
            reasons = [increment.finish_reason for increment in increments]
            assert all(reason is None for reason in reasons[:-1])
            expected, tokens = naive(prompt, params, index=index), tokens_of(increments)
            if reasons[-1] == "abort":
                assert name in aborted
                assert tokens == expected[: len(tokens)]
            else:
                assert tokens == expected
                stopped = tokens[-1] in params.stop_token_ids
                assert reasons[-1] == ("stop" if stopped else "length")
    now = engine.statistics()
    assert now.running == now.waiting == now.blocks_in_use == 0
    assert now.blocks_cached + now.blocks_free == engine.pool.num_blocks
    if windows[0] is None:  # the other caches hold all sequences, or little for later ones
        assert now.preemptions > 0
        assert now.cached_prompt_tokens > 0
    assert aborted
