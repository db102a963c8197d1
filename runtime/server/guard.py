"""What stands before the routes: which hosts, which keys, how large a body and how slow.

Pure ASGI, so that a stream passes through untouched.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from hashlib import sha256

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compress.core.errors import shown
from compress.runtime.server.errors import ApiError

# A client that writes all of its body before it reads would see a reset connection, not the
# answer, if it were not listened to for a while; seconds.
PATIENCE = 2.0


class HostCheck:
    """Only requests that were meant for this server, by their Host and, if any, their Origin.

    A web page that has its own name resolve to 127.0.0.1 reaches a server there, but with that
    name in Host; one that posts from elsewhere is known by its Origin.  The paths that are `open`
    are for all.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str], open_paths: Iterable[str]) -> None:
        self.app = app
        self.allowed = {host.lower() for host in allowed}
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.open_paths:
            for name in (b"host", b"origin"):
                value = _header(scope, name)
                if value is not None and host_of(value) not in self.allowed:
                    await _refuse_host(name, value).response()(scope, receive, send)
                    return
        await self.app(scope, receive, send)


class KeyCheck:
    """Only requests with one of the API keys, but for the paths that are `open`."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: Iterable[str]) -> None:
        self.app = app
        self.digests = [_digest(key.encode()) for key in keys]
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.open_paths:
            scheme, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
            given = _digest(key.strip())
            # All are compared, in a time that says nothing of where or which one differs.
            known = sum([hmac.compare_digest(given, digest) for digest in self.digests])
            if scheme.lower() != b"bearer" or not known:
                error = ApiError(
                    401,
                    "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Bodies of so many bytes at most, that are there within so many seconds.

    The application gets a body once it is whole, so a slow one costs it nothing.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, seconds: float) -> None:
        self.app = app
        self.most_bytes = most_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = _header(scope, b"content-length") or b"0"
        try:
            if stated.isdigit() and int(stated) > self.most_bytes:
                if _header(scope, b"expect") is None:
                    await _hear_out(receive)
                raise self._too_large()
            async with asyncio.timeout(self.seconds):
                body = await self._read(receive)
        except ApiError as error:
            error.headers["Connection"] = "close"  # what is left of the body is no request
            await error.response()(scope, receive, send)
        except TimeoutError:
            text = f"the body was not there after {self.seconds:g} seconds"
            error = ApiError(408, text, code="body_timeout", headers={"Connection": "close"})
            await error.response()(scope, receive, send)
        except _GoneError:
            pass
        else:
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes:
        """The whole body; ApiError if it is too large."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self.most_bytes:
                if more:
                    await _hear_out(receive)
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        text = f"the body is larger than {self.most_bytes:,} bytes, which is the limit here"
        return ApiError(413, text, code="body_too_large")


class _GoneError(Exception):
    """The client left while its body was read."""


def host_of(value: bytes) -> str:
    """The host of a Host header or of an origin, without its port; empty if there is none."""
    text = value.decode("latin-1").lower().rpartition("://")[2]
    host, colon, port = text.rpartition(":")
    return host if colon and port.isdigit() else text


def _refuse_host(name: bytes, value: bytes) -> ApiError:
    text = shown(value.decode("latin-1"))
    return ApiError(
        403,
        f"{name.decode().title()} {text} is not served here; start with --allowed-host to allow it",
        code="host_not_allowed",
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, and then what the real one gives: that the client left."""
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replay() -> Message:
        nonlocal message
        if message is None:
            return await receive()
        first, message = message, None
        return first

    return replay


async def _hear_out(receive: Receive) -> None:
    """Let the client say the rest, for a while, and forget it."""
    try:
        async with asyncio.timeout(PATIENCE):
            message = await receive()
            while message["type"] == "http.request" and message.get("more_body", False):
                message = await receive()
    except TimeoutError:
        pass


def _header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this name."""
    return next((value for key, value in scope["headers"] if key == name), None)


def _digest(key: bytes) -> bytes:
    """Keys of one length, since a comparison tells the lengths."""
    return sha256(key).digest()
