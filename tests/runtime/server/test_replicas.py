"""`--replicas 2`, in processes: the same answers, warm caches, and a replica that is killed.

One server for all tests, since Ray takes seconds to start; each replica has room for six requests,
of which four run.  The tests stand in the order in which they must run.
"""

import http.client
import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.runtime.server.conftest import until
from tests.runtime.server.test_process import Client, Process, expected

pytest.importorskip("ray.serve", reason="Ray Serve is not installed (the extra `ray`)")

BLOCK = 4  # tokens, of the fake model's cache
SLOW = 60.0  # seconds that Ray may take to start a replica on a busy machine


@pytest.fixture(scope="module")
def running():
    process = Process(
        replicas=2, delay=0.02, max_sequences=4, max_queued_requests=2,
        settings={"api_keys": [], "drain_seconds": 20},
    )  # fmt: skip
    try:
        process.until_ready()
        yield process
    finally:
        process.process.kill()
        process.process.communicate()


def completion(prompt: str, max_tokens: int = 20, **more) -> dict:
    return {"model": "slow", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}


def metric(running: Process, name: str) -> list[float]:
    """What the replicas say, in their order."""
    _, _, text = running.ask("GET", "/metrics")
    found = re.findall(rf'^compress:{name}{{.*replica="\d".*}} (\S+)$', text, re.MULTILINE)
    return [float(value) for value in found]


def how_many_work(running: Process) -> float:
    _, _, text = running.ask("GET", "/metrics")
    return float(re.search(r"^compress:replicas (\S+)$", text, re.MULTILINE)[1])


def replicas_of(running: Process) -> list[psutil.Process]:
    children = psutil.Process(running.process.pid).children(recursive=True)
    return [child for child in children if "ServeReplica:" in " ".join(child.cmdline())]


def check_answer(running: Process, prompt: str) -> None:
    status, _, content = running.ask("POST", "/v1/completions", completion(prompt))
    assert status == 200, content
    assert json.loads(content)["choices"][0]["text"] == expected(prompt, 20)


def finish(clients: list[Client]) -> None:
    for client in clients:
        client.join(SLOW)
        assert not client.is_alive(), "a request hangs"
        assert client.failed is None


def test_answers_are_those_of_one_server(running):
    """Streamed or not; both replicas have work, and the log has what the replicas counted."""
    prompts = [f"{number} hello" for number in range(8)]
    clients = [
        Client(running, completion(prompt, stream=number % 2 > 0))
        for number, prompt in enumerate(prompts)
    ]
    finish(clients)
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.status == 200
        assert client.text == expected(prompt, 20)
    assert min(metric(running, "generation_tokens_total")) > 0
    assert sum(metric(running, "generation_tokens_total")) == 160


def test_other_routes_are_there_too(running):
    assert running.ask("GET", "/health")[0] == running.ask("GET", "/ready")[0] == 200
    assert json.loads(running.ask("GET", "/v1/models")[2])["data"][0]["id"] == "slow"
    status, _, content = running.ask("POST", "/tokenize", {"model": "slow", "prompt": "ab"})
    assert (status, json.loads(content)["count"]) == (200, 2)
    assert running.ask("GET", "/v1/nothing")[0] == running.ask("GET", "/nothing")[0] == 404
    assert running.ask("GET", "/v1/completions")[0] == 405
    status, headers, content = running.ask("POST", "/v1/completions", {"prompt": 5})
    assert (status, json.loads(content)["error"]["param"]) == (400, "prompt")
    for name in ("X-Request-Id", "X-Content-Type-Options", "Content-Type", "Content-Length"):
        assert len(headers.get_all(name)) == 1


def test_turns_of_a_conversation_find_their_cache(running):
    """All of the turn before is in the cache, but for a last block that was not full.

    At random each later turn would miss with probability 1/2, and there are twelve.
    """
    for number in range(6):
        messages = [{"role": "user", "content": f"{number} asks something"}]
        before = 0
        for turn in range(3):
            body = {"model": "slow", "messages": messages, "max_tokens": 6, "temperature": 0}
            status, _, content = running.ask("POST", "/v1/chat/completions", body)
            answer = json.loads(content)
            assert status == 200
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached >= before // BLOCK * BLOCK
            before = answer["usage"]["prompt_tokens"]
            messages.append(answer["choices"][0]["message"])
            messages.append({"role": "user", "content": f"turn {turn}"})
    assert sum(metric(running, "prefix_cache_hits_total")) > 0


def test_a_full_replica_is_passed_over_and_two_refuse(running):
    """Sixteen requests with one prefix: one replica takes six, the other six, four are refused."""
    clients = [Client(running, completion("the same", 100)) for _ in range(16)]
    finish(clients)
    assert sorted(client.status for client in clients) == [200] * 12 + [429] * 4
    for client in clients:
        if client.status == 200:
            assert client.text == expected("the same", 100)
        else:
            assert json.loads(client.content)["error"]["code"] == "queue_full"


def test_a_client_that_leaves_ends_its_request(running):
    connection = http.client.HTTPConnection(running.address, timeout=20)
    body = json.dumps(completion("leaving", 180, stream=True))
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    assert sum(metric(running, "num_requests_running")) == 1
    answer.close()
    connection.close()
    assert until(lambda: sum(metric(running, "num_requests_running")) == 0)
    assert sum(metric(running, "kv_cache_usage_perc")) == 0
    _, _, text = running.ask("GET", "/metrics")
    assert re.search(r'success_total{finished_reason="abort",.*} 1.0', text)


def test_nothing_is_reached_from_without_or_without_the_token(running):
    """All that listens does so on loopback; a replica takes no call from who has no token."""
    import grpc

    processes = psutil.Process(running.process.pid).children(recursive=True)
    listening = [
        (process, connection.laddr)
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    hosts = {address.ip.removeprefix("::ffff:") for _, address in listening}
    assert hosts == {"127.0.0.1"}
    replicas = replicas_of(running)
    codes = []
    for port in [address.port for process, address in listening if process in replicas]:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=10)
            codes.append(refused.value.code().name)
    # Beside the server for requests, a process has one of Ray's own, which knows no such call.
    assert sorted(codes) == ["UNAUTHENTICATED"] * 2 + ["UNIMPLEMENTED"] * 2


def test_a_replica_that_is_killed_takes_only_its_own_streams_along(running):
    """They end with an error event; the others end right, and new requests go elsewhere at once."""
    prompts = [f"{number} killed" for number in range(6)]  # which one replica has room for
    clients = [Client(running, completion(prompt, 150, stream=True)) for prompt in prompts]
    assert until(lambda: min(metric(running, "num_requests_running")) > 0)
    victim = replicas_of(running)[0]
    victim.kill()
    psutil.wait_procs([victim], 10)
    start = time.monotonic()
    check_answer(running, "new")
    assert time.monotonic() - start < 10
    assert running.ask("GET", "/health")[0] == 200
    finish(clients)
    lost = []
    for prompt, client in zip(prompts, clients, strict=True):
        whole = expected(prompt, 150)
        if client.events[-1] == b"[DONE]":
            assert client.text == whole
            continue
        lost.append(client)
        assert client.events[-1]["error"]["code"] == "replica_lost"
        assert whole.startswith(client.text)
    assert 0 < len(lost) < 6


def test_a_replica_that_was_killed_is_replaced(running):
    assert until(lambda: how_many_work(running) == 2, SLOW)
    clients = [Client(running, completion(f"{n} again")) for n in range(8)]
    finish(clients)
    assert [client.text for client in clients] == [expected(f"{n} again", 20) for n in range(8)]
    assert min(metric(running, "generation_tokens_total")) > 0


def test_with_no_replica_nobody_waits_for_ever(running):
    stream = Client(running, completion("stream", 150, stream=True))
    assert until(lambda: sum(metric(running, "num_requests_running")) > 0)
    for process in replicas_of(running):
        process.kill()
    clients = [Client(running, completion(f"{number} none")) for number in range(4)]
    finish([stream, *clients])
    assert stream.events[-1]["error"]["code"] == "replica_lost"
    for number, client in enumerate(clients):  # refused, or taken by one that has started
        if client.status == 200:
            assert client.text == expected(f"{number} none", 20)
        else:
            assert client.status == 503
            assert "error" in json.loads(client.content)
    assert until(lambda: running.ask("GET", "/ready")[0] == 200, SLOW)
    check_answer(running, "back")


def test_the_end_finishes_what_runs_and_leaves_nothing(running):
    clients = [Client(running, completion(f"{number} end", 60, stream=True)) for number in range(4)]
    assert until(lambda: sum(metric(running, "num_requests_running")) == 4)
    processes = psutil.Process(running.process.pid).children(recursive=True)
    (folder,) = {
        word.partition("=")[2]
        for process in processes
        for word in process.cmdline()
        if word.startswith("--session-dir=")
    }
    running.signal(signal.SIGTERM)
    code, said = running.end(SLOW)
    finish(clients)
    for number, client in enumerate(clients):
        assert client.events[-1] == b"[DONE]"
        assert client.text == expected(f"{number} end", 60)
    assert code == 0, said
    assert "Traceback" not in said
    assert "SIGTERM" not in said
    assert re.search(r"POST /v1/completions 200 prompt=\d+ output=20 first=", said)
    assert psutil.wait_procs(processes, 5)[1] == []
    assert not Path(folder).parent.exists()
