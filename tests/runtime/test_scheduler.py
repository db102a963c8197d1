"""Who is in a step: decodes always, prompts in order, nothing that can never fit."""

import pytest

from compress.core.errors import InputError
from compress.runtime.engine import Engine
from compress.runtime.sampling_params import SamplingParams
from tests.runtime.fakes import BLOCK, VOCAB, FakeModel, logits_of, naive, run, tokens_of


def greedy(count):
    return SamplingParams(max_tokens=count, temperature=0)


def test_a_long_prompt_holds_up_no_decode():
    model = FakeModel(max_context=1000)
    engine = Engine(model, 400, max_tokens_per_step=16, max_sequences=8)
    for name in "abcd":
        engine.add_request(name, [ord(name) % VOCAB], greedy(100))
    engine.step()
    engine.add_request("long", list(range(90)) * 5, greedy(3))
    steps = 0
    while not engine.requests["long"].sequences[0].sampling.produced:
        increments = engine.step()
        got = {increment.request_id for increment in increments}
        assert len(model.batches[-1].rows) == len(increments), "logits that nobody wants"
        assert got >= set("abcd"), "a decode waited"
        assert len(model.batches[-1].tokens) <= 16
        steps += 1
    assert steps == -(-450 // (16 - 4)), "the budget was not used up"


def test_prompts_are_computed_in_order_of_arrival():
    engine = Engine(FakeModel(), 200, max_tokens_per_step=8, max_sequences=8)
    for number in range(6):
        engine.add_request(str(number), [number] * 20, greedy(1))
    assert [name for name, _ in run(engine)] == list("012345")


def test_the_youngest_is_preempted_and_waits_at_the_head():
    engine = Engine(FakeModel(), 6, max_sequences=4)
    for name in "abc":
        engine.add_request(name, [ord(name) % VOCAB] * 7, greedy(12))
    got = run(engine)
    assert engine.statistics().preemptions > 0
    ends = [name for name, _ in sorted(got, key=lambda key: key[0])]
    assert ends == list("abc")
    for name in "abc":
        assert tokens_of(got[name, 0]) == naive([ord(name) % VOCAB] * 7, greedy(12))


def test_forks_count_as_the_sequences_they_become():
    engine = Engine(FakeModel(), 100, max_sequences=4)
    engine.add_request("a", [1, 2, 3], SamplingParams(n=3, max_tokens=4, seed=0))
    engine.add_request("b", [4, 5, 6], SamplingParams(n=2, max_tokens=4, seed=0))
    while engine.has_work():
        engine.step()
        assert engine.statistics().running <= 4
    with pytest.raises(InputError, match="n = 5 is more than max_sequences = 4"):
        engine.add_request("c", [1], SamplingParams(n=5))


def test_what_can_never_run_is_refused_with_the_sizes():
    engine = Engine(FakeModel(max_context=50), 10)
    with pytest.raises(InputError, match=r"prompt of 50 tokens .* context of 50"):
        engine.add_request("a", [1] * 50, greedy(1))
    with pytest.raises(
        InputError, match=r"prompt of 30 tokens and 12 new .* of 41, and it holds 40"
    ):
        engine.add_request("a", [1] * 30, greedy(12))
    with pytest.raises(InputError, match="no token"):
        engine.add_request("a", [], greedy(1))
    for token in (-1, VOCAB):
        with pytest.raises(InputError, match=f"outside 0 to {VOCAB - 1}"):
            engine.add_request("a", [token], greedy(1))
    with pytest.raises(InputError, match="needs a tokenizer"):
        engine.add_request("a", [1], SamplingParams(stop="x"))
    with pytest.raises(InputError, match="stop_token_ids"):
        engine.add_request("a", [1], SamplingParams(stop_token_ids=[VOCAB]))
    assert not engine.has_work()
    with pytest.raises(InputError, match="holds nothing"):
        Engine(FakeModel(), 0)
    with pytest.raises(InputError, match="max_sequences = 9 with max_tokens_per_step = 8"):
        Engine(FakeModel(), 9, max_tokens_per_step=8, max_sequences=9)


def test_what_just_fits_fills_the_cache_to_the_last_slot():
    engine = Engine(FakeModel(), 10)
    engine.add_request("a", [1] * 30, greedy(11))  # 40 tokens are written, the 41st is not
    assert tokens_of(run(engine)["a", 0]) == naive([1] * 30, greedy(11))
    assert engine.statistics().preemptions == 0


@pytest.mark.parametrize("most", [100, None])
def test_the_context_ends_an_output(most):
    engine = Engine(FakeModel(max_context=20), 10)
    engine.add_request("a", [1] * 15, SamplingParams(max_tokens=most, temperature=0))
    increments = run(engine)["a", 0]
    assert tokens_of(increments) == naive([1] * 15, greedy(5))
    assert increments[-1].finish_reason == "length"


def test_as_many_tokens_as_the_cache_holds():
    engine = Engine(FakeModel(), 10)
    engine.add_request("a", [1] * 15, SamplingParams(max_tokens=None, temperature=0))
    assert len(run(engine)["a", 0]) == 10 * BLOCK - 15 + 1


def test_aborting_frees_the_blocks_at_once_and_says_so():
    engine = Engine(FakeModel(), 40, max_tokens_per_step=8, max_sequences=8)
    engine.add_request("runs", [1] * 4, greedy(20))
    engine.add_request("forks", [2] * 4, SamplingParams(n=2, max_tokens=20, seed=0))
    engine.step()
    engine.add_request("prefills", [3] * 60, greedy(20))
    engine.step()
    engine.add_request("waits", [4] * 100, SamplingParams(n=3, max_tokens=5))
    for name in ("runs", "forks", "prefills", "waits", "unknown"):
        engine.abort(name)
    engine.check()
    assert engine.statistics().blocks_in_use == 0
    assert engine.statistics().running == engine.statistics().waiting == 0
    ends = [(i.request_id, i.index, i.finish_reason) for i in engine.step()]
    outputs = [("runs", 1), ("forks", 2), ("prefills", 1), ("waits", 3)]
    assert ends == [(name, n, "abort") for name, count in outputs for n in range(count)]
    assert not engine.has_work()


def test_stop_tokens_end_an_output():
    (first, second, *_) = naive([1, 2, 3], greedy(9))
    assert first != second
    engine = Engine(FakeModel(), 40, eos_ids=[second])
    engine.add_request("eos", [1, 2, 3], greedy(9))
    ignoring = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    engine.add_request("ignored", [1, 2, 3], ignoring)
    own = SamplingParams(max_tokens=9, temperature=0, stop_token_ids=[first])
    engine.add_request("own", [1, 2, 3], own)
    got = run(engine)
    assert tokens_of(got["eos", 0]) == [first, second]
    assert tokens_of(got["own", 0]) == [first]
    assert got["own", 0][-1].finish_reason == got["eos", 0][-1].finish_reason == "stop"
    assert len(tokens_of(got["ignored", 0])) == 9


@pytest.mark.parametrize("budget", [3, 64])
@pytest.mark.parametrize("blocks", [9, 100])
def test_prompt_logprobs_are_of_every_prompt_token(budget, blocks):
    engine = Engine(FakeModel(), blocks, max_tokens_per_step=budget, max_sequences=3)
    params = SamplingParams(max_tokens=20, seed=0, prompt_logprobs=2)
    prompt = [5, 9, 13, 2, 2, 80, 41, 7, 7, 7, 1]
    engine.add_request("before", prompt, greedy(2))  # fills the prefix cache
    run(engine)
    request = engine.add_request("a", prompt, params)
    other = engine.add_request("b", prompt, params)
    run(engine)
    assert (engine.statistics().preemptions > 0) == (blocks == 9)
    assert other.prompt_logprobs == request.prompt_logprobs
    assert request.prompt_logprobs is not None
    assert request.prompt_logprobs[0] is None
    assert len(request.prompt_logprobs) == len(prompt)
    for place, entry in enumerate(request.prompt_logprobs[1:], start=1):
        expected = logits_of(prompt[:place]).log_softmax(-1)
        assert entry is not None
        assert entry.token_id == prompt[place]
        assert entry.logprob == pytest.approx(expected[prompt[place]].item(), abs=1e-5)
        assert [token for token, _ in entry.top] == expected.topk(2).indices.tolist()


def test_one_name_runs_once():
    engine = Engine(FakeModel(), 20)
    engine.add_request("a", [1], greedy(2))
    with pytest.raises(InputError, match="running already"):
        engine.add_request("a", [1], greedy(2))
    run(engine)
    engine.add_request("a", [1], greedy(2))


def test_a_failed_step_leaves_a_usable_engine():
    model = FakeModel()
    engine = Engine(model, 20)
    for name in "ab":
        engine.add_request(name, [ord(name) % VOCAB] * 9, greedy(9))
    engine.step()
    model.fail_on = naive([ord("b") % VOCAB] * 9, greedy(9))[0]
    with pytest.raises(RuntimeError, match="broke"):
        engine.step()
    model.fail_on = None
    engine.reset()
    engine.check()
    assert engine.statistics().blocks_free == 20
    engine.add_request("a", [1] * 9, greedy(9))
    assert tokens_of(run(engine)["a", 0]) == naive([1] * 9, greedy(9))


@pytest.mark.parametrize("length", [4, 6])
def test_what_forks_publish_is_found_only_after_their_prompt(length):
    engine = Engine(FakeModel(), 100)
    prompt = list(range(length))
    params = SamplingParams(n=2, max_tokens=14, seed=0)
    engine.add_request("a", prompt, params)
    run(engine)
    for index in range(2):
        whole = prompt + naive(prompt, params, index=index)
        alone = engine.add_request(f"alone {index}", whole[4:13], greedy(3))
        after = engine.add_request(f"after {index}", whole[:13], greedy(3))
        got = run(engine)
        assert tokens_of(got[f"alone {index}", 0]) == naive(whole[4:13], greedy(3))
        assert tokens_of(got[f"after {index}", 0]) == naive(whole[:13], greedy(3))
        assert alone.cached_tokens == 0
        assert after.cached_tokens == 12
