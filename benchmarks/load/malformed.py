"""Requests that are not in order, each with the statuses that may refuse it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Malformed:
    """A body, or with `raw` all that goes through the socket, which is then closed."""

    name: str
    statuses: tuple[int, ...]
    body: bytes = b""
    route: str = CHAT
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    raw: bytes = b""
    may_close: bool = False  # a refusal before all of it is read may be lost with the connection


def malformed(model: str, max_body_bytes: int, vocabulary: int) -> list[Malformed]:
    """One of each kind."""
    messages = [{"role": "user", "content": "hello"}]

    def chat(name: str, *statuses: int, **wrong: Any) -> Malformed:
        body = {"model": model, "messages": messages, "max_tokens": 4} | wrong
        return Malformed(name, statuses or (400,), json.dumps(body).encode())

    def text(name: str, *statuses: int, **wrong: Any) -> Malformed:
        body = {"model": model, "prompt": "hello", "max_tokens": 4} | wrong
        return Malformed(name, statuses or (400,), json.dumps(body).encode(), TEXT)

    return [
        Malformed("no JSON", (400,), b"hello"),
        Malformed("half a JSON object", (400,), b'{"model": "m", "messages": [{"role"'),
        Malformed("an empty body", (400,)),
        Malformed("a list", (400,), b"[1, 2]"),
        Malformed("not UTF-8", (400,), b'{"model": "\xff\xfe", "messages": []}'),
        Malformed("nested 100,000 deep", (400,), b"[" * 100_000),
        Malformed("the form of a web page", (400, 415), b"a=1", headers={
            "Content-Type": "application/x-www-form-urlencoded"}),
        Malformed("too large", (413,), b" " * (max_body_bytes + 1), may_close=True),
        Malformed("a GET where POST is meant", (404, 405), raw=(
            b"GET /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")),
        Malformed("no HTTP", (400,), raw=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
        Malformed("less than it announced", (), raw=(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999\r\n"
            b'Content-Type: application/json\r\n\r\n{"model":')),
        chat("another model", 404, model="no-such-model"),
        chat("no messages", messages=[]),
        chat("messages of text", messages="hello"),
        chat("content that is a number", messages=[{"role": "user", "content": 7}]),
        chat("a role of its own", messages=[{"role": "ruler", "content": "hello"}]),
        chat("a field of its own", max_token=4),
        chat("tools", tools=[{"type": "function", "function": {"name": "f"}}]),
        chat("temperature below 0", temperature=-1),
        chat("top_p of text", top_p="high"),
        chat("n of a billion", n=10**9),
        chat("no new tokens", max_tokens=-1),
        chat("an empty stop string", stop=[""]),
        chat("a schema that is none", response_format={"type": "json_schema", "json_schema": {
            "name": "s", "schema": {"type": "no such type"}}}),
        text("a prompt of nothing", prompt=[]),
        text("tokens beyond the vocabulary", prompt=[vocabulary + 7]),
        text("a prompt over the context", 413, prompt=[5] * 200_000),
        text("a seed of text", seed="lucky"),
        text("an infinite temperature", temperature=float("inf")),
    ]  # fmt: skip
