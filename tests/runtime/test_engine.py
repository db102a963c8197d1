"""Every output equals the naive loop's, whatever else is in the batch or happens to the cache."""

import math
import random

import pytest

from compress.runtime.engine import Engine
from compress.runtime.sampling_params import SamplingParams
from tests.runtime.fakes import (
    BLOCK,
    VOCAB,
    FakeAsyncModel,
    FakeModel,
    drawn_by_device,
    logits_of,
    naive,
    run,
    tokens_of,
)

GREEDY = SamplingParams(max_tokens=12, temperature=0)
SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, top_k=40, seed=7)
PENALIZED = SamplingParams(
    max_tokens=12, seed=3, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4
)


def prompts_of(count, longest=40, seed=0):
    source = random.Random(seed)
    return [
        [source.randrange(VOCAB) for _ in range(source.randint(1, longest))] for _ in range(count)
    ]


@pytest.fixture(params=[FakeModel, FakeAsyncModel], ids=["waited for", "one step ahead"])
def model(request):
    return request.param()


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALIZED])
@pytest.mark.parametrize(
    ("blocks", "budget", "together"),
    [(500, 512, 32), (500, 5, 4), (20, 64, 8), (16, 7, 5), (500, 1, 1)],
    ids=["batch", "chunks", "preempted", "preempted in chunks", "alone"],
)
def test_outputs_equal_the_naive_loop(model, params, blocks, budget, together):
    engine = Engine(model, blocks, max_tokens_per_step=budget, max_sequences=together, seed=1)
    prompts = prompts_of(32)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    got = run(engine)
    for number, prompt in enumerate(prompts):
        assert tokens_of(got[str(number), 0]) == naive(prompt, params), number
    assert engine.statistics().generated_tokens == 32 * 12
    assert bool(engine.statistics().preemptions) == (blocks < 500)


def test_a_prefix_hit_changes_nothing_and_computes_less(model):
    engine = Engine(model, 100)
    prompt = prompts_of(1, longest=40, seed=5)[0] + list(range(33))
    first = engine.add_request("a", prompt, GREEDY)
    a = run(engine)
    second = engine.add_request("b", prompt, GREEDY)
    b = run(engine)
    assert tokens_of(a["a", 0]) == tokens_of(b["b", 0]) == naive(prompt, GREEDY)
    assert first.cached_tokens == 0
    assert second.cached_tokens == (len(prompt) - 1) // BLOCK * BLOCK
    assert engine.statistics().cached_prompt_tokens == second.cached_tokens


@pytest.mark.parametrize("length", [8, 9, 11])
@pytest.mark.parametrize("blocks", [200, 9])
def test_forks_compute_the_prompt_once(model, length, blocks):
    params = SamplingParams(max_tokens=9, n=5, seed=4)
    engine = Engine(model, blocks)
    prompt = list(range(length))
    engine.add_request("a", prompt, params)
    got = run(engine)
    outputs = [tokens_of(got["a", index]) for index in range(5)]
    assert outputs == [naive(prompt, params, index=index) for index in range(5)]
    assert len({tuple(output) for output in outputs}) == 5
    if blocks == 200:
        assert engine.statistics().computed_tokens == length + 5 * 8
    else:
        assert engine.statistics().preemptions > 0


def test_a_step_is_launched_before_the_last_one_is_known():
    """Of three greedy requests one ends early, by a stop token that only the host looks for."""
    model = FakeAsyncModel()
    engine = Engine(model, 100)
    prompts = prompts_of(3)
    stop = naive(prompts[1], GREEDY)[4]
    early = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[stop])
    asked = [GREEDY, early, GREEDY]
    expected = [naive(*pair) for pair in zip(prompts, asked, strict=True)]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, asked[number])
    unknown, got = [], {}
    while engine.has_work():
        for increment in engine.step():
            got.setdefault(increment.request_id, []).extend(increment.token_ids)
        engine.check()
        unknown.append(model.unfinished)
    assert [got[str(number)] for number in range(3)] == expected
    assert unknown == [1] * 12 + [0]
    assert [len(batch.tokens) for batch in model.batches[1:]] == [3] * len(expected[1]) + [2] * (
        11 - len(expected[1])
    ), "after its last token a sequence is computed once more, and no oftener"


def test_log_probabilities_are_the_same_a_step_ahead():
    """Some steps then have a host's draws, some a device's, and some both kinds of requests."""
    asked = [
        SamplingParams(max_tokens=9, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=4, seed=1, logprobs=3),
        SamplingParams(max_tokens=12, seed=2, top_p=0.9),
        SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=2),
        SamplingParams(max_tokens=6, seed=3, min_tokens=4, stop_token_ids=list(range(0, VOCAB, 2))),
    ]
    prompts = prompts_of(len(asked), longest=20)
    outputs = []
    for kind in (FakeModel, FakeAsyncModel):
        engine = Engine(kind(), 100, max_tokens_per_step=16, max_sequences=8)
        requests = []
        got = {}
        for number, pair in enumerate(zip(prompts, asked, strict=True)):
            requests.append(engine.add_request(str(number), *pair))
            for increment in engine.step():  # they come one by one, so that steps are mixed
                got.setdefault(increment.request_id, []).append(increment)
        for (name, _), increments in run(engine).items():
            got.setdefault(name, []).extend(increments)
        for params in asked:  # and alone
            engine.add_request("alone", prompts[0], params)
            got[str(params)] = run(engine)["alone", 0]
        outputs.append((got, [request.prompt_logprobs for request in requests]))
    assert outputs[0] == outputs[1]
    assert all(increment.logprobs for increment in outputs[0][0]["1"])
    assert outputs[0][1][3]


def test_blocks_of_one_token_are_published_by_those_that_go_on():
    """A sequence that has ended is still in the step that was launched before that was known."""
    engine = Engine(FakeAsyncModel(block_size=1), 200)
    prompts = prompts_of(4)
    stop = [naive(prompt, GREEDY)[3 + n] for n, prompt in enumerate(prompts)]
    params = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=stop)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    got = run(engine)
    for number, prompt in enumerate(prompts):
        assert tokens_of(got[str(number), 0]) == naive(prompt, params)


def test_a_model_that_breaks_a_step_ahead_leaves_an_engine_that_works():
    model = FakeAsyncModel()
    engine = Engine(model, 100)
    prompt = prompts_of(1)[0]
    model.fail_on = naive(prompt, GREEDY)[2]
    engine.add_request("a", prompt, GREEDY)
    with pytest.raises(RuntimeError, match="broke"):
        run(engine)
    engine.reset()
    assert not engine.has_work()
    model.fail_on, model.unfinished = None, 0
    engine.add_request("b", prompt, GREEDY)
    assert tokens_of(run(engine)["b", 0]) == naive(prompt, GREEDY)


def breaking(kind, ill):
    """A model whose logits hold NaN wherever `ill` is the token before, while `model.ill` is."""

    class Breaks(kind):
        def forward(self, batch):
            logits = super().forward(batch)
            slots = batch.slots[0, batch.rows]
            before = self.cache.reshape(-1, 3)[slots.numpy(), 0]
            if self.ill:
                logits[before == ill] = math.nan
            return logits

    Breaks.ill = True
    return Breaks()


@pytest.mark.parametrize("kind", [FakeModel, FakeAsyncModel])
@pytest.mark.parametrize("budget", [512, 5])
def test_nan_ends_one_sequence_and_the_others_are_as_if_alone(kind, budget):
    """Some of the batch meet the token in their prompt, some draw it, some never do."""
    prompts = prompts_of(24, seed=2)
    kinds = [GREEDY, SAMPLED, PENALIZED, SamplingParams(max_tokens=12, seed=1, n=3, logprobs=1)]
    asked = [(prompt, kinds[number % 4]) for number, prompt in enumerate(prompts)]
    ill = naive(prompts[0], GREEDY)[5]
    prompts[4][-1] = ill
    model = breaking(kind, ill)
    engine = Engine(model, 500, max_tokens_per_step=max(budget, 12), max_sequences=12)
    for number, pair in enumerate(asked):
        engine.add_request(str(number), *pair)
    got = run(engine)
    ended = []
    for number, (prompt, params) in enumerate(asked):
        for index in range(params.n):
            expected, increments = naive(prompt, params, index=index), got[str(number), index]
            if prompt[-1] == ill:
                expected, bad = [], True
            elif bad := ill in expected[:-1]:
                expected = expected[: expected.index(ill) + 1]
            assert tokens_of(increments) == expected
            assert increments[-1].finish_reason == ("error" if bad else "length")
            assert [bool(i.error) for i in increments] == [False] * (len(increments) - 1) + [bad]
            ended += [increments[-1].error] * bad
    assert len(ended) >= 3
    assert set(ended) == {"drawing a token failed: the model's logits hold NaN"}
    assert not engine.requests
    assert engine.statistics().blocks_in_use == 0


@pytest.mark.parametrize("kind", [FakeModel, FakeAsyncModel])
def test_what_held_nan_is_not_found_again(kind):
    prompt = [*range(30), 90]
    model = breaking(kind, 90)
    engine = Engine(model, 100)
    engine.add_request("ill", prompt, GREEDY)
    assert run(engine)["ill", 0][-1].finish_reason == "error"
    model.ill = False
    again = engine.add_request("well", prompt, GREEDY)
    assert tokens_of(run(engine)["well", 0]) == naive(prompt, GREEDY)
    assert again.cached_tokens == 0


@pytest.mark.parametrize("kind", [FakeModel, FakeAsyncModel])
@pytest.mark.parametrize(("place", "budget"), [(3, 512), (3, 8), (28, 8), (29, 512)])
def test_nan_in_the_prompts_log_probabilities_ends_the_request(kind, place, budget):
    prompt = list(range(30))
    engine = Engine(breaking(kind, place), 100, max_tokens_per_step=budget, max_sequences=8)
    params = SamplingParams(max_tokens=4, n=3, prompt_logprobs=1, seed=1)
    engine.add_request("ill", prompt, params)
    engine.add_request("well", [40, 41], GREEDY)
    got = run(engine)
    assert tokens_of(got["well", 0]) == naive([40, 41], GREEDY)
    for index in range(3):
        (increment,) = got["ill", index]
        assert (increment.finish_reason, increment.token_ids) == ("error", [])
        what = "drawing a token" if place == 29 else "the prompt's log-probabilities"
        assert increment.error == f"{what} failed: the model's logits hold NaN"
    assert not engine.requests
    engine.model.ill = False
    again = engine.add_request("again", prompt, GREEDY)
    assert tokens_of(run(engine)["again", 0]) == naive(prompt, GREEDY)
    assert again.cached_tokens == 0, "what held NaN is found again"
    assert engine.statistics().blocks_in_use == 0


def test_infinity_is_no_token_unless_it_is_the_likeliest_that_is_wanted():
    """As on a device (kernels/sampling); where no token is possible none is drawn."""
    row = logits_of([1]).numpy().copy()
    row[5] = math.inf
    assert drawn_by_device(row, GREEDY, 0.0) == 5
    assert drawn_by_device(row, SAMPLED, 0.5) == -1
    row[:] = -math.inf
    assert drawn_by_device(row, GREEDY, 0.0) == -1
