"""Requests of the API go on to a replica; its answer comes back as it is made.

A replica that refuses because it is full or broken (429, 503) is not the last word: the next in the
request's order is asked, until all have been.  A replica that dies while it answers ends that
answer: with an error event where it streams, with 503 where nothing was sent yet.  It is not asked
of another replica again, since a request may be what killed it; clients try again on a 503.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute, Match
from starlette.types import Message, Receive, Scope, Send

from compress.core.errors import reason_of
from compress.runtime.server.affinity import affinity_key
from compress.runtime.server.errors import ApiError
from compress.runtime.server.request_log import SECURITY_HEADERS, current_record
from compress.runtime.server.sse import unless_gone

logger = logging.getLogger("compress.server")

PATHS = ("/v1/", "/tokenize", "/detokenize")  # what goes on to replicas
REFUSED = (429, 503)  # another replica may take it
SECONDS_TO_TAKE = 30.0  # until a replica has a request; it may be the time of a restart
SECONDS_TO_RETRY = 2.0
# What the log of this process puts on every response, as the replica's did.
ADDED = {b"x-request-id", *(name for name, _ in SECURITY_HEADERS)}


class Replicas(Protocol):
    """What there has to be to go on to: `ReplicatedService`."""

    replicas: int  # how many there should be

    def check_ready(self) -> None:
        """ApiError 503 when requests are not taken."""

    def taking(self) -> AbstractContextManager[None]:
        """While a request is answered."""
        ...

    def call(self, key: str, request: dict[str, Any], body: bytes, tried: tuple[str, ...]) -> Any:
        """The items that `Replica.answer` yields for a request, from a replica not yet tried."""
        ...


class ReplicaRoute(BaseRoute):
    """Matches the paths of the API, before the application's own routes for them."""

    def __init__(self, service: Replicas) -> None:
        self._service = service

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Full for HTTP on PATHS."""
        ours = scope["type"] == "http" and scope["path"].startswith(PATHS)
        return (Match.FULL if ours else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or leave it when the client has left."""
        self._service.check_ready()
        body = await Request(scope, receive).body()  # the guards have bounded it
        with self._service.taking(), suppress(ClientDisconnect):
            await unless_gone(receive, self._answer(scope, body, send))

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        request = _plain(scope)
        key = affinity_key(body)
        tried: list[str] = []
        for left in range(self._service.replicas - 1, -1, -1):
            call = _Call(self._service.call(key, request, body, tuple(tried)))
            try:
                name, start = await call.start()
                tried.append(name)
                if start["status"] not in REFUSED or not left:
                    await call.relay(start, send)
                    return
            finally:
                call.cancel()


class _Call:
    """One answer of one replica."""

    def __init__(self, response: Any) -> None:
        self._response = response  # Ray's DeploymentResponseGenerator
        self._name = ""
        self._sent = time.monotonic()
        self._rest: list[Message] = []  # what came with the start

    async def start(self) -> tuple[str, Message]:
        """The replica's name and the message that starts its answer; ApiError 503 without one."""
        try:
            async with asyncio.timeout(SECONDS_TO_TAKE):
                self._name = await anext(self._response)
        except Exception as error:  # Ray has asked the others, if one was gone
            logger.error("no replica took a request: %s", reason_of(error))
            raise ApiError(
                503,
                "no replica could take the request; try again",
                code="no_replica",
                retry_after=SECONDS_TO_RETRY,
            ) from error
        try:
            messages = await anext(self._response)
        except Exception as error:
            raise _lost(self._name, error) from error
        self._rest = messages[1:]
        return self._name, messages[0]

    async def relay(self, start: Message, send: Send) -> None:
        """Send the answer on.  Raises where a body breaks off that nothing can mend."""
        headers = [header for header in start["headers"] if header[0].lower() not in ADDED]
        await send({**start, "headers": headers})
        messages, more = self._messages(), True
        while True:
            try:
                message = await anext(messages, None)
            except Exception as error:
                lost = _lost(self._name, error)
                if not _is_event_stream(start):
                    raise lost from error
                event = b"data: " + lost.body() + b"\n\n"
                message = {"type": "http.response.body", "body": event, "more_body": False}
            if message is None:
                break
            self._note(message.pop("counts", None))
            await send(message)
            more = message.get("more_body", False)
        if more:
            raise RuntimeError(f"the answer of replica {self._name} ended in the middle")

    def cancel(self) -> None:
        """Tell the replica that nobody waits any more; nothing to one that has ended."""
        self._response.cancel()

    async def _messages(self) -> AsyncIterator[Message]:
        for message in self._rest:
            yield message
        async for item in self._response:
            for message in item:
                yield message

    def _note(self, counts: dict[str, Any] | None) -> None:
        """Put the replica's counts in this process' request log."""
        record = current_record.get()
        if record is not None and counts:
            record.prompt_tokens = counts["prompt_tokens"]
            record.output_tokens = counts["output_tokens"]
            if counts["first"] is not None:
                record.first_token = self._sent + counts["first"]


def _lost(name: str, error: Exception) -> ApiError:
    """What a client is told of a replica that is gone."""
    logger.error("replica %s was lost while it had a request: %s", name, reason_of(error))
    return ApiError(
        503,
        "the replica that worked on this request has ended; try again",
        code="replica_lost",
        retry_after=SECONDS_TO_RETRY,
    )


def _plain(scope: Scope) -> dict[str, Any]:
    """What of a scope another process can use."""
    names = ("method", "path", "raw_path", "query_string", "http_version", "scheme", "headers")
    plain = {name: scope[name] for name in names}
    headers = [tuple(header) for header in scope["headers"] if header[0] != b"x-request-id"]
    if (record := current_record.get()) is not None:
        headers.append((b"x-request-id", record.id.encode()))
    plain["headers"] = headers
    return {**plain, "client": scope.get("client"), "server": scope.get("server")}


def _is_event_stream(start: Message) -> bool:
    types = [value for name, value in start["headers"] if name.lower() == b"content-type"]
    return any(value.startswith(b"text/event-stream") for value in types)
