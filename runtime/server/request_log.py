"""Who asked what, and how it went: an id in every response, one log line a finished request.

A line holds numbers and the path, never a prompt, an answer or a key.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from compress.runtime.server.service import Service

logger = logging.getLogger("compress.server")

CLIENT_CLOSED = 499  # nginx's number: nobody waited for the answer
# Asked every few seconds by machines; their lines would hide the others.
POLLED = ("/health", "/ready", "/metrics")
REASONS = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "invalid",
    408: "timeout",
    413: "too_large",
    422: "invalid",
    429: "queue_full",
    503: "unavailable",
}
# The page needs its own script and style and nothing else; no other page may frame it.
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


@dataclass(slots=True)
class RequestRecord:
    """What the line of an HTTP request says; its streams fill it in."""

    id: str
    arrived: float  # time.monotonic() seconds
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token: float | None = None  # as `arrived`


current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)


class RequestLog:
    """The outermost middleware: ids, headers that every response has, the log, refusals counted."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope), time.monotonic())
        status = CLIENT_CLOSED

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), *SECURITY_HEADERS]
                headers.append((b"x-request-id", record.id.encode()))
                if self.service.draining:  # the next request has to go to another server
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        token = current_record.set(record)
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            current_record.reset(token)
            self._note(scope, status, record)

    def _note(self, scope: Scope, status: int, record: RequestRecord) -> None:
        path = scope["path"]
        if path in POLLED and status in (200, 503):
            return
        if reason := REASONS.get(status):
            self.service.metrics.rejected(reason)
        now = time.monotonic()
        line = f"{record.id} {scope['method']} {ascii(path)[1:-1]} {status}"
        if record.prompt_tokens:
            line += f" prompt={record.prompt_tokens} output={record.output_tokens}"
        if record.first_token is not None:
            line += f" first={record.first_token - record.arrived:.3f}s"
        logger.info("%s %.3fs", line, now - record.arrived)


def _request_id(scope: Scope) -> str:
    """The client's own X-Request-Id, if it is one that can stand in a log; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and re.fullmatch(rb"[\w.:-]{1,128}", value):
            return value.decode("ascii")
    return uuid.uuid4().hex
