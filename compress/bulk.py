"""Answers to a file of prompts: in its order, a few at a time, and going on after a kill.

Each line of the input is an object: `prompt` (text) or `messages` (a conversation), an `id` if
wanted, and settings that differ from the run's, under the names of SamplingParams.

Answers are kept as they end (compress.answer_file).  A run that was killed and started again gives
the bytes of one left alone: a line's seed comes from the run's seed and the line's index, and the
runtime's tokens do not depend on what else is in a step.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from compress import checkpoint
from compress.answer_file import AnswerFile
from compress.core.errors import InputError, nearest, reason_of, shown
from compress.core.progress import say, track
from compress.core.shards import hashed_file
from compress.generate import as_record, prompt_tokens
from compress.runtime.llm import LLM
from compress.runtime.outputs import CompletionOutput
from compress.runtime.sampling_params import SamplingParams

# Settings of a line; the answers do not show log-probabilities, and a grammar is no JSON value.
NO_SETTINGS = {"logprobs", "prompt_logprobs", "grammar"}
SETTINGS = sorted({f.name for f in fields(SamplingParams)} - NO_SETTINGS)
KEYS = ["prompt", "messages", "id", *SETTINGS]


@dataclass(frozen=True)
class Line:
    """A line of the input; `number` counts all lines from 1, `index` those with a prompt from 0."""

    number: int
    index: int
    id: Any
    prompt: str | list[dict[str, Any]]
    params: SamplingParams


@dataclass(frozen=True)
class Bulk:
    """A file of prompts and what all its lines share; `chat` makes a prompt a user's message."""

    input: Path
    params: SamplingParams
    seed: int = 0
    chat: bool = False

    def lines(self) -> Iterator[Line]:
        """Read the lines one by one; InputError with the number of a wrong one."""
        index = 0
        with self.input.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                try:
                    yield self._line(number, index, raw)
                except InputError as error:
                    raise InputError(f"{self.input}, line {number}: {error}") from None
                index += 1

    def _line(self, number: int, index: int, raw: bytes) -> Line:
        try:
            values = json.loads(raw, parse_constant=_refuse_constant)
            json.dumps(values, ensure_ascii=False).encode()  # lone surrogates
        except (ValueError, RecursionError) as error:
            raise InputError(f"no JSON in UTF-8: {reason_of(error)}") from None
        if not isinstance(values, dict):
            raise InputError(f"{shown(values)} is no object; give {{'prompt': ...}}")
        for key in values:
            if key not in KEYS:
                raise InputError(
                    f"unknown key {shown(key)}; allowed: {', '.join(KEYS)}{nearest(key, KEYS)}"
                )
        settings = {key: values[key] for key in SETTINGS if key in values}
        digest = hashlib.blake2b(f"{self.seed} {index}".encode(), digest_size=8).digest()
        own = {"seed": int.from_bytes(digest, "little")} | settings
        return Line(
            number, index, values.get("id"), self._prompt(values), replace(self.params, **own)
        )

    def _prompt(self, values: dict[str, Any]) -> str | list[dict[str, Any]]:
        if ("prompt" in values) == ("messages" in values):
            raise InputError("give 'prompt' or 'messages', one of the two")
        if "prompt" in values:
            prompt = values["prompt"]
            if not isinstance(prompt, str) or not prompt:
                raise InputError(f"prompt = {shown(prompt)}; give text")
            return [{"role": "user", "content": prompt}] if self.chat else prompt
        messages = values["messages"]
        if not isinstance(messages, list) or not messages:
            raise InputError(f"messages = {shown(messages)}; give a list of messages")
        for message in messages:
            texts = [message.get(k) for k in ("role", "content")] if type(message) is dict else [0]
            if not all(isinstance(text, str) for text in texts):
                raise InputError(
                    f"message {shown(message)}; give {{'role': 'user', 'content': TEXT}}"
                )
        return messages

    def digest(self) -> str:
        """Hash of the file's contents."""
        with self.input.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def answer_lines(
    llm: LLM,
    bulk: Bulk,
    output: AnswerFile,
    identity: dict[str, Any],
    in_flight: int,
    restart: bool,
) -> dict[str, Any]:
    """Answer all lines of a file; returns counts.

    Every line is prepared once before the first is answered, so that one that can never be is
    refused at once.  `in_flight` lines at most are with the engine at a time.
    """
    total = 0
    for line in bulk.lines():
        _prepare(llm, bulk, line)
        total += 1
    if not total:
        raise InputError(f"'{bulk.input}' holds no line; give one JSON object a line")
    with output.locked():
        output.begin(identity | {"input": bulk.digest()}, restart)
        found = len(output.done)
        if found:
            say(f"Going on after {found} of {total} answers")
        started, tokens, errors = time.monotonic(), 0, 0
        answers = output.keep(_answers(llm, bulk, output.done, in_flight))
        for record in track(answers, "Answering", total, found):
            completions = record.get("outputs", [record])
            tokens += sum(completion["completion_tokens"] for completion in completions)
            errors += any("error" in completion for completion in completions)
        seconds = time.monotonic() - started
        output.finish()
    return {
        "out": str(output.out),
        "answers": total,
        "answers_before": found,
        "errors": errors,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def _answers(
    llm: LLM, bulk: Bulk, done: Container[int], in_flight: int
) -> Iterator[dict[str, Any]]:
    """The other lines' answers, as they end."""
    lines = (line for line in bulk.lines() if line.index not in done)
    engine = llm.engine
    unfinished: dict[str, tuple[Line, int, list[CompletionOutput]]] = {}
    while True:
        while len(unfinished) < in_flight and (line := next(lines, None)) is not None:
            request = _prepare(llm, bulk, line)
            engine.add(request)
            outputs = [CompletionOutput(index) for index in range(line.params.n)]
            unfinished[request.id] = line, request.prompt_length, outputs
        if not unfinished:
            return
        for increment in engine.step():
            line, length, outputs = unfinished[increment.request_id]
            outputs[increment.index].add(increment)
            if all(output.finish_reason for output in outputs):
                del unfinished[increment.request_id]
                name = {} if line.id is None else {"id": line.id}
                yield {"index": line.index, **name, **as_record(length, outputs)}


def _prepare(llm: LLM, bulk: Bulk, line: Line) -> Any:
    try:
        tokens = prompt_tokens(llm, line.prompt)
        return llm.engine.prepare(f"line {line.number}", tokens, line.params)
    except InputError as error:
        raise InputError(f"{bulk.input}, line {line.number}: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def identity_of(llm: LLM, folder: Path, bulk: Bulk, load: Mapping[str, Any]) -> dict[str, Any]:
    """What a broken-off run must have been of, for this one to go on from it; reads all weights.

    `load` is how the model was loaded, by LLM's names.  A draft belongs to it: it changes no answer
    where a row of a step does not depend on the others, and that is not so on every machine.
    """
    files = [folder / "config.json", *checkpoint.carried_files(folder)]
    files += sorted(folder.glob("*.safetensors"))
    return {
        "settings": asdict(bulk.params),
        "seed": bulk.seed,
        "chat": bulk.chat,
        "dtype": load["dtype"],
        "head bits": load.get("lm_head_bits"),
        "draft": llm.draft,
        "speculative tokens": load.get("num_speculative_tokens"),
        "kernels": getattr(llm.engine.model, "description", ""),
        "versions": checkpoint.versions(),
        "model files": {path.name: hashed_file(path) for path in files},
    }
