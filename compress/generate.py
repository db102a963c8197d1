"""Writing text with the decode runtime: an answer as it comes, and what it is in JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compress.core.errors import InputError
from compress.runtime.llm import LLM
from compress.runtime.outputs import CompletionOutput, Increment, Statistics
from compress.runtime.sampling_params import SamplingParams


@dataclass(frozen=True)
class Answer:
    """What a prompt got, and how long it took: `seconds` in all, `first` to the first token."""

    prompt_tokens: int
    outputs: list[CompletionOutput]
    seconds: float
    first: float

    @property
    def tokens(self) -> int:
        """New tokens of all outputs."""
        return sum(len(output.token_ids) for output in self.outputs)

    @property
    def timing(self) -> dict[str, Any]:
        """Tokens, times and speed, for scripts."""
        return {
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
            "time_to_first_token": round(self.first, 4),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
        }


def answer(
    llm: LLM, prompt: list[int], params: SamplingParams, write: Callable[[str], None] | None = None
) -> Answer:
    """Answer token ids; `write` gets the text of the first output as it comes.

    On an interrupt the request is aborted before KeyboardInterrupt goes on.  Raises InputError for
    a prompt that cannot be answered.
    """
    outputs = [CompletionOutput(index) for index in range(params.n)]
    first: float | None = None

    def take(increment: Increment) -> None:
        nonlocal first
        first = time.monotonic() if first is None else first
        outputs[increment.index].add(increment)
        if increment.error:
            raise InputError(increment.error)
        if write is not None and increment.index == 0:
            write(increment.text)

    async def listen() -> None:
        async for increment in llm.stream(prompt, params):
            take(increment)

    started = time.monotonic()
    asyncio.run(listen())
    ended = time.monotonic()
    return Answer(len(prompt), outputs, ended - started, (first or ended) - started)


def prompt_tokens(llm: LLM, prompt: str | Sequence[dict[str, Any]]) -> list[int]:
    """Token ids of a text, or of a conversation through the chat template.

    Raises InputError when there is no such template, or it does not take the conversation.
    """
    if isinstance(prompt, str):
        return llm.tokenizer(prompt, verbose=False)["input_ids"]
    if not llm.tokenizer.chat_template:
        raise InputError("the model's tokenizer has no chat template; give plain text to continue")
    return llm.chat_prompt(prompt)


def speculation(statistics: Statistics) -> dict[str, Any]:
    """What came of drafts, for scripts; None for a mean of nothing.

    `accepted_at` counts, for each place in a draft, those of which this token was accepted.  The
    mean accepted length includes the token that the model draws itself after the accepted ones.
    """
    drafts, drafted = statistics.drafts, statistics.drafted_tokens
    accepted = statistics.accepted_tokens
    return {
        "drafts": drafts,
        "drafted_tokens": drafted,
        "accepted_tokens": accepted,
        "accepted_at": list(statistics.accepted_at),
        "acceptance_rate": round(accepted / drafted, 4) if drafted else None,
        "mean_accepted_length": round(1 + accepted / drafts, 4) if drafts else None,
    }


def as_record(prompt_tokens: int, outputs: Sequence[CompletionOutput]) -> dict[str, Any]:
    """Outputs as JSON: of one its text and why it ended, of several a list of these."""
    if len(outputs) == 1:
        return {"prompt_tokens": prompt_tokens, **_completion(outputs[0])}
    return {"prompt_tokens": prompt_tokens, "outputs": [_completion(o) for o in outputs]}


def _completion(output: CompletionOutput) -> dict[str, Any]:
    found: dict[str, Any] = {
        "completion_tokens": len(output.token_ids),
        "finish_reason": output.finish_reason,
        "text": output.text,
    }
    return found | ({"error": output.error} if output.error else {})
