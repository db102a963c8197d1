"""The process of `compress serve`: its socket, its signals, and how it ends.

    bind -> answer 503 while the model loads -> serve -> drain -> end

SIGTERM or SIGINT begins the drain: nothing new is taken, what was taken finishes within
`drain_seconds`, the rest gets an error.  A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from compress.core.errors import InputError, reason_of
from compress.core.progress import say
from compress.core.resources import raise_file_limit
from compress.runtime.server.app import make_app
from compress.runtime.server.http_protocol import http_protocol
from compress.runtime.server.listener import BACKLOG
from compress.runtime.server.service import Service

if TYPE_CHECKING:
    from compress.runtime.llm import LLM

KEEP_ALIVE = 75  # seconds; clients give up an idle connection sooner, so they never meet its end
FLUSH = 2.0  # seconds to send the errors of requests that were cut off
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(
    service: Service,
    make_llm: Callable[[], LLM],
    listener: socket.socket,
    on_ready: Callable[[], None],
) -> int:
    """Load the model and serve it until a signal; the exit code.

    0 after all requests were finished, 1 if some had to be cut off.  InputError if the model cannot
    be loaded.
    """
    _log_to_stderr()
    raise_file_limit()
    config = uvicorn.Config(
        make_app(service),
        http=http_protocol(),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(_run(service, make_llm, _Server(config), listener, on_ready))


class _Server(uvicorn.Server):
    """uvicorn, with the signals left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(
    service: Service,
    make_llm: Callable[[], LLM],
    server: uvicorn.Server,
    listener: socket.socket,
    on_ready: Callable[[], None],
) -> int:
    loop = asyncio.get_running_loop()
    ending: asyncio.Future[None] = loop.create_future()
    for number in SIGNALS:
        loop.add_signal_handler(number, _on_signal, loop, ending)

    def fail(error: BaseException) -> None:
        loop.call_soon_threadsafe(_set, ending, error)

    def succeed() -> None:
        loop.call_soon_threadsafe(on_ready)

    service.load(make_llm, succeed, fail)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
    failure = ending.exception() if ending.done() else None
    cut = 0 if failure else await _drain(service, server)
    server.should_exit = True
    await serving
    if failure is not None:
        if isinstance(failure, InputError):
            raise failure
        raise InputError(
            f"the model cannot be loaded: {type(failure).__name__}: {reason_of(failure)}"
        )
    return 1 if cut else 0


def _on_signal(loop: asyncio.AbstractEventLoop, ending: asyncio.Future[None]) -> None:
    """Begin the end.  From here on the system's own way of handling a signal, which is to kill."""
    for number in SIGNALS:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    _set(ending, None)


def _set(ending: asyncio.Future[None], error: BaseException | None) -> None:
    if not ending.done():
        ending.set_exception(error) if error else ending.set_result(None)


async def _drain(service: Service, server: uvicorn.Server) -> int:
    """Let requests finish; how many were cut off."""
    seconds = service.settings.drain_seconds
    end = time.monotonic() + seconds
    service.drain()
    if count := service.active:
        say(
            f"Shutting down; unfinished requests: {count}, which have up to {seconds:g} s; "
            "another signal ends them at once"
        )
    while service.active and time.monotonic() < end:
        await asyncio.sleep(0.02)
    cut = service.cut_off()
    if cut:
        say(f"Requests that were cut off: {cut}")
    # What was generated may still have to be sent, to a client that reads slowly.
    server.config.timeout_graceful_shutdown = math.ceil(max(FLUSH, end - time.monotonic()))
    return cut


def _log_to_stderr() -> None:
    """One line a request, and what uvicorn warns of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name, level in (("compress.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
