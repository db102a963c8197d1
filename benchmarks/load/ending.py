"""SIGTERM under load: who is answered, who is told, and whether the process ends."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import time
from typing import Any

from load import clients
from load.asked import Asked, Fate
from load.clients import Outcome, Progress
from load.server import ServerProcess

AFTERWARDS = 20  # requests that come after SIGTERM
MARGIN = 20.0  # seconds after the time to finish in which the process must have ended


def ending(
    options: argparse.Namespace,
    server: ServerProcess,
    asked: list[Asked],
    right: list[Any],
    drain: int,
    patient: bool,
) -> dict[str, Any]:
    """Fill a server and stop it; `drain` seconds are enough for all (`patient`), or for some."""
    found = asyncio.run(_ending(server, asked[: options.streams], right, drain, patient))
    try:
        code = server.process.wait(max(0.0, found.pop("deadline") - time.monotonic()))
    except subprocess.TimeoutExpired:
        code = None
        found["faults"].append(f"the process has not ended within {drain} s and {MARGIN:g} s")
    if surprises := server.log.read_text().count("Traceback"):
        found["faults"].append(f"{surprises} tracebacks in {server.log}")
    if patient and code != 0:
        found["faults"].append(f"exit code {code}, not 0")
    return {"drain_seconds": drain, **found, "exit_code": code}


async def _ending(
    server: ServerProcess, asked: list[Asked], right: list[Any], drain: int, patient: bool
) -> dict[str, Any]:
    progress = Progress()
    async with clients.connections() as client:

        def ask(request: Asked) -> asyncio.Task[Outcome]:
            one = clients.ask(client, server.url, server.model, request, Fate(), progress)
            return asyncio.create_task(one)

        tasks = [ask(request) for request in asked]
        await progress.reach(max(1, len(asked) // 8))  # first come, first served: all are in
        held = await asyncio.to_thread(server.metrics)
        began = time.monotonic()
        server.terminate()
        await asyncio.sleep(1.0)
        late = [ask(request) for request in asked[:AFTERWARDS]]
        deadline = began + drain + MARGIN
        _, hanging = await asyncio.wait([*tasks, *late], timeout=deadline - time.monotonic())
        seconds = time.monotonic() - began
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
    faults = [f"{len(hanging)} requests hang"] if hanging else []
    outcomes = [task.result() for task in tasks if task not in hanging]
    for request, task in zip(asked, tasks, strict=True):
        if task not in hanging:
            wrong = clients.fault(task.result(), request, right[request.number], not patient)
            faults += [wrong] if wrong else []
    turned_away = [task.result() for task in late if task not in hanging]
    faults += [f"after SIGTERM: {wrong}" for wrong in map(_not_refused, turned_away) if wrong]
    return {
        "requests": len(asked),
        "unfinished_at_term": held["num_requests_running"] + held["num_requests_waiting"],
        "seconds": round(seconds, 1),
        "outcomes": clients.kinds(outcomes),
        "afterwards": clients.kinds(turned_away),
        "faults": faults,
        "deadline": deadline,
    }


def _not_refused(outcome: Outcome) -> str | None:
    """What is wrong with an answer to who comes too late: 503, or nobody listens any more."""
    if outcome.status == 503 and (outcome.retry_after or "").isdigit():
        return None
    if outcome.status == clients.NO_STATUS and outcome.broken:
        return None
    return f"HTTP {outcome.status}, Retry-After {outcome.retry_after}: {outcome.error}"
