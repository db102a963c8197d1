"""Whole calls, streams and cancellation, on the fake model and on a real tokenizer."""

import asyncio
import gc
import json
import queue
import threading
import time

import pytest

from compress.core.errors import InputError
from compress.runtime.engine import Engine
from compress.runtime.engine_loop import QueueFullError
from compress.runtime.llm import LLM, stop_tokens
from compress.runtime.sampling_params import SamplingParams, SettingError
from tests.runtime.fakes import VOCAB, FakeModel, naive
from tests.runtime.server.conftest import until

GREEDY = SamplingParams(max_tokens=10, temperature=0)


class Letters:
    """One token a character, which is enough to see what text goes where."""

    chat_template = "yes"
    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) % VOCAB for c in text]}

    def decode(self, tokens, **_):
        return "".join(chr(0x4E00 + token) for token in tokens)

    def apply_chat_template(self, messages, **_):
        return "".join(f"{m['role'][0]}:{m['content']}\n" for m in messages) + "a:"


@pytest.fixture
def llm():
    tokenizer = Letters()
    with LLM.from_engine(Engine(FakeModel(), 60, seed=3, tokenizer=tokenizer), tokenizer) as made:
        yield made


def test_generate_keeps_the_order(llm):
    prompts = ["hello there", [1, 2, 3], "x" * 50]
    params = [GREEDY, SamplingParams(max_tokens=25, seed=1, n=2), GREEDY]
    outputs = llm.generate(prompts, params, progress=True)
    assert [output.prompt for output in outputs] == ["hello there", None, "x" * 50]
    for output, setting in zip(outputs, params, strict=True):
        for completion in output.outputs:
            expected = naive(output.prompt_token_ids, setting, index=completion.index)
            assert completion.token_ids == expected
            assert completion.text == Letters().decode(expected)
            assert completion.finish_reason == "length"
    again = llm.generate("x" * 50, GREEDY)
    assert again[0].num_cached_tokens == 48
    assert again[0].outputs == outputs[2].outputs


def test_seeds_come_from_the_engine_and_the_number_of_the_request():
    def texts(seed):
        with LLM.from_engine(Engine(FakeModel(), 60, seed=seed)) as made:
            return [o.outputs[0].token_ids for o in made.generate([[1, 2]] * 3)]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert len({tuple(tokens) for tokens in texts(1)}) == 3


def test_one_bad_request_runs_none(llm):
    with pytest.raises(InputError, match="leaves no room"):
        llm.generate(["fine", "x" * 500], GREEDY)
    with pytest.raises(InputError, match="2 params for 1 prompts"):
        llm.generate("fine", [GREEDY, GREEDY])
    assert llm.statistics().steps == 0


def test_chat_goes_through_the_template(llm):
    (output,) = llm.chat([{"role": "user", "content": "hi"}], GREEDY)
    assert output.prompt_token_ids == Letters()("u:hi\na:")["input_ids"]
    assert len(llm.chat([[{"role": "user", "content": "hi"}]] * 2, GREEDY)) == 2


def test_a_template_gets_its_values_and_nothing_else(llm):
    class Renders(Letters):
        def apply_chat_template(self, conversation, chat_template=None, **values):
            return f"{values.get('mood')}:{conversation[0]['content']}"

    llm.tokenizer = Renders()
    messages = [{"role": "user", "content": "hi"}]
    assert llm.chat_prompt(messages, {"mood": "sad"}) == Letters()("sad:hi")["input_ids"]
    with pytest.raises(SettingError, match="chat_template is not yours"):
        llm.chat_prompt(messages, {"chat_template": "{{ 1 }}"})


def test_streams_run_together_and_equal_generate(llm):
    async def collect(prompt):
        return [increment async for increment in llm.stream(prompt, GREEDY)]

    async def all_of_them():
        return await asyncio.gather(*(collect([n, n + 1]) for n in range(8)))

    for number, increments in enumerate(asyncio.run(all_of_them())):
        tokens = [token for increment in increments for token in increment.token_ids]
        assert tokens == naive([number, number + 1], GREEDY)
        assert increments[-1].finish_reason == "length"
        assert all(increment.finish_reason is None for increment in increments[:-1])


@pytest.mark.parametrize("way", ["close", "cancel"])
def test_a_consumer_that_goes_away_frees_its_blocks(llm, way):
    slow = llm.engine.model.forward

    def forward(batch):
        time.sleep(0.01)
        return slow(batch)

    llm.engine.model.forward = forward
    endless = SamplingParams(max_tokens=150, n=2, seed=0)

    async def closes():
        stream = llm.stream([1, 2, 3], endless)
        async for _ in stream:
            break
        await stream.aclose()

    async def is_cancelled():
        begun = asyncio.Event()

        async def consume():
            async for _ in llm.stream([1, 2, 3], endless):
                begun.set()

        task = asyncio.create_task(consume())
        await begun.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def main():
        await (closes() if way == "close" else is_cancelled())
        for _ in range(200):
            if not llm.engine.has_work():
                return
            await asyncio.sleep(0.005)

    asyncio.run(main())
    assert not llm.engine.has_work()
    llm.engine.check()
    assert llm.statistics().blocks_in_use == 0
    assert 0 < llm.statistics().generated_tokens < 300
    assert until(lambda: not llm._loop._listeners)  # told first, forgotten then


def test_a_broken_model_ends_the_call_and_not_the_engine(llm):
    llm.engine.model.fail_on = 96
    with pytest.raises(RuntimeError, match="the model broke"):
        llm.generate([[1, 2], [96]], GREEDY)
    llm.engine.model.fail_on = None
    assert llm.generate([1, 2], GREEDY)[0].outputs[0].token_ids == naive([1, 2], GREEDY)
    llm.engine.check()


def test_a_stream_that_is_dropped_is_aborted(llm):
    async def main():
        stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=190, seed=0))
        await anext(stream)
        del stream

    asyncio.run(main())
    llm.generate([1], GREEDY)
    assert until(lambda: not llm._loop._listeners)  # told first, forgotten then
    assert llm.statistics().generated_tokens < 190


def test_next_gives_all_that_has_arrived(llm):
    params = SamplingParams(max_tokens=10, n=3, seed=0)
    begin = threading.Event()
    forward = llm.engine.model.forward

    def held(batch):
        begin.wait(10)
        return forward(batch)

    llm.engine.model.forward = held

    async def main():
        stream = llm.stream([1, 2, 3], params)
        with pytest.raises(TimeoutError):  # a wait that was given up loses nothing
            await asyncio.wait_for(stream.next(), 0.02)
        begin.set()
        got = []
        while items := await stream.next():
            time.sleep(0.1)  # the loop is busy while the engine goes on
            got.append(items)
        assert await stream.next() == []
        return got

    got = asyncio.run(main())
    assert len(got) < 10
    for index in range(3):
        tokens = [t for items in got for one in items if one.index == index for t in one.token_ids]
        assert tokens == naive([1, 2, 3], params, index=index)


def test_one_wake_up_serves_all_streams(llm):
    """A step's increments for many streams cross into the event loop together."""
    calls = 0

    async def main():
        nonlocal calls
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def counted(*args):
            nonlocal calls
            calls += 1
            return call(*args)

        loop.call_soon_threadsafe = counted
        streams = llm.streams([[n] for n in range(12)], GREEDY)
        while llm._loop._listeners:  # all of it is computed while the loop does not look
            time.sleep(0.01)
        for stream in streams:
            assert sum(len(one.token_ids) for one in await stream.next()) == 10

    asyncio.run(main())
    assert calls == 1


def test_a_full_queue_refuses_all_or_takes_all():
    engine = Engine(FakeModel(), 60, max_sequences=2)
    release = threading.Event()
    forward = engine.model.forward

    def wait_then_forward(batch):
        release.wait(5)
        return forward(batch)

    engine.model.forward = wait_then_forward
    with LLM.from_engine(engine, max_queued_requests=3) as made:

        async def main():
            streams = made.streams([[1]] * 3, GREEDY)
            with pytest.raises(QueueFullError, match="3 requests are unfinished, of 5"):
                made.streams([[2]] * 3, GREEDY)
            with pytest.raises(InputError, match="6 requests at once; allowed are 5"):
                made.streams([[2]] * 6, GREEDY)  # to try again would not help
            streams += made.streams([[2]] * 2, GREEDY)
            with pytest.raises(QueueFullError):
                made.stream([3], GREEDY)
            await streams.pop().aclose()
            release.set()
            for stream in streams:
                assert [one async for one in stream]
            assert [one async for one in made.stream([3], GREEDY)]

        asyncio.run(main())
        made.engine.check()
    with pytest.raises(InputError, match="max_queued_requests = -1"):
        LLM.from_engine(Engine(FakeModel(), 60), max_queued_requests=-1)


def test_times_are_taken(llm):
    async def main():
        stream = llm.stream([1, 2, 3], GREEDY)
        before = time.monotonic()
        await stream.next()
        assert stream.request.arrived <= stream.request.started <= time.monotonic()
        assert stream.request.arrived <= before

    asyncio.run(main())


def test_a_fault_is_known_until_a_step_succeeds(llm, monkeypatch):
    monkeypatch.setattr("compress.runtime.engine_loop.RETRY", 0.05)
    llm.engine.model.fail_on = 0  # which the loop's own attempts give the model too
    with pytest.raises(RuntimeError, match="the model broke"):
        llm.generate([[0]], GREEDY)
    assert llm.fault == "the engine failed: RuntimeError: the model broke"
    time.sleep(0.3)
    assert llm.fault
    llm.engine.model.fail_on = None
    deadline = time.monotonic() + 5
    while llm.fault and time.monotonic() < deadline:
        time.sleep(0.01)
    assert llm.fault is None
    assert llm.generate([1, 2], GREEDY)[0].outputs[0].token_ids == naive([1, 2], GREEDY)
    llm.engine.check()


def test_a_model_that_gives_nothing_but_nan_is_a_fault(llm, monkeypatch):
    monkeypatch.setattr("compress.runtime.engine_loop.RETRY", 0.05)
    forward = llm.engine.model.forward
    llm.engine.model.forward = lambda batch: forward(batch) * float("nan")
    assert llm.generate([1, 2], GREEDY)[0].outputs[0].finish_reason == "error"
    deadline = time.monotonic() + 5
    while not llm.fault and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "NaN" in llm.fault
    llm.engine.model.forward = forward
    while llm.fault and time.monotonic() < deadline:
        time.sleep(0.01)
    assert llm.fault is None


def test_a_request_that_fails_by_itself_is_no_fault(llm, monkeypatch):
    monkeypatch.setattr("compress.runtime.engine_loop.RETRY", 0.05)
    forward = llm.engine.model.forward
    seen = []

    def poisoned(batch):
        seen.append(llm.fault)
        return forward(batch) * (float("nan") if 7 in batch.tokens.tolist() else 1)

    llm.engine.model.forward = poisoned
    assert llm.generate([7], GREEDY)[0].outputs[0].finish_reason == "error"
    deadline = time.monotonic() + 5
    while len(seen) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(seen) == 2, "one probe, which settles it"
    assert seen == [None, None]
    assert llm.fault is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_fails_its_requests(llm):
    def step():
        raise SystemExit("no exception of the model's")

    llm.engine.step = step
    with pytest.raises(RuntimeError, match="thread ended"):
        llm.generate([1], GREEDY)
    assert "SystemExit" in llm.fault
    with pytest.raises(InputError, match="closed"):
        llm.generate([1], GREEDY)


def test_a_step_that_hangs_is_a_fault(llm, monkeypatch):
    monkeypatch.setattr("compress.runtime.engine_loop.HANGS", 0.05)
    forward = llm.engine.model.forward
    go_on = threading.Event()

    def hangs(batch):
        go_on.wait(10)
        return forward(batch)

    llm.engine.model.forward = hangs

    async def main():
        stream = llm.stream([1], SamplingParams(max_tokens=1))
        deadline = time.monotonic() + 5
        while not llm.fault and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert "hangs" in llm.fault
        go_on.set()
        assert await stream.next()
        assert llm.fault is None

    asyncio.run(main())


def test_a_listener_that_raises_has_its_request_aborted(llm):
    def listen(_):
        raise RuntimeError("the event loop is closed")

    request = llm.engine.prepare("lost", [1, 2, 3], SamplingParams(max_tokens=100, n=2))
    llm._loop.submit([(request, listen)])
    llm.generate([1], SamplingParams(max_tokens=20))
    llm.close()
    assert llm.statistics().blocks_in_use == 0
    assert llm.statistics().generated_tokens <= 23


def test_a_broken_tokenizer_ends_one_request():
    expected = naive([1, 2], GREEDY)
    bad_token = next(token for token in range(3, VOCAB) if token not in expected)

    class Breaks(Letters):
        def decode(self, tokens, **_):
            if bad_token in tokens and len(tokens) > 1:
                raise ValueError("no such token")
            return super().decode(tokens)

    with LLM.from_engine(Engine(FakeModel(), 60, tokenizer=Breaks()), Breaks()) as made:
        bad, good = made.generate([[bad_token], [1, 2]], GREEDY)
    assert bad.outputs[0].finish_reason == "error"
    assert "no such token" in bad.outputs[0].error
    assert good.outputs[0].token_ids == expected


def test_dropping_the_model_ends_its_thread():
    made = LLM.from_engine(Engine(FakeModel(), 60))
    made.generate([1], GREEDY)
    thread = made._loop._thread
    assert thread in threading.enumerate()
    del made
    gc.collect()
    thread.join(2)
    assert not thread.is_alive()


def test_closing_ends_what_was_never_begun_too(llm):
    begun, go_on = threading.Event(), threading.Event()
    forward = llm.engine.model.forward

    def held(batch):
        begun.set()
        go_on.wait(10)
        return forward(batch)

    llm.engine.model.forward = held
    ended = queue.Queue()
    for name in "ab":  # a is in a step, b has only arrived, when the model is closed
        request = llm.engine.prepare(name, [1, 2], GREEDY)
        llm._loop.submit([(request, lambda item, name=name: ended.put((name, item)))])
        assert begun.wait(10)
    closing = threading.Thread(target=llm.close)
    closing.start()
    while not llm._loop._closed:
        time.sleep(0.001)
    go_on.set()
    closing.join(10)
    items = [ended.get(timeout=5) for _ in range(ended.qsize())]
    assert {name for name, item in items if isinstance(item, InputError)} == {"a", "b"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_fails_its_requests_whatever_state_the_engine_is_in(llm, monkeypatch):
    def broken():
        raise AssertionError("the accounting is wrong")

    monkeypatch.setattr(llm.engine, "reset", broken)
    llm.engine.model.fail_on = 2
    ended = queue.Queue()
    llm._loop.submit([(llm.engine.prepare("a", [1, 2], GREEDY), ended.put)])
    assert "the accounting is wrong" in str(ended.get(timeout=5))


def test_event_loops_are_not_kept(llm):
    async def main():
        assert len([one async for one in llm.stream([1, 2], GREEDY)]) == 10

    for _ in range(3):
        asyncio.run(main())
    # The engine's thread lets go of its last answer in a moment.
    assert until(lambda: gc.collect() >= 0 and not llm._doorbells)


def test_a_closed_model_says_so(llm):
    llm.close()
    with pytest.raises(InputError, match="closed"):
        llm.generate("x", GREEDY)


def test_stop_tokens_come_from_all_three_places(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert stop_tokens(tmp_path, Letters()) == {0, 5}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert stop_tokens(tmp_path, Letters()) == {0, 5, 7, 8}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(InputError, match=r"generation_config\.json"):
        stop_tokens(tmp_path, Letters())
