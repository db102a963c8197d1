"""`compress serve --replicas N`: N engines, each in a process of its own, behind one address.

    HTTP -> this process: guards, log, which replica -> replica: the same application -> engine

Ray Serve starts the replicas, asks after their health, replaces those that die, and carries
requests and answers (gRPC on the loopback interface); `replica_router` tells it which replica to
take.  HTTP is ours, not Ray's proxy, so that a client sees what a server of one process shows.

Relied on, of Ray 2.60:
- `serve.start(proxy_location="Disabled")` and `route_prefix=None`: no HTTP of Ray's.
- RAY_SERVE_USE_GRPC_BY_DEFAULT and RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0: an item of a stream
  costs this process half of what it costs through Ray's objects and a loop of the router's own.
- RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 has Ray's processes listen on 127.0.0.1, as they do on those
  systems; RAY_AUTH_MODE=token with a token made here has them refuse who does not know it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psutil
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from compress.core.errors import InputError, reason_of
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
SECONDS_TO_END = 10.0  # for Ray's processes
POLL = 1.0  # seconds between questions after the replicas' health
SECONDS_TO_ANSWER = 10.0  # of a replica that is asked how it is
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # memory is the system's to watch, as in one process
    "RAY_worker_niceness": "0",  # of Ray's own is 15: replicas would give way to anything
    "RAY_COLOR_PREFIX": "0",  # of what replicas say on standard error
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


class ReplicatedService(Service):
    """The replicas, as the application and the process see them."""

    def __init__(self, settings: ServerSettings, replicas: int) -> None:
        """Raises InputError without Ray, and with fewer GPUs than replicas where there are any."""
        import torch

        self._gpus = torch.cuda.device_count()
        if 0 < self._gpus < replicas:
            raise InputError(
                f"--replicas {replicas}: each needs a GPU of its own, and here are {self._gpus}; "
                f"give at most {self._gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        self._threads = max(1, torch.get_num_threads() // replicas)
        os.environ.update(ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))  # read at the import
        try:
            import ray.serve  # noqa: F401
        except ImportError:
            raise InputError(
                "--replicas needs Ray Serve; run pip install 'compress-llm[ray]'"
            ) from None
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        super().__init__(settings)
        self.replicas = replicas
        self._running: int | None = None  # replicas that work; None while they are started
        self._taken = 0  # requests that were taken and are not answered
        self._folder = ""  # of Ray's sockets and logs
        self._others: list[psutil.Process] = []  # this process' children that are not Ray's
        self._handle: Any = None
        self._connected = False  # to Ray
        self._thread: threading.Thread | None = None
        self._started = threading.Event()  # or it was tried
        self._closing = threading.Event()

    def load(
        self,
        make_llm: Callable[[], LLM],
        on_ready: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """Start the replicas in a thread, each with a model of `make_llm`, which has to pickle."""

        import ray

        def run() -> None:
            try:
                self._start(make_llm)
            except BaseException as error:
                on_failure(error)
            else:
                self._running = self.replicas
                on_ready()
            self._started.set()
            # The system ends Ray's processes when the thread that started them ends.
            self._closing.wait()
            ray.shutdown()

        self._thread = threading.Thread(target=run, name="replicas", daemon=True)
        self._thread.start()

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

    def call(self, key: str, request: dict[str, Any], body: bytes, tried: tuple[str, ...]) -> Any:
        """Ray's response generator for one request, on the replica that `key` prefers."""
        return self._handle.options(
            method_name="answer", stream=True, session_id=key,
            request_serialization="pickle", response_serialization="pickle",
        ).remote(request, body, tried=tried)  # fmt: skip

    def first_routes(self) -> list[BaseRoute]:
        """What goes on to a replica, and /metrics of all."""
        routes: list[BaseRoute] = [ReplicaRoute(self)]
        if self.settings.metrics:
            routes.append(Route("/metrics", self._metrics))
        return routes

    async def _metrics(self, _: Request) -> Response:
        answers = []
        with contextlib.suppress(TimeoutError):
            answers = await self._ask("metrics") if self._running is not None else []
        texts = {str(rank): text for rank, text in answers}
        text = merged(self.metrics.text(), dict(sorted(texts.items())))
        return Response(text, media_type=CONTENT_TYPE)

    async def watch(self) -> None:
        """For ever: see how many replicas work."""
        while self._running is None:
            await asyncio.sleep(POLL / 20)
            if self._connected:
                _take_back_signals()
        while True:
            await asyncio.sleep(POLL)
            try:
                answers = await self._ask("health")
            except TimeoutError:
                logger.warning("a replica says nothing for %g s", SECONDS_TO_ANSWER)
                continue  # Ray will replace it; the others work
            except Exception as error:
                logger.warning("the replicas cannot be asked: %s", reason_of(error))
                continue
            for reason in (reason for ok, reason in answers if not ok):
                logger.error("a replica has failed: %s", reason)
            running = sum(ok for ok, _ in answers)
            if running != self._running:
                logger.warning("%d of %d replicas work", running, self.replicas)
            self._running = running

    def cut_off(self) -> int:
        """Have the replicas end what is left, with an error; how many requests there are."""
        if self._taken:
            self._cutting = asyncio.ensure_future(self._ask("cut_off"))
        return self._taken

    def close(self) -> None:
        """End the replicas and Ray's processes."""
        if self._thread is None:
            return
        # Nothing is left to do for them, and they would take their time to end; some of Ray's
        # helpers outlive the rest otherwise.
        started = [p for p in psutil.Process().children(recursive=True) if p not in self._others]
        _kill([process for process in started if process.ppid() != os.getpid()])
        self._closing.set()
        if self._started.is_set():
            self._thread.join(SECONDS_TO_END)
        _kill(started)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _ask(self, method: str) -> list[Any]:
        """What each replica says, but for those that died.  TimeoutError if one is mute."""
        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            answers = await self._handle.broadcast(method).results_async(
                timeout_s=SECONDS_TO_ANSWER, return_exceptions=True
            )
        except DeploymentUnavailableError:  # there is none
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def _start(self, make_llm: Callable[[], LLM]) -> None:
        """Start Ray and the replicas; returns when all have their model."""
        self._others = psutil.Process().children(recursive=True)
        self._folder = tempfile.mkdtemp(prefix="compress-")  # a socket's path has to be short
        _start_ray(self._folder, self.replicas, self._threads, self._gpus)
        self._connected = True
        from ray import serve
        from ray.serve.schema import LoggingConfig

        from compress.runtime.server.replica import Replica

        quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
        serve.start(proxy_location="Disabled", logging_config=quiet)
        deployment = serve.deployment(
            num_replicas=self.replicas,
            ray_actor_options={"num_cpus": self._threads, "num_gpus": 1 if self._gpus else 0},
            logging_config=quiet,
            max_ongoing_requests=MOST_REQUESTS,
            max_constructor_retry_count=1,
            health_check_period_s=POLL,
            health_check_timeout_s=10,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=1,
            request_router_config={
                "request_router_class": "compress.runtime.server.replica_router.PrefixRouter"
            },
        )(Replica)
        settings = dataclasses.replace(self.settings, api_keys=(), allowed_hosts=None)
        try:
            self._handle = serve.run(
                deployment.bind(settings, make_llm), name=NAME, route_prefix=None
            )
        except Exception as error:
            raise _failure(_status_message() or str(error)) from error


def cache_memory_of_each(replicas: int) -> int | None:
    """Bytes for a replica's cache where nobody says: a share of one server's.  None on GPUs."""
    import torch

    from compress.runtime.llm import cache_memory

    return None if torch.cuda.is_available() else cache_memory(torch.device("cpu")) // replicas


def _take_back_signals() -> None:
    """Undo what Ray did to SIGTERM, below Python: it would print where the process was."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    signal.siginterrupt(signal.SIGTERM, False)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            process.kill()


def _start_ray(folder: str, replicas: int, threads: int, gpus: int) -> None:
    import ray

    os.environ["OMP_NUM_THREADS"] = str(threads)  # the replicas inherit it
    ray.init(
        address="local",
        num_cpus=replicas * threads,
        num_gpus=gpus,
        object_store_memory=OBJECT_STORE,
        include_dashboard=False,
        configure_logging=False,
        _temp_dir=folder,
    )


def _status_message() -> str:
    """What Ray Serve says of the replicas."""
    from ray import serve

    application = serve.status().applications.get(NAME)
    deployments = application.deployments.values() if application else ()
    return "\n".join(deployment.message for deployment in deployments)


def _failure(message: str) -> InputError:
    """What the constructor of a replica raised, out of the traceback that Ray tells."""
    found = re.findall(r"^\s*(?:[\w.]+\.)?(\w*(?:Error|Exception)): (.+)$", message, re.MULTILINE)
    name, reason = found[-1] if found else ("", message)
    named = name in ("", InputError.__name__)
    return InputError(reason if named else f"the replicas do not start: {name}: {reason}")
