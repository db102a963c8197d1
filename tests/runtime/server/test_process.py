"""The life of a server's process, in processes: loading, signals under load, the end."""

import http.client
import json
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from compress.core.resources import raise_file_limit
from compress.runtime.sampling_params import SamplingParams
from tests.runtime.fakes import naive
from tests.runtime.server.conftest import Letters, until

ROOT = Path(__file__).parents[3]
LETTERS = Letters()
LONG = {"model": "slow", "prompt": "hello", "max_tokens": 100, "temperature": 0}


def expected(prompt: str, max_tokens: int) -> str:
    tokens = LETTERS(prompt)["input_ids"]
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    return LETTERS.decode(naive(tokens, params))


class Process:
    """A server in a process of its own."""

    def __init__(self, **given) -> None:
        command = [sys.executable, "-m", "tests.runtime.server.slow_server", json.dumps(given)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.url = self.process.stdout.readline().strip()
        self.address = urlsplit(self.url).netloc

    def until_ready(self) -> None:
        assert self.process.stdout.readline().strip() == "ready", self.process.communicate()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = 10) -> tuple[int, str]:
        """The exit code, and what was said on standard error."""
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said

    def ask(self, method: str, path: str, body: dict | None = None):
        """Status, headers, content."""
        connection = http.client.HTTPConnection(self.address, timeout=20)
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        content = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, content


@contextmanager
def server(**given):
    running = Process(**given)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


class Client(threading.Thread):
    """A stream, or an answer in one piece, that is read to its end."""

    def __init__(self, running: Process, body: dict) -> None:
        super().__init__(daemon=True)
        self.running, self.body = running, body
        self.status, self.lines, self.content = None, [], ""
        self.failed = None
        self.start()

    def run(self) -> None:
        try:
            connection = http.client.HTTPConnection(self.running.address, timeout=20)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(self.body), headers)
            answer = connection.getresponse()
            if self.body.get("stream"):
                for line in answer:
                    self.lines.append(line)
            else:
                self.content = answer.read().decode()
            self.status = answer.status
            connection.close()
        except Exception as error:
            self.failed = error

    @property
    def events(self) -> list:
        found = [line[6:].strip() for line in self.lines if line.startswith(b"data: ")]
        return [entry if entry == b"[DONE]" else json.loads(entry) for entry in found]

    @property
    def text(self) -> str:
        if not self.body.get("stream"):
            return json.loads(self.content)["choices"][0]["text"]
        chunks = [entry for entry in self.events if entry != b"[DONE]" and "choices" in entry]
        return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_a_signal_under_load_loses_no_output():
    """Those running, and those queued behind them, streamed or not, all come to their end."""
    with server(delay=0.005, max_sequences=4, settings={"drain_seconds": 20}) as running:
        running.until_ready()
        bodies = [
            {**LONG, "prompt": f"hello {number}", "max_tokens": 60, "stream": number % 3 > 0}
            for number in range(12)
        ]
        clients = [Client(running, body) for body in bodies]
        assert until(lambda: in_flight(running) == (4, 8))
        idle = http.client.HTTPConnection(running.address, timeout=10)  # as a pool keeps it
        idle.request("GET", "/health")
        assert idle.getresponse().read()
        began = time.monotonic()
        running.signal()
        assert until(lambda: running.ask("GET", "/ready")[0] == 503)
        for connection_of in (running.ask, lambda *given: ask_on(idle, *given)):
            status, headers, content = connection_of("POST", "/v1/completions", LONG)
            assert status == 503
            assert json.loads(content)["error"]["code"] == "draining"
            assert headers["Connection"] == "close"
            assert int(headers["Retry-After"]) > 0
        status, _, content = running.ask("GET", "/ready")
        assert (status, json.loads(content)["status"]) == (503, "draining")
        assert running.ask("GET", "/health")[0] == 200
        code, said = running.end()
        # 12 requests of 60 steps, 4 at a time: it ends when they have, not at its limit.
        assert time.monotonic() - began < 10
    for client in clients:
        client.join(5)
        assert client.failed is None
        assert client.status == 200
        assert client.text == expected(client.body["prompt"], 60)
        if client.body["stream"]:
            assert client.events[-1] == b"[DONE]"
    assert code == 0, said
    assert "unfinished requests: 12, which have up to 20 s" in said


def test_what_does_not_finish_in_time_ends_with_an_error():
    with server(delay=0.05, max_sequences=2, settings={"drain_seconds": 0.3}) as running:
        running.until_ready()
        clients = [Client(running, {**LONG, "stream": number < 2}) for number in range(4)]
        assert until(lambda: in_flight(running) == (2, 2))
        began = time.monotonic()
        running.signal()
        code, said = running.end()
        assert 0.3 <= time.monotonic() - began < 4.5  # where to finish takes 5 s and more
    whole = expected("hello", 100)
    for client in clients:
        client.join(5)
        assert client.failed is None, "the connection broke"
        if client.body["stream"]:
            assert client.events[-1]["error"]["code"] == "draining"
            assert whole.startswith(client.text)
        else:
            assert client.status == 503
            assert json.loads(client.content)["error"]["code"] == "draining"
    assert code == 1
    assert "Requests that were cut off: 4" in said
    assert "Traceback" not in said


def test_a_second_signal_ends_at_once():
    with server(delay=0.05, settings={"drain_seconds": 60}) as running:
        running.until_ready()
        client = Client(running, {**LONG, "stream": True})
        assert until(lambda: in_flight(running) == (1, 0))
        running.signal(signal.SIGINT)
        assert until(lambda: running.ask("GET", "/ready")[0] == 503)
        began = time.monotonic()
        running.signal(signal.SIGTERM)
        code, _ = running.end()
        assert time.monotonic() - began < 10  # of the drain's 30 s
    assert code == -signal.SIGTERM
    client.join(5)


def test_while_the_model_is_loaded():
    with server(load=1.5) as running:
        status, headers, content = running.ask("GET", "/ready")
        assert (status, json.loads(content)["status"]) == (503, "loading")
        assert int(headers["Retry-After"]) > 0
        assert running.ask("GET", "/health")[0] == 200
        status, headers, content = running.ask("POST", "/v1/completions", LONG)
        assert (status, json.loads(content)["error"]["code"]) == (503, "loading")
        assert int(headers["Retry-After"]) > 0
        assert running.ask("GET", "/metrics")[0] == 200
        running.until_ready()
        assert running.ask("GET", "/ready")[0] == 200
        running.signal()
        assert running.end()[0] == 0


def test_a_signal_while_the_model_is_loaded():
    with server(load=60) as running:
        assert running.ask("GET", "/ready")[0] == 503
        running.signal()
        began = time.monotonic()
        assert until(lambda: running.process.poll() is not None, 15)
        assert time.monotonic() - began < 15  # of the 60 s that loading takes
        assert running.end()[0] == 0


def test_a_model_that_cannot_be_loaded_ends_the_process():
    with server(broken=True) as running:
        code, said = running.end()
    assert code != 0
    assert (
        said.strip()
        .splitlines()[-1]
        .endswith("InputError: the model cannot be loaded: ValueError: a library's")
    )


def test_one_line_a_request_and_nothing_of_what_it_said():
    with server(settings={"api_keys": ["top-secret-key"]}) as running:
        running.until_ready()
        connection = http.client.HTTPConnection(running.address, timeout=10)
        for key, status in (("top-secret-key", 200), ("wrong-secret-key", 401)):
            headers = {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {key}",
                "X-Request-Id": f"request-{status}",
            }
            body = {**LONG, "prompt": "private words", "max_tokens": 7}
            connection.request("POST", "/v1/completions?x=query", json.dumps(body), headers)
            answer = connection.getresponse()
            assert answer.headers["X-Request-Id"] == f"request-{status}"
            assert (answer.status, bool(answer.read())) == (status, True)
        running.ask("GET", "/health")
        running.signal()
        code, said = running.end()
    assert code == 0
    good, bad = said.strip().splitlines()
    seconds = r"\d+\.\d{3}s"
    request = r"request-200 POST /v1/completions 200 prompt=13 output=7"
    assert re.search(rf" {request} first={seconds} {seconds}$", good)
    assert re.search(rf" request-401 POST /v1/completions 401 {seconds}$", bad)
    for word in ("secret", "private", "query", expected("private words", 7)):
        assert word not in said


def test_as_many_open_files_as_are_allowed():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        raise_file_limit()
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert most == min(hard if hard != resource.RLIM_INFINITY else 65536, 65536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def in_flight(running: Process) -> tuple[int, int]:
    """Running and waiting, by /metrics."""
    text = running.ask("GET", "/metrics")[2]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    name = 'compress:num_requests_{}{{model_name="slow"}}'
    return int(float(values[name.format("running")])), int(float(values[name.format("waiting")]))


def ask_on(connection: http.client.HTTPConnection, method: str, path: str, body: dict):
    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()
