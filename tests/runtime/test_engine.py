"""Every output equals the naive loop's, whatever else is in the batch or happens to the cache."""

import random

import pytest

from compress.runtime.engine import Engine
from compress.runtime.sampling_params import SamplingParams
from tests.runtime.fakes import BLOCK, VOCAB, FakeAsyncModel, FakeModel, naive, run, tokens_of

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
