"""One replica: a model with the whole application around it, in a process that Ray Serve started.

A request comes as its ASGI scope and its body, and goes through the same application as in a server
of one process.  The answer goes back as a stream of items:

    the replica's name      it has the request
    [message, ...]          ASGI messages, as they come; those that wait go together

The last message has "counts" besides, for the request log of the process in front.

Relied on, of Ray Serve 2.60: an asynchronous generator of a deployment is a streaming method; when
the caller cancels, or is gone, it gets a CancelledError where it waits; an exception of
`check_health` has the replica replaced.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.types import ASGIApp, Message, Scope

from compress.runtime.server.app import make_app
from compress.runtime.server.errors import ApiError
from compress.runtime.server.request_log import RequestRecord, current_record
from compress.runtime.server.service import ServerSettings, Service

if TYPE_CHECKING:
    from compress.runtime.llm import LLM

logger = logging.getLogger("compress.server")

MOST_MESSAGES = 64  # of one answer that wait to be sent; then the application waits


class Replica:
    """The deployment.  Raises what `make_llm` raises, and Ray tells it to who started it."""

    def __init__(self, settings: ServerSettings, make_llm: Callable[[], LLM]) -> None:
        _listen_on_loopback()
        self.name = serve.get_replica_context().replica_id.unique_id
        self._service = Service(settings)
        self._service.attach(make_llm())
        self._app = make_app(self._service)
        self._watch: asyncio.Task[None] | None = None

    async def answer(
        self, request: dict[str, Any], body: bytes, *, tried: Sequence[str] = ()
    ) -> AsyncIterator[Any]:
        """Run one request; `request` is a scope's plain part, `tried` is for the router."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._service.watch())
        yield self.name
        answer = Answer(body)
        task = asyncio.create_task(answer.run(self._app, scope_of(request)))
        try:
            while messages := await answer.messages():
                yield messages
        finally:  # the client may have left in the middle
            task.cancel()

    async def metrics(self) -> tuple[int, bytes]:
        """Rank of the replica, and what /metrics shows of it."""
        return serve.get_replica_context().rank.rank, self._service.metrics.text()

    async def health(self) -> tuple[bool, str]:
        """Whether the engine works, and why not."""
        return self._service.health()

    async def cut_off(self) -> int:
        """End what runs, with an error; how many requests that were."""
        return self._service.cut_off()

    def check_health(self) -> None:
        """Have Ray replace a replica whose engine has failed."""
        ok, reason = self._service.health()
        if not ok:
            raise RuntimeError(reason)


class Answer:
    """What one run of an ASGI application sends."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._waiting: asyncio.Queue[Message | None] = asyncio.Queue(MOST_MESSAGES)
        self._started = False

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run the application to its end.  An exception of its own is logged and answered."""
        try:
            await app(scope, self._receive, self._send)
        except Exception:  # the middleware answered it, and raises it for the log
            logger.exception("the application failed")
        if not self._started:
            error = ApiError(500, "the server failed at this request; its log says why")
            await error.response()(scope, self._receive, self._send)
        await self._waiting.put(None)

    async def messages(self) -> list[Message]:
        """All that wait, at least one; none when the application has ended."""
        messages = [await self._waiting.get()]
        while not self._waiting.empty() and messages[-1] is not None:
            messages.append(self._waiting.get_nowait())
        if messages[-1] is None and len(messages) > 1:
            self._waiting.put_nowait(None)
        return _merged([message for message in messages if message is not None])

    async def _receive(self) -> Message:
        if self._body is None:
            # Who asks now wants to know whether the client has left; then this task is cancelled.
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def _send(self, message: Message) -> None:
        self._started = True
        message = dict(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            message["counts"] = _counts(current_record.get())
        await self._waiting.put(message)


def _counts(record: RequestRecord | None) -> dict[str, Any]:
    """What belongs in the request log; `first` in seconds from the request's arrival here."""
    if record is None:
        return {}
    first = None if record.first_token is None else record.first_token - record.arrived
    tokens = {"prompt_tokens": record.prompt_tokens, "output_tokens": record.output_tokens}
    return {**tokens, "first": first}


def scope_of(request: dict[str, Any]) -> Scope:
    """An ASGI scope."""
    headers = [(bytes(name), bytes(value)) for name, value in request["headers"]]
    return {
        **request,
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "root_path": "",
        "headers": headers,
        "state": {},
    }


def _merged(messages: list[Message]) -> list[Message]:
    """The same answer, with neighbouring parts of the body in one message."""
    merged: list[Message] = []
    for message in messages:
        before = merged[-1] if merged else None
        if before is not None and before["type"] == message["type"] == "http.response.body":
            merged[-1] = {**message, "body": before.get("body", b"") + message.get("body", b"")}
        else:
            merged.append(message)
    return merged


def _listen_on_loopback() -> None:
    """Have Ray's server in this process, where requests come in, listen on 127.0.0.1 only.

    Ray 2.60 binds all interfaces there.  The server starts after the deployment's constructor.
    """
    from ray._common.tls_utils import add_port_to_grpc_server
    from ray.serve._private import replica

    def add_port(server: Any, _: str) -> int:
        return add_port_to_grpc_server(server, "127.0.0.1:0")

    setattr(replica, add_port_to_grpc_server.__name__, add_port)
