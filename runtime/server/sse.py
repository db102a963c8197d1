"""Server-sent events, and work that ends with the connection.

A client that goes away has its work cancelled at once, whether it was being answered in a stream
or in one piece, and streams of the engine are closed, which aborts their requests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from compress.runtime.outputs import Increment
from compress.runtime.server.errors import error_of
from compress.runtime.server.metered import MeteredStream

T = TypeVar("T")

SILENCE = 15.0  # seconds without news, after which a comment tells proxies that all is well
COMMENT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """An event that holds `data` as JSON: in ASCII, since clients split lines at U+2028 too."""
    return b"data: " + json.dumps(data, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


async def news(streams: Sequence[MeteredStream]) -> AsyncGenerator[tuple[int, list[Increment]]]:
    """Yield what arrives as (which of the streams, increments); no increments after a silence.

    Ends with the last stream; raises what ended one.
    """
    if len(streams) > 1:
        async with aclosing(_news_of_several(streams)) as arriving:
            async for place, found in arriving:
                yield place, found
        return
    while True:
        try:
            async with asyncio.timeout(SILENCE):
                found = await streams[0].next()
        except TimeoutError:
            yield 0, []
            continue
        if not found:
            return
        yield 0, found


async def _news_of_several(
    streams: Sequence[MeteredStream],
) -> AsyncGenerator[tuple[int, list[Increment]]]:
    waiting = {asyncio.ensure_future(stream.next()): place for place, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(
                waiting, timeout=SILENCE, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                yield 0, []
            for task in done:
                place = waiting.pop(task)
                if found := task.result():
                    yield place, found
                    waiting[asyncio.ensure_future(streams[place].next())] = place
    finally:
        for task in waiting:
            task.cancel()


class EventStream(Response):
    """Sends `events` as they come; at the end, whatever it is, closes `streams`.

    An exception becomes a last event, which holds the error object.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], streams: Sequence[MeteredStream]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._events = events
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._write(send))
        except ClientDisconnect:
            pass
        finally:
            await close(self._streams)

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:
                data = b"data: " + error_of(error).body() + b"\n\n"
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` does.  ClientDisconnect, and `work` is cancelled, if the client leaves.

    The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def close(streams: Sequence[MeteredStream]) -> None:
    """Abort what has not ended."""
    for stream in streams:
        await stream.aclose()
