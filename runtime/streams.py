"""A request's increments as they come, for a consumer in an event loop.

The engine's thread puts increments down and rings; the event loop is woken once for all that one
step brought, however many streams it brought it to.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable

from compress.runtime.outputs import Increment
from compress.runtime.sequence import Request


class Doorbell:
    """Wakes the inboxes of one event loop, which it does not keep alive, from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._rung: deque[Inbox] = deque()
        self._called = False  # the loop will come

    def ring(self, inbox: Inbox) -> None:
        """Have `inbox` woken.  RuntimeError when the event loop has closed."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise RuntimeError("the event loop has closed")
        self._rung.append(inbox)
        if not self._called:
            self._called = True  # first: the loop may answer before the call returns
            loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._called = False  # before the queue is emptied: who rings from now on calls again
        while self._rung:
            self._rung.popleft().wake()


class Inbox:
    """What has arrived for a stream; the engine holds this, so that it does not hold the stream."""

    def __init__(self, doorbell: Doorbell) -> None:
        self.items: deque[Increment | Exception] = deque()
        self._doorbell = doorbell
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Increment | Exception) -> None:
        """Take what the engine's thread has; RuntimeError when nobody listens any more."""
        self.items.append(item)
        self._doorbell.ring(self)

    def wake(self) -> None:
        """Let `wait` return; in the event loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Return once there is something."""
        while not self.items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None


class Stream:
    """What `LLM.stream` returns: an asynchronous iterator over the increments of one request.

    A consumer that goes away, by `aclose`, by being cancelled in its iteration or by dropping the
    stream, has the request aborted; its blocks are free before the next step.
    """

    _unfinished = 0

    def __init__(self, request: Request, inbox: Inbox, abort: Callable[[list[str]], None]) -> None:
        self.request = request
        self._inbox = inbox
        self._abort = abort
        self._unfinished = request.params.n  # outputs

    async def next(self) -> list[Increment]:
        """Wait for news and return all there is; nothing once every output has ended.

        Raises what ended the request, such as a fault of the engine.  To be cancelled here does
        not end the request, so a wait may have a time limit.
        """
        if not self._unfinished:
            return []
        await self._inbox.wait()
        found = [self._take()]
        while self._inbox.items and isinstance(self._inbox.items[0], Increment):
            found.append(self._take())
        return found

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Increment:
        if not self._unfinished:
            raise StopAsyncIteration
        try:
            await self._inbox.wait()
        except asyncio.CancelledError:
            self._end()
            raise
        return self._take()

    def fail(self, error: Exception) -> None:
        """Abort the request; its consumer gets `error`, after what has arrived."""
        self._inbox.put(error)
        self._abort([self.request.id])

    async def aclose(self) -> None:
        """Abort the request unless it has ended."""
        self._end()

    def __del__(self) -> None:
        self._end()

    def _take(self) -> Increment:
        item = self._inbox.items.popleft()
        if isinstance(item, Exception):
            self._unfinished = 0
            raise item
        self._unfinished -= item.finish_reason is not None
        return item

    def _end(self) -> None:
        unfinished, self._unfinished = self._unfinished, 0
        if unfinished:
            self._abort([self.request.id])
