"""POST /v1/chat/completions: a conversation goes on, in one piece or in a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from compress.runtime.outputs import CompletionOutput
from compress.runtime.server import answering, sse
from compress.runtime.server.answers import ChatChunk, ChatCompletion, streamed
from compress.runtime.server.logprobs import chat_logprobs
from compress.runtime.server.metered import MeteredStream
from compress.runtime.server.protocol import ChatRequest
from compress.runtime.server.token_text import TokenText, token_text

router = APIRouter()


@router.post("/v1/chat/completions", responses=streamed(ChatCompletion, ChatChunk))
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    service = answering.service_of(request)
    model = answering.model_name(service, body.model)
    llm = service.llm
    params = body.sampling(
        body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    await answering.learn_grammar(llm, params)
    prompt = await answering.tokens_of_chat(llm, body.messages, body.chat_template_kwargs)
    streams = service.submit([prompt], [params])
    texts = token_text(llm.tokenizer)
    if body.stream:
        head = answering.head("chat.completion.chunk", model, "chatcmpl")
        return sse.EventStream(_events(body, head, streams, texts), streams)
    head = answering.head("chat.completion", model, "chatcmpl")

    def answer(outputs: list[list[CompletionOutput]]) -> dict[str, Any]:
        choices = [_choice(output, texts) for output in outputs[0]]
        generated = sum(len(output.token_ids) for output in outputs[0])
        return head | {"choices": choices, "usage": answering.usage(streams, generated)}

    return await answering.in_one_piece(request, streams, answer)


def _choice(output: CompletionOutput, texts: TokenText) -> dict[str, Any]:
    return {
        "index": output.index,
        "message": {"role": "assistant", "content": output.text, "refusal": None},
        "logprobs": _logprobs(output, texts),
        "finish_reason": output.finish_reason,
    }


def _logprobs(output: CompletionOutput, texts: TokenText) -> dict[str, Any] | None:
    return None if output.logprobs is None else chat_logprobs(output.logprobs, texts)


async def _events(
    body: ChatRequest, head: dict[str, Any], streams: list[MeteredStream], texts: TokenText
) -> AsyncGenerator[bytes]:
    """For each output its role, its text as it comes, and how it ended; then the counts."""
    generated = 0
    begun: set[int] = set()

    def usage() -> dict[str, Any]:
        if not body.include_usage:
            return {}
        return {"usage": answering.usage(streams, generated) if body.continuous_usage else None}

    def chunk(index: int, delta: dict[str, str], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return sse.event(head | {"choices": [choice | more]} | usage())

    async with aclosing(sse.news(streams)) as arriving:
        async for _, increments in arriving:
            chunks = []
            for piece in answering.merged(increments):
                generated += len(piece.token_ids)
                if piece.index not in begun:
                    begun.add(piece.index)
                    chunks.append(chunk(piece.index, {"role": "assistant", "content": ""}))
                if piece.text or piece.logprobs:
                    said = {"content": piece.text}
                    chunks.append(chunk(piece.index, said, logprobs=_logprobs(piece, texts)))
                if piece.finish_reason:
                    chunks.append(chunk(piece.index, {}, finish_reason=piece.finish_reason))
            if chunks or not increments:
                yield b"".join(chunks) or sse.COMMENT
    if body.include_usage:
        yield sse.event(head | {"choices": [], "usage": answering.usage(streams, generated)})
    yield sse.DONE
