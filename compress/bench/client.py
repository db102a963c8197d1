"""A client that times answers of any server with OpenAI's API: one request, event by event.

Times are what the client sees, by `time.perf_counter`, in seconds: from just before the request
is sent, connecting included, to when an event's last byte has been read.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from compress.core.errors import InputError, reason_of, shown

ROUTES = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True)
class Server:
    """Where requests go; `timeout` is the seconds that one may take.

    `counts_events`: it is asked to count the tokens so far in every event, as vLLM and ours can.
    """

    url: str
    model: str
    endpoint: str = "chat"
    api_key: str | None = None
    timeout: float = 600.0
    counts_events: bool = False

    def session(self) -> aiohttp.ClientSession:
        """Connections without a limit of their number, and a connection for each request."""
        return session(self.api_key, self.timeout)

    @property
    def route(self) -> str:
        """Address of the endpoint."""
        return self.url + ROUTES[self.endpoint]


@dataclass
class Answer:
    """When each part of an answer had arrived; `error` says why there is none."""

    due: float  # when it should have been sent
    sent: float = 0.0
    texts: list[float] = field(default_factory=list)  # events that brought text
    counts: list[int] = field(default_factory=list)  # tokens of each; 1 where nobody says
    ended: float = 0.0  # the event with the finish reason, or the failure
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None  # kind: "HTTP 429", "cut off", ...
    message: str = ""  # what was said about it

    @property
    def ttft(self) -> float:
        """Seconds to the first text; to the end of an answer without any."""
        return (self.texts[0] if self.texts else self.ended) - self.sent

    @property
    def e2e(self) -> float:
        """Seconds to the end."""
        return self.ended - self.sent

    @property
    def tokens(self) -> int:
        """New tokens, by the server's count, or else events with text: at most one a token."""
        return len(self.texts) if self.output_tokens is None else self.output_tokens

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None where there is no second one."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens: those of one event share the time since the event before."""
        times = zip(self.texts, self.texts[1:], self.counts[1:], strict=False)
        return [gap for a, b, count in times for gap in [(b - a) / count] * count]


def session(api_key: str | None, timeout: float) -> aiohttp.ClientSession:
    """A session with a new connection for each request, as different users have."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=timeout),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        read_bufsize=1 << 20,  # an event is a few hundred bytes; never pause a connection
    )


async def ask(
    client: aiohttp.ClientSession, server: Server, body: dict[str, Any], due: float | None = None
) -> Answer:
    """Send a request and take its answer; what goes wrong is in the answer."""
    options = {"include_usage": True}
    if server.counts_events:
        options["continuous_usage_stats"] = True
    request = {"model": server.model, **body, "stream": True, "stream_options": options}
    data = json.dumps(request).encode()
    answer = Answer(due=time.perf_counter() if due is None else due)
    answer.sent = time.perf_counter()
    try:
        headers = {"Content-Type": "application/json"}
        async with client.post(server.route, data=data, headers=headers) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}"
                answer.message = message_of(await response.read())
            else:
                await _listen(response, answer)
    except TimeoutError:
        answer.error, answer.message = "timeout", f"no end within {server.timeout:g} s"
    except aiohttp.ClientConnectorError as error:
        answer.error, answer.message = "no connection", reason_of(error.os_error)
    except (aiohttp.ClientError, OSError) as error:
        answer.error, answer.message = "cut off", reason_of(error)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        answer.error, answer.message = "not OpenAI's format", reason_of(error)
    if answer.error:
        answer.ended = time.perf_counter()
    return answer


async def _listen(response: aiohttp.ClientResponse, answer: Answer) -> None:
    """Note when text and the end come; an end without a finish reason is an error."""
    finished, counted = False, 0
    async for now, data in events(response.content):
        if data == b"[DONE]":
            break
        event = json.loads(data)
        if event.get("error"):
            answer.error, answer.message = "error event", message_of(data)
            return
        if usage := event.get("usage"):
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.output_tokens = usage["completion_tokens"]
        for choice in event.get("choices") or []:
            if text_of(choice):
                answer.texts.append(now)
                answer.counts.append(max(1, (answer.output_tokens or 0) - counted))
                counted = answer.output_tokens or 0
            finished = finished or bool(choice.get("finish_reason"))
            answer.ended = now
    if not finished:
        answer.error, answer.message = "cut off", "the stream ended without a finish reason"


async def events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[float, bytes]]:
    """Yield when each server-sent event had arrived, and its data."""
    pending = b""
    async for piece in content.iter_any():
        now = time.perf_counter()
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now, line[5:].strip()


def text_of(choice: dict[str, Any]) -> str:
    """What an event adds to the text of a choice, of either endpoint; thoughts are text too."""
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


def message_of(body: bytes) -> str:
    """What an error object says, or else the beginning of what came."""
    try:
        error = json.loads(body)
        error = error.get("error", error.get("detail", error))
        return str(error["message"]) if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, AttributeError):
        return shown(body.decode(errors="replace"))


async def first_model(url: str, api_key: str | None) -> str:
    """The first model that the server names.  Raises InputError where it names none."""
    try:
        async with (
            session(api_key, timeout=30) as client,
            client.get(f"{url}/v1/models") as response,
        ):
            body = await response.read()
            if response.status != 200:
                raise InputError(
                    f"{url}/v1/models: HTTP {response.status}: {message_of(body)}; "
                    "check --api-key, or give --model NAME"
                )
            return str(json.loads(body)["data"][0]["id"])
    except (aiohttp.ClientError, OSError) as error:
        cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        raise InputError(f"cannot reach {url}: {reason_of(cause)}; check --url") from None
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{url}/v1/models names no model; give --model NAME") from None
