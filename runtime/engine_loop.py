"""The engine in a thread of its own, for callers in any other: requests in, increments out.

A listener is called in that thread with each increment of its request, or with the exception that
ended it.  It must return soon: what it does holds up every request.  One that raises has its
request aborted.

A step that fails ends every request, and is a fault of the engine until a step succeeds; while
nobody asks for one, a small request of the loop's own tries, so that what was passing passes.  That
request also tells whether the engine is at fault where a step gave its requests errors alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

from compress.core.errors import InputError, reason_of
from compress.runtime.engine import Engine
from compress.runtime.outputs import Increment
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.sequence import Request
from compress.runtime.surplus import say_surplus

Listener = Callable[[Increment | Exception], None]

HANGS = 300.0  # seconds; a step is at most one chunk of prompts
RETRY = 1.0  # seconds between attempts to get over a fault
PROBE_ID = "probe"
PROBE = SamplingParams(max_tokens=1, temperature=0)


class QueueFullError(RuntimeError):
    """As many requests as may wait are waiting; try again later."""


class EngineLoop:
    """Steps `engine` while there is work.  The thread starts with the first request.

    At most `most_unfinished` requests are taken at a time; None sets no bound.
    """

    def __init__(self, engine: Engine, most_unfinished: int | None = None) -> None:
        self._engine = engine
        self._most_unfinished = most_unfinished
        self._changed = threading.Condition()  # guards what follows
        self._listeners: dict[str, Listener] = {}  # of unfinished requests
        self._arrived: list[Request] = []
        self._aborted: list[str] = []
        self._closed = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # of the last step, or what ended the thread
        self._doubtful = False  # the last step gave errors and no token
        self._step_began: float | None = None  # while a step is under way

    @property
    def fault(self) -> str | None:
        """Why nothing can be computed now, or None."""
        began, error = self._step_began, self._error
        if error is not None:
            return f"the engine failed: {type(error).__name__}: {reason_of(error)}"
        if began is not None and (seconds := time.monotonic() - began) > HANGS:
            return f"the engine hangs: a step has taken {seconds:.0f} s"
        return None

    def submit(self, requests: Items[tuple[Request, Listener]]) -> None:
        """Queue requests, which `Engine.prepare` made, so that the same step sees all of them.

        QueueFullError if not all of them may wait; none is queued then.  InputError if they never
        may, being more than there is room for.
        """
        with self._changed:
            if self._closed:
                raise InputError("the model is closed; load it again")
            most, unfinished = self._most_unfinished, len(self._listeners)
            if most is not None and len(requests) > most:
                raise InputError(
                    f"{len(requests)} requests at once; allowed are {most}, send fewer"
                )
            if most is not None and unfinished + len(requests) > most:
                raise QueueFullError(f"{unfinished} requests are unfinished, of {most} allowed")
            self._listeners.update((request.id, listener) for request, listener in requests)
            self._arrived += [request for request, _ in requests]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
            self._changed.notify()

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests before the next step; those that have ended already are left alone."""
        with self._changed:
            self._aborted += request_ids
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the step under way; unfinished requests get an exception."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed:
                self._turn()
            self._end(InputError("the model was closed"))
            say_surplus(self._engine.model)
        except BaseException as error:  # a mistake in this file or the engine's accounting
            self._error = error
            self._end(RuntimeError(f"the engine's thread ended: {error!r}"))
            raise

    def _turn(self) -> None:
        """Wait for work, and do one step of it."""
        with self._changed:
            patience = RETRY if self._error or self._doubtful else None
            if not self._changed.wait_for(self._has_something_to_do, patience):
                self._engine.add_request(PROBE_ID, [0], PROBE)
            arrived, self._arrived = self._arrived, []
            aborted, self._aborted = self._aborted, []
        for request in arrived:
            self._add(request)
        for request_id in aborted:
            self._engine.abort(request_id)
        if self._closed:
            return
        self._step_began = time.monotonic()
        try:
            increments = self._engine.step()
        except Exception as error:  # the model's: no request can go on from half a step
            self._error = error
            self._fail(error)
            return
        finally:
            self._step_began = None
        self._judge(increments)
        self._tell(increments)

    def _judge(self, increments: list[Increment]) -> None:
        """See from what a step gave whether the engine works."""
        if any(increment.token_ids for increment in increments):
            self._error, self._doubtful = None, False
            return
        for increment in increments:
            if increment.finish_reason == "error":  # its own, or all there are: the probe tells
                self._doubtful = True
                if increment.request_id == PROBE_ID:
                    self._error = RuntimeError(increment.error)

    def _has_something_to_do(self) -> bool:
        return bool(self._arrived or self._aborted or self._closed or self._engine.has_work())

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except Exception as error:  # this request's own; the others go on
            self._listeners.pop(request.id)(error)

    def _tell(self, increments: list[Increment]) -> None:
        for increment in increments:
            request_id = increment.request_id
            try:
                if request_id in self._listeners:
                    self._listeners[request_id](increment)
            except Exception:  # nobody listens any more, as when an event loop has closed
                self._engine.abort(request_id)
                del self._listeners[request_id]
        for request_id in {increment.request_id for increment in increments}:
            if request_id not in self._engine.requests:
                self._listeners.pop(request_id, None)

    def _fail(self, error: Exception) -> None:
        """End every request that the engine had, also those that a failing step took from it."""
        self._engine.reset()
        with self._changed:
            arrived = {request.id for request in self._arrived}
            failed = [self._listeners.pop(name) for name in self._listeners.keys() - arrived]
        _tell_all(failed, error)

    def _end(self, error: Exception) -> None:
        """End every request there is, begun or not, and take no more."""
        try:
            self._engine.reset()
        finally:  # whatever state the engine is in, nobody waits for it in vain
            with self._changed:
                self._closed = True
                failed = list(self._listeners.values())
                self._listeners.clear()
                self._arrived.clear()
            _tell_all(failed, error)


def _tell_all(listeners: Iterable[Listener], error: Exception) -> None:
    for listener in listeners:
        with contextlib.suppress(Exception):
            listener(error)
