"""Who gets past the guards: real sockets where the bytes matter, ASGI alone where they do not."""

import asyncio
import contextlib
import http.client
import json
import socket
import time

import httpx
import pytest
from starlette.responses import JSONResponse, Response

from compress.runtime.server import guard
from compress.runtime.server.app import make_app
from compress.runtime.server.guard import BodyLimit, HostCheck, KeyCheck, host_of
from compress.runtime.server.service import ServerSettings, Service
from tests.runtime.server.conftest import app_of


async def echo(scope, receive, send):
    """Answers with the body it got."""
    body, more = b"", True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        body, more = body + message["body"], message["more_body"]
    await Response(body)(scope, receive, send)


def ask(app, method="GET", path="/x", **more) -> httpx.Response:
    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **more)

    return asyncio.run(run())


def guarded(**settings) -> Service:
    """The whole application, around a model that is never there."""
    return make_app(Service(ServerSettings(("m",), **settings)))


@pytest.mark.parametrize(
    ("value", "host"),
    [
        (b"localhost", "localhost"),
        (b"LocalHost:8000", "localhost"),
        (b"[::1]:8000", "[::1]"),
        (b"[::1]", "[::1]"),
        (b"http://evil.example:80", "evil.example"),
        (b"https://127.0.0.1", "127.0.0.1"),
        (b"null", "null"),
        (b"", ""),
        (b"127.0.0.1:", "127.0.0.1:"),
        (b"\xff:1", "ÿ"),
    ],
)
def test_host_of(value, host):
    assert host_of(value) == host


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:8000"}, 403),
        ({"Host": "evil.example#localhost"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost:3000"}, 200),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),  # of a file, or a sandboxed frame
    ],
)
def test_hosts(headers, status):
    app = HostCheck(echo, ["localhost", "127.0.0.1"], ["/health"])
    assert ask(app, path="/health", headers=headers).status_code == 200
    answer = ask(app, headers=headers)
    assert answer.status_code == status
    if status == 403:
        error = answer.json()["error"]
        assert error["code"] == "host_not_allowed"
        assert "--allowed-host" in error["message"]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer first", 200),
        (b"bearer second", 200),
        (b"Bearer  first ", 200),
        (b"Bearer firs", 401),
        (b"Bearer firsts", 401),
        (b"Bearer First", 401),
        (b"Bearer ", 401),
        (b"Bearer", 401),
        (b"Basic first", 401),
        (b"first", 401),
        (b"Bearer \xff\xfe", 401),
        (b"Bearer schl\xc3\xbcssel", 200),
        (None, 401),
    ],
)
def test_keys(header, status):
    app = KeyCheck(echo, ["first", "second", "schlüssel"], ["/health"])
    headers = {} if header is None else {b"Authorization": header}
    answer = ask(app, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert ask(app, path="/health").status_code == 200


def test_what_a_key_guards():
    app = guarded(api_keys=("secret",))
    for path in ("/health", "/ready", "/", "/nothing", "/metrics", "/docs", "/openapi.json"):
        answer = ask(app, path=path)
        is_open = path in ("/health", "/ready", "/")
        assert (answer.status_code == 401) is not is_open, path
        key = {"Authorization": "Bearer secret"}
        assert ask(app, path=path, headers=key).status_code != 401


def test_every_answer_has_an_id_and_forbids_sniffing():
    app = guarded(api_keys=("secret",), allowed_hosts=("127.0.0.1",))
    for headers in ({}, {"Host": "evil.example"}, {"Authorization": "Bearer secret"}):
        for path in ("/health", "/nothing", "/docs"):
            answer = ask(app, path=path, headers=headers)
            assert len(answer.headers["X-Request-Id"]) == 32
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    given = {"X-Request-Id": "my-request:1.2_3"}
    assert ask(app, path="/health", headers=given).headers["X-Request-Id"] == "my-request:1.2_3"
    for wrong in ("with space", "x" * 129, "", "<script>"):
        answer = ask(app, path="/health", headers={"X-Request-Id": wrong})
        assert len(answer.headers["X-Request-Id"]) == 32


@pytest.mark.parametrize("size", [0, 1, 999, 1000])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_within_the_limit_arrive_unchanged(serve, size, chunked):
    port = serve(BodyLimit(lifespanned(echo), 1000, 5)).port
    body = bytes(range(256)) * 4
    assert post(port, body[:size], chunked) == (200, body[:size])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [1001, 3_000_000])
def test_a_body_over_the_limit(serve, chunked, size):
    """The client, which writes all of it before it reads, sees the answer."""
    port = serve(BodyLimit(lifespanned(never), 1000, 5)).port
    status, body = post(port, b"x" * size, chunked)
    assert status == 413
    assert json.loads(body)["error"]["code"] == "body_too_large"
    assert "1,000 bytes" in json.loads(body)["error"]["message"]


def test_a_client_that_asks_first_does_not_send_a_large_body(serve, monkeypatch):
    """`Expect: 100-continue` gets its answer at once, since nothing is on its way."""
    monkeypatch.setattr(guard, "PATIENCE", 30.0)
    port = serve(BodyLimit(lifespanned(never), 1000, 5)).port
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - began < 20  # what is on its way is heard out for 30 s


def test_a_body_that_comes_too_slowly(serve):
    port = serve(BodyLimit(lifespanned(never), 1000, 0.2)).port
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc")
        answer = b""
        while part := connection.recv(1000):  # until the server closes
            answer += part
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"body_timeout"' in answer
    assert 0.2 <= time.monotonic() - began < 10


def test_a_client_that_leaves_in_its_body_reaches_nothing(serve, caplog):
    reached = []

    async def app(scope, receive, send):
        reached.append(scope)
        await Response()(scope, receive, send)

    port = serve(BodyLimit(lifespanned(app), 1000, 5)).port
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc")
        time.sleep(0.05)
    assert post(port, b"", False)[0] == 200  # the server goes on
    assert len(reached) == 1
    assert not [entry for entry in caplog.records if entry.levelname == "ERROR"]


def test_the_application_still_sees_a_client_leave(serve):
    seen = []

    async def app(scope, receive, send):
        assert (await receive())["body"] == b"abc"
        seen.append((await receive())["type"])
        await Response()(scope, receive, send)

    port = serve(BodyLimit(lifespanned(app), 1000, 5)).port
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc")
        time.sleep(0.05)
        assert not seen
    for _ in range(200):
        if seen:
            break
        time.sleep(0.01)
    assert seen == ["http.disconnect"]


def post(port: int, body: bytes, chunked: bool) -> tuple[int, bytes]:
    """Send it all with the standard library's client, then read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    pieces = [body[at : at + 500_000] for at in range(0, len(body), 500_000)]
    connection.request("POST", "/x", iter(pieces) if chunked else body, encode_chunked=chunked,
                       headers={"Transfer-Encoding": "chunked"} if chunked else {})  # fmt: skip
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


async def never(scope, receive, send):
    raise AssertionError("a body that was refused reached the application")


def lifespanned(app):
    """`app`, with the start and the end that the server of the tests waits for."""

    async def wrapped(scope, receive, send):
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        for part in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{part}"
            await send({"type": f"lifespan.{part}.complete"})

    return wrapped


def test_answers_in_json_are_as_openai_has_them():
    answer = ask(guarded(), "POST", "/nothing", json={})
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert JSONResponse.media_type in answer.headers["Content-Type"]


def talk(served, *parts):
    """What comes back for these parts of a request, and how many bytes of them could be sent."""
    answer, sent = b"", 0
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):  # it was closed with something unread
            for part in parts:
                connection.sendall(part)
                sent += len(part)
        with contextlib.suppress(ConnectionError):
            while news := connection.recv(1 << 16):
                answer += news
    return answer, sent


@pytest.mark.parametrize("part", [b"a" * 10_000, b"X-Many: " + b"a" * 9_990 + b"\r\n"])
def test_a_head_without_end_is_cut_off(make_letters, serve, part):
    served = serve(app_of(make_letters()))
    begin = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: "
    answer, sent = talk(served, begin, *[part] * 2000, b"\r\nConnection: close\r\n\r\n")
    assert b"200 OK" not in answer
    assert sent < 15_000_000  # what fits in sockets' buffers, of 20 MB
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_long_head_and_requests_one_after_another_are_read(make_letters, serve):
    served = serve(app_of(make_letters()))
    long = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 60_000 + b"\r\n"
    body = b'{"prompt": "' + b"a" * 200_000 + b'"}'
    post = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    post += b"Content-Length: %d\r\n\r\n" % len(body) + body
    several = [long + b"\r\n", post] * 3
    answer, _ = talk(served, *several, long + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 7
