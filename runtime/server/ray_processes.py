"""Ray's own processes: closed to others, and silent.

Relied on, of Ray 2.60:
- RAY_SERVE_USE_GRPC_BY_DEFAULT and RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0: an item of a stream
  costs this process half of what it costs through Ray's objects and a loop of the router's own.
- RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 has Ray's processes listen on 127.0.0.1, as they do on those
  systems; RAY_AUTH_MODE=token with a token made here has them refuse who does not know it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Iterable

import psutil

from compress.core.errors import InputError

OBJECT_STORE = 80 << 20  # bytes; nothing of ours goes through it, and Ray takes no less
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


def import_ray() -> None:
    """Import Ray Serve, with our settings.  InputError where it is not installed."""
    os.environ.update(ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))  # read at the import
    try:
        import ray.serve  # noqa: F401
    except ImportError:
        raise InputError(
            "--replicas needs Ray Serve; run pip install 'compress-llm[ray]'"
        ) from None
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def take_back_signals() -> None:
    """Undo what Ray did to SIGTERM, below Python: it would print where the process was."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    signal.siginterrupt(signal.SIGTERM, False)


def kill(processes: Iterable[psutil.Process]) -> None:
    """End processes at once."""
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            process.kill()


def start_ray(folder: str, replicas: int, threads: int, gpus: int) -> None:
    """Start Ray on this machine, with its sockets and logs in `folder`."""
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
