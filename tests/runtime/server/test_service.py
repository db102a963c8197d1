"""What is taken, refused, and ended, by the state of the server and of its engine."""

import asyncio
import gc
import re
import threading
import time

import pytest

from compress.core.errors import InputError
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.server import service as service_module
from compress.runtime.server.errors import ApiError
from compress.runtime.server.request_log import RequestRecord, current_record
from compress.runtime.server.service import ServerSettings, Service
from tests.runtime.fakes import naive, tokens_of
from tests.runtime.server.conftest import until

PARAMS = SamplingParams(max_tokens=8, temperature=0)
PROMPT = [1, 2, 3, 4, 5]


def service_of(llm=None) -> Service:
    service = Service(ServerSettings(("m",)))
    if llm:
        service.attach(llm)
    return service


async def all_of(stream) -> list:
    got = []
    while news := await stream.next():
        got += news
    return got


def number(service: Service, name: str, **labels) -> float:
    """A value of the metrics."""
    value = service.metrics.registry.get_sample_value(
        f"compress:{name}", {"model_name": "m", **labels}
    )
    return value or 0.0


def test_answers_are_those_of_the_engine(make_letters):
    service = service_of(make_letters())

    async def run():
        streams = service.submit([PROMPT, PROMPT[:2]], [PARAMS, PARAMS])
        assert service.active == 2
        return await asyncio.gather(*map(all_of, streams))

    first, second = asyncio.run(run())
    assert tokens_of(first) == naive(PROMPT, PARAMS)
    assert tokens_of(second) == naive(PROMPT[:2], PARAMS)
    assert service.active == 0


def test_loading():
    service = service_of()
    may_go_on, ready = threading.Event(), threading.Event()
    llm = type("LLM", (), {"fault": None})()

    def make():
        may_go_on.wait(5)
        return llm

    service.load(make, ready.set, pytest.fail)
    assert (service.state, service.ready, service.health()) == ("loading", False, (True, "ok"))
    with pytest.raises(ApiError, match="being loaded") as error:
        _ = service.llm
    assert (error.value.status, error.value.code) == (503, "loading")
    assert int(error.value.headers["Retry-After"]) > 0
    may_go_on.set()
    assert ready.wait(5)
    assert service.llm is llm
    assert service.ready


def test_a_model_that_cannot_be_loaded():
    service, failed = service_of(), []

    def make():
        raise InputError("no such model")

    service.load(make, pytest.fail, failed.append)
    assert until(lambda: failed)
    assert str(failed[0]) == "no such model"
    assert service.state == "loading"


@pytest.mark.parametrize(
    ("settings", "prompts", "kept"),
    [
        ({"logprobs": 20, "max_tokens": 50}, 1, 50 * 21),
        ({"logprobs": 20, "max_tokens": 50, "n": 3}, 2, 2 * 3 * 50 * 21),
        ({"logprobs": 0, "max_tokens": None}, 1, 200 - len(PROMPT)),  # up to the context
        ({"prompt_logprobs": 4, "max_tokens": 1}, 3, 3 * len(PROMPT) * 5),
    ],
)
def test_log_probabilities_of_a_request_are_bounded(
    make_letters, monkeypatch, settings, prompts, kept
):
    service = service_of(make_letters(max_sequences=8))
    params = SamplingParams(temperature=0, **settings)

    async def run():
        monkeypatch.setattr("compress.runtime.server.service.MOST_LOGPROBS", kept - 1)
        with pytest.raises(ApiError, match=f"could keep {kept:,} log-prob") as error:
            service.submit([PROMPT] * prompts, [params] * prompts)
        assert (error.value.status, error.value.param) == (400, "logprobs")
        monkeypatch.setattr("compress.runtime.server.service.MOST_LOGPROBS", kept)
        await asyncio.gather(*map(all_of, service.submit([PROMPT] * prompts, [params] * prompts)))

    asyncio.run(run())


def test_a_full_queue_refuses_all_of_a_request(make_letters):
    service = service_of(make_letters(delay=0.02, max_sequences=2, max_queued_requests=1))

    async def run():
        streams = service.submit([PROMPT] * 2, [PARAMS] * 2)
        with pytest.raises(ApiError) as error:
            service.submit([PROMPT] * 2, [PARAMS] * 2)
        assert (error.value.status, error.value.code) == (429, "queue_full")
        assert 1 <= int(error.value.headers["Retry-After"]) <= 60
        streams += service.submit([PROMPT], [PARAMS])
        return await asyncio.gather(*map(all_of, streams))

    for got in asyncio.run(run()):
        assert tokens_of(got) == naive(PROMPT, PARAMS)


def test_how_long_to_wait_follows_the_queue_and_the_times_measured(make_letters):
    service = service_of(make_letters(delay=0.02, max_sequences=1))

    async def run():
        began = time.monotonic()
        await all_of(service.submit([PROMPT], [PARAMS])[0])
        # From 1.0 s by a tenth towards what it took, which is 8 steps of 20 ms and more.
        seconds = service._seconds
        assert 0.9 < seconds < 0.9 + 0.1 * (time.monotonic() - began) + 1e-9
        streams = service.submit([PROMPT] * 12, [PARAMS] * 12)
        await streams[0].next()
        assert service._wait() == pytest.approx(12 * seconds)  # 11 wait, and the one that asks
        service._seconds = 1000.0
        assert service._wait() == 60
        for stream in streams:
            await stream.aclose()

    asyncio.run(run())


def test_bad_input_queues_nothing(make_letters):
    service = service_of(make_letters())

    async def run():
        with pytest.raises(InputError, match="outside 0 to"):
            service.submit([PROMPT, [1000]], [PARAMS, PARAMS])

    asyncio.run(run())
    assert service.active == 0
    assert service.llm.statistics().waiting == 0


def test_drain_takes_nothing_new_and_finishes_the_rest(make_letters):
    service = service_of(make_letters(delay=0.005, max_sequences=1))

    async def run():
        streams = service.submit([PROMPT] * 2, [PARAMS] * 2)  # one of them waits in the queue
        service.drain()
        with pytest.raises(ApiError, match="shutting down") as error:
            service.submit([PROMPT], [PARAMS])
        assert (error.value.status, error.value.code) == (503, "draining")
        return await asyncio.gather(*map(all_of, streams))

    for got in asyncio.run(run()):
        assert tokens_of(got) == naive(PROMPT, PARAMS)
    assert service.active == 0
    assert service.cut_off() == 0


def test_what_is_cut_off_gets_what_had_arrived_and_then_an_error(make_letters):
    llm = make_letters(delay=0.01)
    service = service_of(llm)
    long = SamplingParams(max_tokens=150, temperature=0)

    async def run():
        stream = service.submit([PROMPT], [long])[0]
        got = await stream.next()
        service.drain()
        assert service.cut_off() == 1
        error = None
        while error is None:
            try:
                got += await stream.next()
            except ApiError as raised:
                error = raised
        assert error.status == 503
        assert "shutting down" in error.message
        return tokens_of(got)

    got = asyncio.run(run())
    assert got == naive(PROMPT, long)[: len(got)]
    assert service.active == 0
    assert until(lambda: llm.statistics().blocks_in_use == 0)
    assert number(service, "request_success_total", finished_reason="error") == 1


def test_a_step_that_raises_fails_its_requests_and_no_later_one(make_letters, caplog):
    llm = make_letters(delay=0.01)
    service = service_of(llm)
    llm.engine.model.fail_on = 90

    async def run():
        streams = service.submit([PROMPT, [90, 1]], [PARAMS, PARAMS])
        for stream in streams:
            with pytest.raises(ApiError, match="engine failed") as error:
                await all_of(stream)
            assert (error.value.status, error.value.code) == (500, "engine_fault")
            assert "the model broke" not in error.value.message  # the log has it
        assert service.active == 0
        # The engine tries by itself whether it works again; until then new work is refused.
        assert until(lambda: service.ready, 5)
        return await all_of(service.submit([PROMPT], [PARAMS])[0])

    assert tokens_of(asyncio.run(run())) == naive(PROMPT, PARAMS)
    assert number(service, "request_success_total", finished_reason="error") == 2
    (told,) = caplog.records  # once, though two requests got it
    assert told.message == "the engine failed: the model broke"
    assert told.exc_info


def test_an_engine_that_keeps_failing_turns_health_red(make_letters):
    llm = make_letters()
    service = service_of(llm)

    def broken(batch):
        raise RuntimeError("no more")

    working, llm.engine.model.forward = llm.engine.model.forward, broken

    async def run():
        with pytest.raises(ApiError, match="engine failed"):
            await all_of(service.submit([PROMPT], [PARAMS])[0])

    asyncio.run(run())
    assert service.health() == (False, "the engine failed: RuntimeError: no more")
    assert service.state == "fault"
    with pytest.raises(ApiError, match="has failed") as error:
        _ = service.llm
    assert (error.value.status, error.value.code) == (503, "fault")
    llm.engine.model.forward = working
    assert until(lambda: service.ready, 5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_dies_is_not_coming_back(make_letters):
    llm = make_letters(delay=0.01)
    service = service_of(llm)

    async def run():
        stream = service.submit([PROMPT], [PARAMS])[0]
        await stream.next()

        def broken():
            raise SystemExit("the thread ends")

        llm.engine.step = broken
        async with asyncio.timeout(5):
            with pytest.raises(ApiError, match="engine failed") as error:
                await all_of(stream)
        assert error.value.status == 500
        with pytest.raises(ApiError) as error:
            service.submit([PROMPT], [PARAMS])
        assert (error.value.status, error.value.code) == (503, "fault")

    asyncio.run(run())
    time.sleep(1.2)  # longer than the engine waits before it tries again
    assert service.health() == (False, "the engine failed: SystemExit: the thread ends")
    assert service.active == 0


def test_an_engine_that_hangs_leaves_nobody_waiting(make_letters, monkeypatch):
    monkeypatch.setattr(service_module, "WATCH", 0.01)
    monkeypatch.setattr("compress.runtime.engine_loop.HANGS", 0.05)
    llm = make_letters()
    service = service_of(llm)
    hangs, working = threading.Event(), llm.engine.model.forward

    def hang(batch):
        hangs.wait(10)
        return working(batch)

    llm.engine.model.forward = hang

    async def run():
        watch = asyncio.create_task(service.watch())
        stream = service.submit([PROMPT], [PARAMS])[0]
        async with asyncio.timeout(5):
            with pytest.raises(ApiError, match="hangs") as error:
                await stream.next()
        assert error.value.status == 500
        watch.cancel()

    asyncio.run(run())
    assert service.state == "fault"
    hangs.set()
    assert until(lambda: service.ready, 5)
    assert until(lambda: llm.statistics().blocks_in_use == 0)  # the request was aborted
    llm.engine.check()


@pytest.mark.parametrize("how", ["aclose", "drop"])
def test_a_consumer_that_leaves_frees_its_blocks(make_letters, how):
    llm = make_letters(delay=0.005)
    service = service_of(llm)

    async def run():
        stream = service.submit([PROMPT], [SamplingParams(max_tokens=150, n=2)])[0]
        await stream.next()
        assert llm.statistics().blocks_in_use > 0
        if how == "aclose":
            await stream.aclose()
        del stream
        gc.collect()

    asyncio.run(run())
    assert service.active == 0
    assert until(lambda: llm.statistics().blocks_in_use == 0)
    service.metrics.text()  # counts what was dropped
    assert number(service, "request_success_total", finished_reason="abort") == 2


def test_a_dropped_stream_may_be_found_while_metrics_are_written(make_letters):
    """Garbage is collected anywhere, also by a thread that holds the metrics' locks."""
    service = service_of(make_letters(delay=0.005))

    async def run():
        streams = service.submit([PROMPT], [SamplingParams(max_tokens=150)])
        lock = service.metrics._finished._lock

        def drop():
            with lock:
                streams.clear()

        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        thread.join(5)
        return thread.is_alive()

    assert not asyncio.run(run())


def test_metrics_count_what_went_by(make_letters):
    llm = make_letters(delay=0.01)
    service = service_of(llm)
    record = RequestRecord("id", time.monotonic())
    params = SamplingParams(max_tokens=8, temperature=0.8, seed=1, n=2, ignore_eos=True)

    async def run():
        current_record.set(record)
        streams = service.submit([PROMPT, PROMPT], [params, params])
        await asyncio.gather(*map(all_of, streams))

    asyncio.run(run())
    statistics = llm.statistics()
    assert number(service, "request_success_total", finished_reason="length") == 4
    assert number(service, "generation_tokens_total") == 32 == statistics.generated_tokens
    assert (
        number(service, "prompt_tokens_total")
        == 10
        == number(service, "prefix_cache_queries_total")
    )
    assert number(service, "prefix_cache_hits_total") == statistics.cached_prompt_tokens
    for name, count in {
        "time_to_first_token_seconds": 2,  # a request
        "request_queue_time_seconds": 2,
        "e2e_request_latency_seconds": 2,
        "request_time_per_output_token_seconds": 4,  # an output
        "inter_token_latency_seconds": 4 * 7,  # a pair of tokens
    }.items():
        assert number(service, f"{name}_count") == count, name
    # 8 steps of 10 ms and more: an output's gaps sum up to the time between its ends.
    gaps = number(service, "inter_token_latency_seconds_sum")
    means = number(service, "request_time_per_output_token_seconds_sum")
    assert gaps == pytest.approx(7 * means)
    assert gaps >= 4 * 7 * 0.01
    first, end = (
        number(service, f"{name}_seconds_sum")
        for name in ("time_to_first_token", "e2e_request_latency")
    )
    assert number(service, "request_queue_time_seconds_sum") < first < end
    assert (record.prompt_tokens, record.output_tokens) == (10, 32)
    assert record.first_token is not None


def test_metrics_are_text_that_prometheus_reads(make_letters):
    from prometheus_client.parser import text_string_to_metric_families

    service = service_of()
    for llm in (None, make_letters()):  # while it is loaded too
        if llm:
            service.attach(llm)
        families = text_string_to_metric_families(service.metrics.text().decode())
        names = {family.name for family in families}
        assert {
            "compress:num_requests_running",
            "compress:num_requests_waiting",
            "compress:kv_cache_usage_perc",
            "compress:prefix_cache_hits",
            "compress:num_preemptions",
            "compress:time_to_first_token_seconds",
            "process_resident_memory_bytes",
            "process_open_fds",
        } <= names
        assert all(re.fullmatch(r"[a-z_:0-9]+", name) for name in names)


def test_blocks_in_use_are_shown(make_letters):
    llm = make_letters(delay=0.01, num_blocks=400)
    service = service_of(llm)

    async def run():
        stream = service.submit([PROMPT], [SamplingParams(max_tokens=100)])[0]
        await stream.next()
        assert number(service, "num_requests_running") == 1
        share = number(service, "kv_cache_usage_perc")
        assert share == pytest.approx(llm.statistics().blocks_in_use / 400, abs=3 / 400)
        assert share > 0
        await stream.aclose()

    asyncio.run(run())
    assert until(lambda: number(service, "kv_cache_usage_perc") == 0)
    assert number(service, "num_requests_running") == 0
