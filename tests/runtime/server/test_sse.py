"""Streams on the wire: events, silences, failures, and clients that go away."""

import gc
import json
import socket
import time

import httpx
import pytest
from pydantic import TypeAdapter

from compress.runtime.server import sse
from compress.runtime.server.answers import ChatChunk, Completion
from tests.runtime.server.conftest import app_of, until

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
TEXT = {"prompt": "Hello", "temperature": 0}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}


def events(text):
    """The data of each event; comments are left out."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    lines = [block for block in blocks if not block.startswith(":")]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line.removeprefix("data: ") for line in lines]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("usage", [None, False, True])
def test_each_event_is_what_the_description_says(make_letters, serve, path, usage):
    url = serve(app_of(make_letters())).url
    options = {} if usage is None else {"stream_options": {"include_usage": usage}}
    body = PATHS[path] | {"stream": True, "max_tokens": 6, "n": 2} | options
    response = httpx.post(url + path, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
    *data, end = events(response.text)
    assert end == "[DONE]"
    kind = TypeAdapter(ChatChunk if "chat" in path else Completion)
    for line in data:
        kind.validate_json(line, strict=True)
    chunks = [json.loads(line) for line in data]
    assert all(("usage" in chunk) == bool(usage) for chunk in chunks)
    assert bool(chunks[-1]["choices"]) == (not usage)


@pytest.mark.parametrize("path", PATHS)
def test_continuous_usage_counts_what_has_come(make_letters, serve, path):
    url = serve(app_of(make_letters())).url
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = PATHS[path] | {"stream": True, "max_tokens": 6, "n": 2, "stream_options": options}
    *data, _ = events(httpx.post(url + path, json=body).text)
    usages = [json.loads(line)["usage"] for line in data]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert counts[0] < 12
    assert counts[-1] == 12
    assert {usage["prompt_tokens"] for usage in usages} == {usages[-1]["prompt_tokens"]}


def test_what_arrives_together_is_one_chunk_for_each_output(make_letters, serve):
    """A consumer that is slower than the engine gets fewer and longer pieces, and all of them."""
    llm = make_letters()
    app = app_of(llm)
    service = app.state.service
    submit = service.submit

    def submit_and_dawdle(prompts, params):
        streams = submit(prompts, params)
        # on the event loop, so nobody reads meanwhile
        assert until(lambda: llm.statistics().generated_tokens == 60)
        return streams

    service.submit = submit_and_dawdle
    body = TEXT | {"stream": True, "max_tokens": 30, "n": 2, "logprobs": 0}
    data = events(httpx.post(f"{serve(app).url}/v1/completions", json=body).text)
    chunks = [json.loads(line)["choices"][0] for line in data[:-1]]
    assert [chunk["index"] for chunk in chunks] == [0, 1]
    assert [len(chunk["logprobs"]["tokens"]) for chunk in chunks] == [30, 30]


def test_a_silence_is_broken_by_comments(make_letters, serve, monkeypatch):
    monkeypatch.setattr(sse, "SILENCE", 0.02)
    url = serve(app_of(make_letters(delay=0.1))).url
    for prompt in ("a", ["a", "b"]):
        body = {"prompt": prompt, "stream": True, "max_tokens": 2}
        text = httpx.post(f"{url}/v1/completions", json=body).text
        assert text.count(": waiting\n\n") >= 4
        assert events(text)[-1] == "[DONE]"


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_fails_ends_the_stream_with_an_error(make_letters, serve, path):
    llm = make_letters(delay=0.002)
    url = serve(app_of(llm)).url
    body = PATHS[path] | {"stream": True, "max_tokens": 150}
    with httpx.stream("POST", url + path, json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        for _ in range(9):
            next(lines)

        def fail(batch):
            raise RuntimeError("a secret of the inside")

        llm.engine.model.forward = fail
        last = [line for line in lines if line][-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert "secret" not in last
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_fails_ends_a_whole_answer_with_a_500(make_letters, serve, path):
    llm = make_letters()

    def fail(batch):
        raise RuntimeError("a secret of the inside")

    works = llm.engine.model.forward
    llm.engine.model.forward = fail
    url = serve(app_of(llm)).url
    response = httpx.post(url + path, json=PATHS[path])
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"
    llm.engine.model.forward = works
    assert until(lambda: llm.fault is None)
    assert httpx.post(url + path, json=PATHS[path]).status_code == 200


def test_one_request_that_fails_leaves_the_others(make_letters, serve):
    llm = make_letters(delay=0.002)
    url = serve(app_of(llm)).url
    decode = llm.tokenizer.decode
    bad = 95  # ~, which nothing else here spells

    def breaks(tokens, **more):
        if bad in tokens and len(tokens) > 1:
            raise ValueError("no such token")
        return decode(tokens, **more)

    llm.tokenizer.decode = breaks
    body = TEXT | {"prompt": [bad], "max_tokens": 3}
    response = httpx.post(f"{url}/v1/completions", json=body)
    assert response.status_code == 500
    assert "tokens into text" in response.json()["error"]["message"]
    text = httpx.post(f"{url}/v1/completions", json=body | {"stream": True}).text
    assert "tokens into text" in json.loads(events(text)[-1])["error"]["message"]
    assert httpx.post(f"{url}/v1/completions", json=TEXT).status_code == 200


def send(url, path, body):
    """A connection on which the request has been sent, and nothing read."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["running", "waiting"])
def test_a_client_that_goes_away_frees_its_blocks(make_letters, serve, path, stream, when):
    llm = make_letters(delay=0.005, max_sequences=2)
    url = serve(app_of(llm)).url
    body = PATHS[path] | {"stream": stream, "max_tokens": 180, "n": 2}
    blocker = send(url, path, body) if when == "waiting" else None
    if blocker:
        assert until(lambda: llm.statistics().running == 2)
    connection = send(url, path, body)
    if when == "waiting":
        assert until(lambda: llm.statistics().waiting == 1)
        connection.close()
        assert until(lambda: llm.statistics().waiting == 0, 0.5)
        assert llm.statistics().running == 2  # the other goes on
        blocker.close()
    else:
        assert until(lambda: llm.statistics().generated_tokens > 10)
        connection.close()
    assert until(lambda: not llm.engine.requests, 0.5)
    generated = llm.statistics().generated_tokens
    time.sleep(0.03)
    assert llm.statistics().generated_tokens == generated < 360
    assert llm.statistics().blocks_in_use == 0
    llm.engine.check()


@pytest.mark.parametrize("stream", [True, False])
def test_it_takes_a_step_at_most(make_letters, serve, stream):
    """The step under way when the client goes, and none that begins once that is known."""
    llm = make_letters(delay=0.1)
    url = serve(app_of(llm)).url
    connection = send(url, "/v1/completions", TEXT | {"stream": stream, "max_tokens": 180})
    assert until(lambda: llm.statistics().steps == 3)  # counted when it begins
    time.sleep(0.03)
    connection.close()
    assert until(lambda: not llm.engine.requests)
    assert llm.statistics().steps == 3
    assert llm.statistics().blocks_in_use == 0


def test_several_prompts_go_with_their_client(make_letters, serve):
    llm = make_letters(delay=0.005)
    url = serve(app_of(llm)).url
    for stream in (True, False):
        body = {"prompt": ["a", "b", "c"], "stream": stream, "max_tokens": 180}
        connection = send(url, "/v1/completions", body)
        assert until(lambda: llm.statistics().running == 3)
        connection.close()
        assert until(lambda: not llm.engine.requests, 0.5)
    llm.engine.check()


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_under_several_prompts_is_told_once(make_letters, serve, caplog, stream):
    llm = make_letters(delay=0.005)
    url = serve(app_of(llm)).url
    llm.engine.model.fail_on = ord("~") - 32
    body = {"prompt": ["a", "b", "c~", "d"], "stream": stream, "max_tokens": 180}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=20)
    assert "engine_fault" in answer.text
    llm.engine.model.fail_on = None
    gc.collect()
    told = [record for record in caplog.records if record.module == "metered"]
    assert len(told) == 1, caplog.text  # beside what the service may say of its state
    assert {record.name for record in caplog.records} == {"compress.server"}


def test_prompts_that_are_answered_together_are_timed_as_they_come(make_letters, serve):
    llm = make_letters(delay=0.01)
    app = app_of(llm)
    body = {"prompt": ["a", "b", "c"], "max_tokens": 20}
    assert httpx.post(f"{serve(app).url}/v1/completions", json=body, timeout=20).status_code == 200
    sample = app.state.service.metrics.registry.get_sample_value
    first, end = (
        sample(f"compress:{name}_seconds_sum", {"model_name": "tiny"})
        for name in ("time_to_first_token", "e2e_request_latency")
    )
    assert first < end / 2  # 1 step of 20; two thirds, were the others read only afterwards


def test_a_slow_reader_holds_up_nobody(make_letters, serve):
    """One client reads nothing of a long stream; another gets its answer meanwhile."""
    llm = make_letters()
    url = serve(app_of(llm)).url
    body = CHAT | {"stream": True, "n": 60, "max_tokens": 100, "logprobs": True, "top_logprobs": 20}
    slow = send(url, "/v1/chat/completions", body)
    answer = httpx.post(f"{url}/v1/completions", json=TEXT | {"max_tokens": 5}, timeout=20)
    assert answer.status_code == 200
    slow.close()
    assert until(lambda: not llm.engine.requests)
