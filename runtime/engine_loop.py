"""The engine in a thread of its own, for callers in any other: requests in, increments out.

A listener is called in that thread with each increment of its request, or with the exception that
ended it.  It must return soon: what it does holds up every request.  One that raises has its
request aborted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from compress.core.errors import InputError
from compress.runtime.engine import Engine
from compress.runtime.outputs import Increment
from compress.runtime.sequence import Request

Listener = Callable[[Increment | Exception], None]


class EngineLoop:
    """Steps `engine` while there is work.  The thread starts with the first request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._listeners: dict[str, Listener] = {}
        self._changed = threading.Condition()  # guards what follows
        self._arrived: list[tuple[Request, Listener]] = []
        self._aborted: list[str] = []
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, requests: Iterable[tuple[Request, Listener]]) -> None:
        """Queue requests, which `Engine.prepare` made, so that the same step sees all of them."""
        with self._changed:
            if self._closed:
                raise InputError("the model is closed; load it again")
            self._arrived += requests
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
        while True:
            with self._changed:
                self._changed.wait_for(self._has_something_to_do)
                arrived, self._arrived = self._arrived, []
                aborted, self._aborted = self._aborted, []
            for request, listener in arrived:
                self._add(request, listener)
            if self._closed:
                self._fail(InputError("the model was closed"))
                return
            for request_id in aborted:
                self._engine.abort(request_id)
            try:
                increments = self._engine.step()
            except Exception as error:  # the model's: no request can go on from half a step
                self._fail(error)
                continue
            self._tell(increments)

    def _has_something_to_do(self) -> bool:
        return bool(self._arrived or self._aborted or self._closed or self._engine.has_work())

    def _add(self, request: Request, listener: Listener) -> None:
        try:
            self._engine.add(request)
            self._listeners[request.id] = listener
        except Exception as error:  # this request's own; the others go on
            listener(error)

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
        """End every request with `error`."""
        listeners, self._listeners = self._listeners, {}
        self._engine.reset()
        for listener in listeners.values():
            try:
                listener(error)
            except Exception:
                continue
