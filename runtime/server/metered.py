"""A stream of the runtime that is timed on its way to the client."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from compress.core.errors import reason_of
from compress.runtime.outputs import Increment
from compress.runtime.sequence import Request
from compress.runtime.server.errors import ApiError
from compress.runtime.server.metrics import Metrics
from compress.runtime.server.request_log import RequestRecord
from compress.runtime.streams import Stream

logger = logging.getLogger("compress.server")

NOTE = "It ended every request that the engine had."


class MeteredStream:
    """Use it as a `Stream`.  What ends a request from without is raised as an ApiError.

    `on_end` is called when the request has ended, unless the stream was just dropped.
    """

    _unfinished = 0  # outputs

    def __init__(
        self,
        stream: Stream,
        metrics: Metrics,
        record: RequestRecord | None,
        on_end: Callable[[MeteredStream], None],
    ) -> None:
        self._stream = stream
        self._metrics = metrics
        self._record = record
        self._on_end = on_end
        self._unfinished = stream.request.params.n
        self._outputs = [_Times() for _ in range(self._unfinished)]
        self._first_token = True
        if record is not None:
            record.prompt_tokens += stream.request.prompt_length

    @property
    def request(self) -> Request:
        """The engine's own record of the request."""
        return self._stream.request

    async def next(self) -> list[Increment]:
        """All that has arrived, at least one; nothing once every output has ended."""
        try:
            increments = await self._stream.next()
        except ApiError:
            self._end("error")
            raise
        except Exception as error:
            _tell(error)
            self._end("error")
            raise ApiError(
                500,
                "the engine failed while it worked on this request; its log says why; try again",
                code="engine_fault",
            ) from error
        self._observe(increments)
        return increments

    def fail(self, error: ApiError) -> None:
        """Have the consumer's next read raise `error`, after what has arrived."""
        self._stream.fail(error)

    async def aclose(self) -> None:
        """Abort the request unless it has ended."""
        self._end("abort")
        await self._stream.aclose()

    def __del__(self) -> None:  # wherever a collection of garbage happens to run
        if self._unfinished:
            self._metrics.abandoned(self._unfinished)

    def _observe(self, increments: list[Increment]) -> None:
        now = time.monotonic()
        arrived: dict[int, int] = {}  # tokens, by output
        for increment in increments:
            count = len(increment.token_ids)
            arrived[increment.index] = arrived.get(increment.index, 0) + count
        for index, count in arrived.items():
            if count:
                self._observe_tokens(self._outputs[index], count, now)
        for increment in increments:
            if increment.finish_reason:
                self._observe_end(increment.finish_reason, self._outputs[increment.index])

    def _observe_tokens(self, output: _Times, count: int, now: float) -> None:
        request = self.request
        if self._first_token:
            self._first_token = False
            self._metrics.time_to_first_token.observe(now - request.arrived)
            if request.started is not None:
                self._metrics.queue_time.observe(request.started - request.arrived)
            if self._record is not None and self._record.first_token is None:
                self._record.first_token = now
        if self._record is not None:
            self._record.output_tokens += count
        if not output.count:
            output.first = now
        else:  # those that came together share the time since the last
            for _ in range(count):
                self._metrics.inter_token_latency.observe((now - output.last) / count)
        output.last = now
        output.count += count

    def _observe_end(self, reason: str, output: _Times) -> None:
        self._metrics.finished(reason)
        if output.count > 1:
            mean = (output.last - output.first) / (output.count - 1)
            self._metrics.time_per_output_token.observe(mean)
        self._unfinished -= 1
        if not self._unfinished:
            self._metrics.end_to_end.observe(time.monotonic() - self.request.arrived)
            self._on_end(self)

    def _end(self, reason: str) -> None:
        """End what has not ended by itself."""
        for _ in range(self._unfinished):
            self._metrics.finished(reason)
        if self._unfinished:
            self._unfinished = 0
            self._on_end(self)


def _tell(error: Exception) -> None:
    """Log what went wrong in the engine: once, though every request of a step gets it."""
    if NOTE not in getattr(error, "__notes__", ()):
        error.add_note(NOTE)
        logger.error("the engine failed: %s", reason_of(error), exc_info=error)


class _Times:
    """When the tokens of one output came."""

    __slots__ = ("count", "first", "last")

    def __init__(self) -> None:
        self.count = 0
        self.first = self.last = 0.0  # time.monotonic() seconds
