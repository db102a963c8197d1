"""What is asked in a round, and who goes away before the answer; all of it drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

LEAVERS = 0.3  # share of clients that go away


@dataclass(frozen=True)
class Asked:
    """A request that is in order.  `settings` are under the names of SamplingParams."""

    number: int
    endpoint: str  # "chat", "completions"
    content: Any  # messages, or text
    settings: dict[str, Any]
    stream: bool

    @property
    def route(self) -> str:
        """Path of the endpoint."""
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def body(self, model: str) -> dict[str, Any]:
        """What goes over the wire."""
        settings = dict(self.settings)
        if self.endpoint == "chat" and self.number % 2:  # the newer of OpenAI's two names
            settings["max_completion_tokens"] = settings.pop("max_tokens")
        key = "messages" if self.endpoint == "chat" else "prompt"
        body = {"model": model, key: self.content, **settings}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


def requests(count: int, texts: list[str], max_tokens: int, seed: int) -> list[Asked]:
    """`count` requests of all kinds: half of them greedy, the others with seeds of their own."""
    return [_request(number, texts, max_tokens, seed) for number in range(count)]


def _request(number: int, texts: list[str], max_tokens: int, seed: int) -> Asked:
    draw = random.Random(f"request {seed} {number}")
    text = "\n\n".join(draw.choices(texts, k=draw.choice((1, 1, 1, 2, 4))))
    settings: dict[str, Any] = {
        "max_tokens": draw.randint(max(2, max_tokens // 4), max_tokens),
        "temperature": 0,
    }
    if draw.random() < 0.5:
        settings |= {"temperature": round(draw.uniform(0.3, 1.5), 2), "seed": draw.randrange(1000)}
        settings |= draw.choice(({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}))
        if draw.random() < 0.25:
            settings["n"] = 2
    if draw.random() < 0.1:
        settings["stop"] = draw.choice(([". "], ["\n\n"], ["1"], [" the", "e,"]))
    if draw.random() < 0.1:
        settings["presence_penalty"] = 0.5
    endpoint = draw.choice(("chat", "completions"))
    content: Any = text
    if endpoint == "chat":
        content = [{"role": "user", "content": text}]
        if draw.random() < 0.3:
            content.insert(0, {"role": "system", "content": texts[0]})
    return Asked(number, endpoint, content, settings, stream=draw.random() < 0.8)


@dataclass(frozen=True)
class Fate:
    """When a client goes away: the first of these that comes; None: it does not.

    `ended` counts the answers of others that have ended: it says where in the queue a request is
    on any machine, however fast.
    """

    seconds: float | None = None  # after sending
    ended: int | None = None  # answers
    events: int | None = None  # with text, of its own

    @property
    def stays(self) -> bool:
        """Whether it waits for the whole answer."""
        return self == Fate()


def fates(asked: list[Asked], slots: int, seed: int, number: int) -> list[Fate]:
    """What becomes of each request of round `number`, sent in this order to `slots` slots."""
    draw = random.Random(f"fate {seed} {number}")
    return [_fate(request, place, slots, draw) for place, request in enumerate(asked)]


def _fate(request: Asked, place: int, slots: int, draw: random.Random) -> Fate:
    if draw.random() >= LEAVERS:
        return Fate()
    kind = draw.choice(("queue", "prefill", "stream"))
    if kind == "queue":
        return Fate(seconds=draw.uniform(0.0, 0.3))
    if kind == "prefill" or not request.stream:
        # first come, first served: about now it gets its slot
        return Fate(ended=max(0, place - slots) + draw.randrange(4))
    return Fate(events=draw.randint(1, max(1, request.settings["max_tokens"] // 2)))
