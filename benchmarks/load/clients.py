"""Clients, good and bad: each asks once, some go away, and all that comes back is kept."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from compress.bench.client import events, text_of
from load.asked import Asked, Fate
from load.malformed import Malformed

NO_STATUS = 0


@dataclass
class Outcome:
    """What a client saw: of each output its text and finish reason, and how it ended."""

    texts: dict[int, str] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    status: int = NO_STATUS
    retry_after: str | None = None
    done: bool = False  # the whole response has come
    left: bool = False  # the client went away before
    error: Any = None  # an error object, as a body or as an event
    broken: str | None = None  # what became of the connection


class Progress:
    """Counts answers that have ended, and wakes who waits for a number of them."""

    def __init__(self) -> None:
        self.ended = 0
        self._changed = asyncio.Event()

    def step(self) -> None:
        """One more has ended."""
        self.ended += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def reach(self, count: int) -> None:
        """Wait until `count` have ended."""
        while self.ended < count:
            await self._changed.wait()


def connections(api_key: str | None = None) -> aiohttp.ClientSession:
    """A session without limits of number or time; a new connection for each request."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=60),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
    )


async def ask(
    client: aiohttp.ClientSession, url: str, model: str, asked: Asked, fate: Fate, all_: Progress
) -> Outcome:
    """Send a request, and take what comes until its end, or until the client goes away."""
    outcome = Outcome()
    taking = asyncio.create_task(_take(client, url + asked.route, asked.body(model), outcome, fate))
    leaving = [asyncio.create_task(wait) for wait in _waits(fate, all_)]
    await asyncio.wait([taking, *leaving], return_when=asyncio.FIRST_COMPLETED)
    if not taking.done():
        outcome.left = True
    for task in (taking, *leaving):
        task.cancel()  # closes the connection
    await asyncio.gather(taking, *leaving, return_exceptions=True)
    if not taking.cancelled() and (error := taking.exception()):
        raise error
    all_.step()
    return outcome


def _waits(fate: Fate, all_: Progress) -> list[Any]:
    """What the client waits for before it goes away, but for its own events."""
    waits: list[Any] = []
    if fate.seconds is not None:
        waits.append(asyncio.sleep(fate.seconds))
    if fate.ended is not None:
        waits.append(all_.reach(fate.ended))
    return waits


async def _take(
    client: aiohttp.ClientSession, url: str, body: dict[str, Any], outcome: Outcome, fate: Fate
) -> None:
    try:
        async with client.post(url, json=body) as response:
            outcome.status = response.status
            outcome.retry_after = response.headers.get("Retry-After")
            if response.status != 200:
                outcome.error = (await response.json())["error"]
                outcome.done = True
            elif body.get("stream"):
                await _take_stream(response, outcome, fate)
            else:
                _take_choices(await response.json(), outcome)
                outcome.done = True
    except (aiohttp.ClientError, OSError) as error:
        outcome.broken = repr(error)
    except (ValueError, LookupError, TypeError) as error:
        outcome.broken = f"not OpenAI's format: {error!r}"


async def _take_stream(response: aiohttp.ClientResponse, outcome: Outcome, fate: Fate) -> None:
    with_text = 0
    async for _, data in events(response.content):
        if data == b"[DONE]":
            outcome.done = True
            return
        event = json.loads(data)
        if event.get("error"):
            outcome.error = event["error"]
        _take_choices(event, outcome)
        with_text += any(text_of(choice) for choice in event.get("choices", []))
        if with_text == fate.events:
            outcome.left = True
            response.close()
            return


def _take_choices(value: dict[str, Any], outcome: Outcome) -> None:
    """Add a response's or an event's choices."""
    outcome.usage = value.get("usage") or outcome.usage
    for choice in value.get("choices", []):
        index = choice["index"]
        message = choice.get("message")
        text = text_of(choice) if message is None else message["content"]
        outcome.texts[index] = outcome.texts.get(index, "") + text
        if choice.get("finish_reason"):
            outcome.finish_reasons[index] = choice["finish_reason"]


async def misbehave(client: aiohttp.ClientSession, url: str, bad: Malformed) -> str | None:
    """Send a request that is not in order; says what is wrong with the refusal, if anything."""
    if bad.raw:
        return await _misbehave_raw(url, bad)
    try:
        async with client.post(url + bad.route, data=bad.body, headers=bad.headers) as response:
            status, body = response.status, await response.read()
    except (aiohttp.ClientError, OSError) as error:
        return None if bad.may_close else f"{bad.name}: {error!r}"
    if status not in bad.statuses:
        return f"{bad.name}: HTTP {status}, not {bad.statuses}: {body[:200]!r}"
    try:
        error = json.loads(body)["error"]
        if error["message"] and error["type"] and {"param", "code"} <= error.keys():
            return None
    except (ValueError, LookupError, TypeError):
        pass
    return f"{bad.name}: no error object: {body[:200]!r}"


async def _misbehave_raw(url: str, bad: Malformed) -> str | None:
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        writer.write(bad.raw)
        await writer.drain()
        if not bad.statuses:
            return None  # and closes, with the rest never sent
        line = await asyncio.wait_for(reader.readline(), 60)
        words = line.split()
        status = int(words[1]) if len(words) > 1 and words[1].isdigit() else NO_STATUS
        return None if status in bad.statuses else f"{bad.name}: {line!r}, not {bad.statuses}"
    except (OSError, TimeoutError) as error:
        return f"{bad.name}: {error!r}"
    finally:
        writer.close()


def fault(outcome: Outcome, asked: Asked, right: dict[str, Any], ending: bool) -> str | None:
    """What is wrong with what a client saw; None where nothing is.

    While the server is `ending`, a stream may end with an error event, and what waits be refused.
    """
    name = f"request {asked.number} ({asked.endpoint}{', streamed' * asked.stream})"
    for index, text in outcome.texts.items():
        expected = right["texts"][index] if index < len(right["texts"]) else None
        if expected is None or not expected.startswith(text):
            return f"{name}: output {index} is {text!r}, not {expected!r}"
    if outcome.left:
        return None
    if outcome.status in (429, 503):
        if not (outcome.retry_after or "").isdigit():
            return f"{name}: HTTP {outcome.status} without Retry-After"
        return None if outcome.status == 429 or ending else f"{name}: HTTP 503: {outcome.error}"
    if outcome.broken:
        return f"{name}: {outcome.broken}, after HTTP {outcome.status}"
    if outcome.status != 200:
        return f"{name}: HTTP {outcome.status}: {outcome.error}"
    if outcome.error:
        return None if ending else f"{name}: {outcome.error}"
    if not outcome.done:
        return f"{name}: cut off in silence after {outcome.texts}"
    return _fault_of_whole(name, outcome, right)


def _fault_of_whole(name: str, outcome: Outcome, right: dict[str, Any]) -> str | None:
    """A whole answer equals the right one, to its last token, and so do its counts."""
    count = range(len(right["texts"]))
    if [outcome.texts.get(index) for index in count] != right["texts"]:
        return f"{name}: {outcome.texts}, not {right['texts']}"
    if [outcome.finish_reasons.get(index) for index in count] != right["finish_reasons"]:
        return f"{name}: ended by {outcome.finish_reasons}, not {right['finish_reasons']}"
    counts = right["prompt_tokens"], right["tokens"]
    usage = outcome.usage or {}
    if (usage.get("prompt_tokens"), usage.get("completion_tokens")) != counts:
        return f"{name}: usage {outcome.usage}, not {counts}"
    return None


def kinds(outcomes: list[Outcome]) -> dict[str, int]:
    """How many outcomes there are of each kind."""
    return dict(Counter(map(kind, outcomes)))


def kind(outcome: Outcome) -> str:
    """One word or two for how a request ended."""
    if outcome.left:
        return "left mid-stream" if any(outcome.texts.values()) else "left before any text"
    if outcome.status in (429, 503):
        return f"refused, {outcome.status}"
    if outcome.error and outcome.status == 200:
        return "error event"
    if outcome.done and outcome.status == 200:
        return "answered"
    if (outcome.broken or "").startswith("ClientConnectorError"):
        return "no connection"
    return "no answer"


async def watch(read: Any, seconds: float, found: list[dict[str, float]]) -> None:
    """Append what `read` gives every so many seconds, until cancelled."""
    while True:
        began = time.monotonic()
        found.append(await asyncio.to_thread(read))
        await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))
