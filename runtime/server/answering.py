"""What completions and chat share: prompts into tokens, increments into outputs, counts."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from compress.core.errors import shown
from compress.runtime.grammar import Grammar, GrammarCompiler, Matcher
from compress.runtime.llm import LLM
from compress.runtime.outputs import CompletionOutput, Increment
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.server.errors import ApiError
from compress.runtime.server.metered import MeteredStream
from compress.runtime.server.protocol import Message
from compress.runtime.server.service import Service
from compress.runtime.server.sse import close, unless_gone

T = TypeVar("T")

CLIENT_GONE = 499  # nobody gets this status, but the log has it
# One thread, and no other work's: grammars are compiled one at a time whoever asks.
COMPILING = ThreadPoolExecutor(1, "grammars")
UNDER_WAY: dict[tuple[GrammarCompiler, Grammar], Future[Matcher]] = {}  # in it, or to come
MOST_UNDER_WAY = 32  # a bad one takes a second
# Few threads for long texts: 4 MiB of them take up to 600 MB for as long as they are worked on.
TOKENIZING = ThreadPoolExecutor(2, "tokens")
LONG = 20_000  # characters; more take milliseconds, which no other request should wait
PIECE = 100  # characters that take as long as a prompt, message or log-probability by itself


def service_of(request: Request) -> Service:
    """The service behind the app."""
    return request.app.state.service


def model_name(service: Service, asked: str | None) -> str:
    """The name that an answer gives the model.  ApiError 404 for one that is not served."""
    names = service.settings.model_names
    if asked is not None and asked not in names:
        raise ApiError(
            404,
            f"there is no model {shown(asked)}; allowed is {', '.join(names)}",
            param="model",
            code="model_not_found",
        )
    return asked or names[0]


async def tokens_of(
    llm: LLM, prompts: Sequence[str] | Sequence[list[int]], add_special_tokens: bool | None
) -> list[list[int]]:
    """Token ids of each prompt; special tokens are added to text unless told otherwise."""
    more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}

    def encode() -> list[list[int]]:
        return [
            llm.tokenizer(prompt, verbose=False, **more)["input_ids"]
            if isinstance(prompt, str)
            else prompt
            for prompt in prompts
        ]

    size = sum(PIECE + len(prompt) for prompt in prompts)
    return await off_the_loop(encode, size, TOKENIZING)


async def tokens_of_chat(
    llm: LLM, messages: Sequence[Message], template_values: dict[str, Any] | None
) -> list[int]:
    """Token ids of a conversation, up to the beginning of its answer."""
    given = [message.for_template() for message in messages]
    size = sum(PIECE + len(message["content"]) for message in given)
    return await off_the_loop(lambda: llm.chat_prompt(given, template_values), size)


async def learn_grammar(llm: LLM, params: SamplingParams) -> None:
    """Compile a grammar that was not seen before, which takes up to seconds, in a thread.

    ApiError 429 where too many others wait for that.
    """
    grammar, grammars = params.grammar, llm.engine.grammars
    if grammar is None or grammars.knows(grammar):
        return
    key = grammars, grammar
    future = UNDER_WAY.get(key)
    if future is None:
        if (count := len(UNDER_WAY)) >= MOST_UNDER_WAY:
            message = f"{count} new grammars are being compiled; try again"
            raise ApiError(429, message, code="queue_full", retry_after=count)
        future = UNDER_WAY[key] = COMPILING.submit(grammars.compile, grammar)
        future.add_done_callback(lambda _: UNDER_WAY.pop(key))
    await asyncio.shield(asyncio.wrap_future(future))  # others may wait for it too


async def off_the_loop(
    work: Callable[[], T], size: int, threads: ThreadPoolExecutor | None = None
) -> T:
    """Do `work` in a thread where it is long; `size` is about what it takes, in characters."""
    if size <= LONG:
        return work()
    return await asyncio.get_running_loop().run_in_executor(threads, work)


def head(kind: str, model: str, prefix: str) -> dict[str, Any]:
    """How every answer and every chunk begins."""
    identity = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model}


async def in_one_piece(
    request: Request,
    streams: Sequence[MeteredStream],
    answer: Callable[[list[list[CompletionOutput]]], dict[str, Any]],
) -> Response:
    """Wait for all outputs, and answer what `answer` makes of those of each stream."""
    try:
        outputs = await unless_gone(request.receive, whole(streams))
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    finally:
        await close(streams)
    found = list(itertools.chain(*outputs))
    size = sum(len(output.text) + PIECE * len(output.logprobs or ()) for output in found)
    return await off_the_loop(lambda: JSONResponse(answer(outputs)), size)


async def whole(streams: Sequence[MeteredStream]) -> list[list[CompletionOutput]]:
    """The outputs of each stream, once all have ended.  Raises what ended one early.

    All are read as they come, since that is when a stream is timed.
    """
    reading = [asyncio.ensure_future(_outputs(stream)) for stream in streams]
    try:
        return await asyncio.gather(*reading)
    finally:
        for task in reading:
            task.cancel()


async def _outputs(stream: MeteredStream) -> list[CompletionOutput]:
    outputs = [CompletionOutput(index) for index in range(stream.request.params.n)]
    while increments := await stream.next():
        for increment in increments:
            check(increment)
            outputs[increment.index].add(increment)
    return outputs


def merged(increments: Iterable[Increment]) -> list[CompletionOutput]:
    """What has arrived together, as one piece for each output.  Raises what ended one early."""
    pieces: dict[int, CompletionOutput] = {}
    for increment in increments:
        check(increment)
        pieces.setdefault(increment.index, CompletionOutput(increment.index)).add(increment)
    return list(pieces.values())


def check(increment: Increment) -> None:
    """ApiError where an output has ended without being complete."""
    if increment.finish_reason in ("error", "abort"):
        raise ApiError(500, f"the request failed: {increment.error or 'it was aborted'}")


def usage(streams: Iterable[MeteredStream], generated: int) -> dict[str, Any]:
    """Counts of tokens."""
    requests = [stream.request for stream in streams]
    prompt = sum(request.prompt_length for request in requests)
    cached = sum(request.cached_tokens or 0 for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
