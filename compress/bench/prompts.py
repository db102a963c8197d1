"""What a server is asked by `compress bench serve`: a file's prompts, or random words."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.core.errors import InputError, nearest, reason_of, shown

# Settings that a line may bring, under the names of OpenAI and vLLM.
SETTINGS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids",
    "min_tokens", "ignore_eos", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "response_format",
)  # fmt: skip
OWN = ("prompt", "messages", "id", *SETTINGS)  # keys of a line as `compress generate` takes it
FORMS = (
    '{"prompt": TEXT}, {"messages": [...]}, {"turns": [TEXT, ...]} or '
    '{"conversations": [{"from": "human", "value": TEXT}, ...]}'
)
# Short common words, one token each in most vocabularies: a text of N of them is about N tokens.
WORDS = (
    "the of and to in is was for that on with as it by at from his an were are which this be had "
    "or not have also her has one their new two first but who its all after been more time other "
    "some into only over most may years when they would about many then there part world such "
    "between where him up city no out can state known while made people called used year early"
)


@dataclass(frozen=True)
class Prompt:
    """Text to continue or the messages of a conversation, and the line's own settings."""

    content: str | list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    category: str = ""  # as Spec-Bench names it

    def body(self, endpoint: str) -> dict[str, Any]:
        """The part of a request's body that is this prompt's own."""
        if endpoint == "completions":
            return {"prompt": self.content, **self.settings}
        messages = self.content
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return {"messages": messages, **self.settings}


def prompts_of(dataset: str, endpoint: str, seed: int) -> tuple[Iterator[Prompt], int | None]:
    """An endless stream of prompts, and how many come before one comes again (None: never).

    `dataset` is a file, whose lines come in an order drawn from `seed`, or "random:IN,OUT": texts
    of IN words, answered by OUT tokens.  Raises InputError for a line that is no prompt.
    """
    if dataset.startswith("random:"):
        sizes = re.fullmatch(r"random:([1-9]\d{0,5}),([1-9]\d{0,5})", dataset)
        if not sizes:
            raise InputError(
                f"dataset {shown(dataset)}; give random:IN,OUT, such as random:512,128"
            )
        return _random_prompts(int(sizes[1]), int(sizes[2]), random.Random(seed)), None
    found = read_prompts(Path(dataset), endpoint)
    random.Random(seed).shuffle(found)
    return itertools.cycle(found), len(found)


def _random_prompts(words: int, tokens: int, draw: random.Random) -> Iterator[Prompt]:
    known = WORDS.split()
    while True:
        yield Prompt(" ".join(draw.choices(known, k=words)), {"max_tokens": tokens})


def read_prompts(path: Path, endpoint: str) -> list[Prompt]:
    """Prompts of a file of JSON objects, one a line, or one JSON list of them.

    Raises InputError with the place of what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read dataset '{path}': {reason_of(error)}") from None
    prompts = []
    for place, values in _objects(path, text):
        prompt = _prompt(values, place)
        if endpoint == "completions" and not isinstance(prompt.content, str):
            raise InputError(f"{place}: messages go to --endpoint chat")
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"dataset '{path}' holds no prompt; give lines such as {FORMS}")
    return prompts


def _objects(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Where each object stands, and the object."""
    if text.lstrip().startswith("["):
        for number, values in enumerate(_parsed(text, str(path)), 1):
            yield f"{path}, entry {number}", values
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _parsed(line, place)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: no JSON: {reason_of(error)}") from None


def _prompt(values: Any, place: str) -> Prompt:
    if not isinstance(values, dict):
        raise InputError(f"{place}: {shown(values)} is no object; give {FORMS}")
    if "turns" in values:  # MT-bench and Spec-Bench: the first of a conversation's questions
        turns = values["turns"]
        text = _text(turns[0] if isinstance(turns, list) and turns else turns, place)
        category = values.get("category")
        return Prompt(text, category=category if isinstance(category, str) else "")
    if "conversations" in values:  # ShareGPT: the first thing that the person says
        return Prompt(_text(_said_first(values["conversations"]), place))
    if ("prompt" in values) == ("messages" in values):
        raise InputError(f"{place}: {shown(values)}; give one of {FORMS}")
    for key in values:
        if key not in OWN:
            hint = nearest(key, OWN)
            raise InputError(f"{place}: unknown key {shown(key)}; allowed: {', '.join(OWN)}{hint}")
    settings = {name: values[name] for name in SETTINGS if name in values}
    if "prompt" in values:
        return Prompt(_text(values["prompt"], place), settings)
    messages = values["messages"]
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise InputError(f"{place}: messages = {shown(messages)}; give a list of messages")
    return Prompt(messages, settings)


def _said_first(conversation: Any) -> Any:
    for part in conversation if isinstance(conversation, list) else []:
        if isinstance(part, dict) and part.get("from") in ("human", "user"):
            return part.get("value")
    return conversation


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{place}: {shown(value)} is no prompt; give text, as in {FORMS}")
    return value
