"""Rounds of good and bad clients on one server, and what each leaves behind."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from typing import Any

from compress.core.resources import in_words
from compress.core.source import read_config, resolve_model
from load import clients
from load.asked import Asked, Fate, fates
from load.clients import Outcome, Progress
from load.malformed import malformed
from load.report import line
from load.server import ServerProcess

MAX_BODY = 2 << 20
EVERY = 0.2  # seconds between two looks at the metrics
NONSENSE = 0.06  # requests not in order, for each that is


def rounds(
    options: argparse.Namespace, server: ServerProcess, asked: list[Asked], right: list[Any]
) -> list[dict[str, Any]]:
    """All rounds, with what is left of each when the server has come to rest."""
    results: list[dict[str, Any]] = []
    asyncio.run(one(server, asked[0]))  # what is made at the first request is there
    server.rest()
    files = server.open_files()
    for number in range(1, options.rounds + 1):
        found = asyncio.run(one_round(options, server, asked, right, number))
        left = rest(server, files)
        found["faults"] += left.pop("faults")
        found |= left
        if number > 1:
            more = found["memory"] - results[0]["memory"]
            if more > options.memory_bound:
                found["faults"].append(f"memory: {in_words(more)} above the first round's")
        results.append(found)
        print(line(found), file=sys.stderr, flush=True)
    return results


async def one(server: ServerProcess, asked: Asked) -> Outcome:
    async with clients.connections() as client:
        return await clients.ask(client, server.url, server.model, asked, Fate(), Progress())


async def one_round(
    options: argparse.Namespace,
    server: ServerProcess,
    asked: list[Asked],
    right: list[Any],
    number: int,
) -> dict[str, Any]:
    """Everybody at once, and nonsense in between; what they saw, and what is wrong with it."""
    draw = random.Random(f"round {options.seed} {number}")
    order = draw.sample(asked, len(asked))
    before, began = server.metrics(), time.monotonic()
    progress, seen = Progress(), []
    bad = nonsense(options, server, len(asked), draw)
    async with clients.connections() as client:
        watching = asyncio.create_task(clients.watch(server.metrics, EVERY, seen))
        asking = [
            clients.ask(client, server.url, server.model, request, fate, progress)
            for request, fate in zip(
                order, fates(order, options.slots, options.seed, number), strict=True
            )
        ]

        async def misbehave(place: int, entry: Any) -> str | None:
            await progress.reach(place * len(asked) // len(bad))
            return await clients.misbehave(client, server.url, entry)

        answers, refusals = await asyncio.gather(
            asyncio.gather(*asking),
            asyncio.gather(*(misbehave(place, entry) for place, entry in enumerate(bad))),
        )
        watching.cancel()
        (stopped,) = await asyncio.gather(watching, return_exceptions=True)
        if isinstance(stopped, Exception):
            raise stopped
    seconds = time.monotonic() - began
    after = server.metrics()
    seen.append(after)
    faults = [
        clients.fault(outcome, request, right[request.number], ending=False)
        for outcome, request in zip(answers, order, strict=True)
    ]
    running, waiting = (
        max(entry[f"num_requests_{name}"] for entry in seen) for name in ("running", "waiting")
    )
    if running > options.slots or waiting > options.streams:
        faults.append(f"{running:g} running, {waiting:g} waiting at once")
    return {
        "round": number,
        "seconds": round(seconds, 1),
        "requests": len(order),
        "outcomes": clients.kinds(answers),
        "malformed": len(bad),
        "peak_running": running,
        "peak_waiting": waiting,
        "peak_kv_cache_usage": max(entry["kv_cache_usage_perc"] for entry in seen),
        "generation_tokens": after["generation_tokens_total"] - before["generation_tokens_total"],
        "preemptions": after["num_preemptions_total"] - before["num_preemptions_total"],
        "faults": [fault for fault in [*faults, *refusals] if fault],
    }


def nonsense(
    options: argparse.Namespace, server: ServerProcess, count: int, draw: random.Random
) -> list[Any]:
    """Requests that are not in order: each kind at least once."""
    vocabulary = read_config(resolve_model(options.model).folder)["vocab_size"]
    known = malformed(server.model, MAX_BODY, vocabulary)
    more = max(0, round(NONSENSE * count) - len(known))
    return draw.sample(known, len(known)) + draw.choices(known, k=more)


def rest(server: ServerProcess, files: int) -> dict[str, Any]:
    """The server after a round: what it still holds, by itself and as seen from outside."""
    faults = []
    try:
        server.rest()
    except TimeoutError as error:
        faults.append(str(error))
    books = server.check()
    if books["wrong"] or books["requests"] or books["blocks_in_use"]:
        faults.append(f"the engine's books: {books}")
    open_files = server.open_files(expected=files)
    if open_files > files:
        faults.append(f"{open_files} open files, {files} before the first round")
    if not server.healthy():
        faults.append("/health or /ready is red")
    return {
        "blocks": {key: books[f"blocks_{key}"] for key in ("in_use", "cached", "free")},
        "books_right": books["wrong"] is None,
        "memory": server.memory(),
        "open_files": open_files,
        "threads": server.threads(),
        "faults": faults,
    }
