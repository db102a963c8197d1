"""POST /v1/completions: text goes on, in one piece or in a stream.

Several prompts are several requests, queued all or none; output j of prompt i is choice i * n + j.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from compress.runtime.llm import LLM
from compress.runtime.outputs import CompletionOutput
from compress.runtime.server import answering, sse
from compress.runtime.server.answers import Completion, streamed
from compress.runtime.server.logprobs import TextLogprobs
from compress.runtime.server.metered import MeteredStream
from compress.runtime.server.protocol import CompletionRequest
from compress.runtime.server.token_text import TokenText, token_text

router = APIRouter()

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post("/v1/completions", responses=streamed(Completion, Completion))
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Go on with a text, or with each of several."""
    service = answering.service_of(request)
    model = answering.model_name(service, body.model)
    llm = service.llm
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = body.sampling(
        max(1, max_tokens),  # the runtime always draws; `_Choice` drops what nobody wants
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    await answering.learn_grammar(llm, params)
    tokens = [await _tokens(llm, prompt, body) for prompt in body.prompt]
    echoes = [_echo(llm, prompt) if body.echo else None for prompt in body.prompt]
    streams = service.submit(tokens, [params] * len(tokens))
    head = answering.head("text_completion", model, "cmpl")
    texts = token_text(llm.tokenizer)
    choices = [
        [
            _Choice(stream, place * params.n + index, echo, max_tokens > 0, texts)
            for index in range(params.n)
        ]
        for place, (stream, echo) in enumerate(zip(streams, echoes, strict=True))
    ]
    if body.stream:
        return sse.EventStream(_events(body, head, streams, choices), streams)

    def answer(outputs: list[list[CompletionOutput]]) -> dict[str, Any]:
        pairs = [
            pair
            for several in zip(choices, outputs, strict=True)
            for pair in zip(*several, strict=True)
        ]
        found = [choice.take(output) for choice, output in pairs]
        generated = sum(choice.generated for choice, _ in pairs)
        return head | {"choices": found, "usage": answering.usage(streams, generated)}

    return await answering.in_one_piece(request, streams, answer)


async def _tokens(llm: LLM, prompt: str | list[int], body: CompletionRequest) -> list[int]:
    if isinstance(prompt, str):
        return await answering.tokens_of(llm, prompt, body.add_special_tokens)
    return prompt


def _echo(llm: LLM, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)


class _Choice:
    """Makes entries of `choices` for one output: the prompt first where it is echoed."""

    def __init__(
        self, stream: MeteredStream, index: int, echo: str | None, generates: bool, texts: TokenText
    ) -> None:
        self.generated = 0  # tokens so far
        self._request = stream.request
        self._index = index
        self._echo = echo  # None once it is out, or if none is asked for
        self._generates = generates
        self._logprobs = TextLogprobs(texts)

    def take(self, output: CompletionOutput) -> dict[str, Any]:
        """The entry of what is new in the output."""
        text, tokens, entries = "", [], []
        if self._echo is not None:
            text, self._echo = self._echo, None
            tokens += self._request.prompt
            entries += self._request.prompt_logprobs or []
        finish_reason = output.finish_reason
        if self._generates:
            self.generated += len(output.token_ids)
            text += output.text
            tokens += output.token_ids
            entries += output.logprobs or []
        else:
            finish_reason = finish_reason and "length"
        wanted = self._request.params.logprobs is not None
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs.take(tokens, entries) if wanted else None,
            "finish_reason": finish_reason,
        }


async def _events(
    body: CompletionRequest,
    head: dict[str, Any],
    streams: list[MeteredStream],
    choices: list[list[_Choice]],
) -> AsyncGenerator[bytes]:
    """The texts as they come, and the counts at the end."""

    def usage() -> dict[str, Any]:
        generated = sum(choice.generated for several in choices for choice in several)
        return answering.usage(streams, generated)

    def so_far() -> dict[str, Any]:
        if not body.include_usage:
            return {}
        return {"usage": usage() if body.continuous_usage else None}

    async with aclosing(sse.news(streams)) as arriving:
        async for place, increments in arriving:
            chunks = []
            for piece in answering.merged(increments):
                entry = choices[place][piece.index].take(piece)
                if entry["text"] or entry["logprobs"] or entry["finish_reason"]:
                    chunks.append(sse.event(head | {"choices": [entry]} | so_far()))
            if chunks or not increments:
                yield b"".join(chunks) or sse.COMMENT
    if body.include_usage:
        yield sse.event(head | {"choices": [], "usage": usage()})
    yield sse.DONE
