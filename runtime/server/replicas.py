"""`compress serve --replicas N`: N engines, each in a process of its own, behind one address.

    HTTP -> this process: guards, log, choice of a replica -> replica: the same application -> engine

Ray Serve starts the replicas, asks after their health, replaces those that die, and carries requests
and answers (gRPC on the loopback interface); `replica_router` tells it which replica to take.  HTTP is
ours, not Ray's proxy, so that what a client sees is what a server of one process shows.

Relied on, of Ray 2.60:
- `serve.start(proxy_location="Disabled")` and `route_prefix=None`: no HTTP of Ray's.
- RAY_SERVE_USE_GRPC_BY_DEFAULT and RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0: an item of a stream costs
  this process half of what it costs through Ray's object store and a loop of the router's own.
- RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 has Ray's processes listen on 127.0.0.1, as they do on those
  systems; RAY_AUTH_MODE=token with a token made here has them refuse who does not know it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from compress.core.errors import InputError, reason_of
from compress.runtime.server.app import make_app
from compress.runtime.server.forward import ReplicaRoute
from compress.runtime.server.merged_metrics import merged
from compress.runtime.server.metrics import CONTENT_TYPE
from compress.runtime.server.service import ServerSettings, Service

if TYPE_CHECKING:
    from compress.runtime.llm import LLM

logger = logging.getLogger("compress.server")

NAME = "compress"  # of Ray Serve's application
OBJECT_STORE = 80 << 20  # bytes; nothing of ours goes through it, and Ray takes no less
MOST_REQUESTS = 100_000  # of a replica, for Ray; the engine's own limit is what counts
POLL = 1.0  # seconds between questions after the replicas' health
SECONDS_TO_ANSWER = 10.0  # of a replica that is asked how it is
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # memory is the system's to watch, as in one process
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


class ReplicatedService(Service):
    """The replicas, as the application and the process see them."""

    def __init__(self, settings: ServerSettings, replicas: int) -> None:
        """Raises InputError without Ray."""
        if find_spec("ray") is None or find_spec("ray.serve") is None:
            raise InputError("--replicas needs Ray; run pip install 'compress-llm[ray]'")
        super().__init__(settings)
        self.replicas = replicas
        self._running: int | None = None  # replicas that work; None while they are started
        self._taken = 0  # requests that were taken and are not answered
        self._folder: str | None = None  # of Ray's sockets and logs
        self._handle: Any = None

    def load(
        self,
        make_llm: Callable[[], LLM],
        on_ready: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """Start the replicas in a thread, each with a model of `make_llm`, which has to pickle."""

        def start() -> None:
            try:
                self._start(make_llm)
            except Exception as error:
                on_failure(error)
            else:
                self._running = self.replicas
                on_ready()

        threading.Thread(target=start, name="loading", daemon=True).start()

    @property
    def state(self) -> str:
        """In a word: loading, ready, draining or fault (no replica works)."""
        if self.draining:
            return "draining"
        if self._running is None:
            return "loading"
        return "ready" if self._running else "fault"

    def health(self) -> tuple[bool, str]:
        """Whether a replica works, or will."""
        if self._running == 0:
            return False, f"none of {self.replicas} replicas works; they are being restarted"
        return True, "ok"

    @property
    def active(self) -> int:
        """Requests that were taken and have not ended."""
        return self._taken

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """While a request is answered."""
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
