"""`LLM`: load a model, give it prompts, get text; all at once, or as it comes."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import queue
import weakref
from collections.abc import Mapping, MutableMapping
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import torch

from compress.core.device import (
    check_dtype,
    check_kv_cache_dtype,
    default_device,
    fastest_dtype,
)
from compress.core.errors import InputError, reason_of, shown
from compress.core.progress import track
from compress.core.resources import free_memory, parse_size
from compress.core.source import read_config, resolve_model
from compress.core.tokenizer import load_tokenizer
from compress.runtime.engine import Engine
from compress.runtime.engine_loop import EngineLoop, Listener
from compress.runtime.outputs import CompletionOutput, Increment, RequestOutput, Statistics
from compress.runtime.sampling_params import SamplingParams, SettingError
from compress.runtime.sequence import Request
from compress.runtime.streams import Doorbell, Inbox, Stream

Prompt = str | list[int]  # text, or token ids
Message = Mapping[str, Any]  # {"role": ..., "content": ...}

# Of the memory that is free once the model is loaded, what the cache may take.
SHARE_OF_MEMORY = {"cpu": 0.3, "cuda": 0.85}


class LLM:
    """A model ready to answer any number of requests at once, from any number of threads.

    `kv_cache_memory` is in bytes, or text such as "2GiB"; left out, it is a share of the free
    memory, at most what `max_sequences` of full context fill.  `kv_cache_dtype` "int8" or "fp8"
    stores keys and values in 8 bits, with a scale for each token and head, about half the memory;
    "auto" is as the checkpoint says, else `dtype`.  `max_tokens_per_step` is by default
    512 on a CPU and 2,048 on a GPU.  With `max_queued_requests`, only so many requests are taken
    beyond the `max_sequences` that may run at once; the next gets a QueueFullError.

    `draft` proposes tokens that the model verifies several at a time, which changes no output but
    the time it takes: "ngram" copies from the text so far, "self" is the model with layers left
    out ("self:3,7-12" says which), "auto" a draft that came with the model (in its folder, `draft`;
    none without), and anything else is a model of the same vocabulary.
    `num_speculative_tokens` is how many at once, 1 to 64; "auto" follows what pays.

    Raises InputError for a model that cannot be loaded.  Use it in a `with` statement, or `close`
    it, to end its thread early.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        kv_cache_memory: int | str | None = None,
        kv_cache_dtype: str = "auto",
        max_tokens_per_step: int | None = None,
        max_sequences: int = 64,
        seed: int = 0,
        lm_head_bits: int | None = None,
        prefix_caching: bool = True,
        max_queued_requests: int | None = None,
        draft: str | None = None,
        num_speculative_tokens: int | str = "auto",
    ) -> None:
        from compress.runtime.loading import MOST_TOKENS, make_decoder
        from compress.runtime.speculation import making
        from compress.runtime.weights import load_weights

        source = resolve_model(model)
        place = _device(device)
        if dtype == "auto":
            dtype = fastest_dtype(place)
        check_dtype(dtype)
        check_kv_cache_dtype(kv_cache_dtype)
        tokenizer = load_tokenizer(source.folder)
        max_tokens_per_step = max_tokens_per_step or MOST_TOKENS[place.type]
        choice = making.choose(draft, num_speculative_tokens, source, tokenizer)
        weights = load_weights(source, lm_head_bits)
        decoder = make_decoder(
            weights, place, getattr(torch, dtype), max_tokens_per_step, kv_cache_dtype
        )
        speculator = None
        if choice is not None:
            most = (max_tokens_per_step, max_sequences)
            speculator = making.make_speculator(
                choice, decoder, weights.head, place, dtype, most, kv_cache_dtype
            )
        memory = cache_memory(place) if kv_cache_memory is None else parse_size(kv_cache_memory)
        size = decoder.bytes_per_block + (speculator.proposer.bytes_per_block if speculator else 0)
        longest = decoder.layout.blocks_for(decoder.max_context, max_tokens_per_step)
        num_blocks = min(memory // size, max_sequences * longest)
        engine = Engine(
            decoder,
            num_blocks,
            max_tokens_per_step=max_tokens_per_step,
            max_sequences=max_sequences,
            seed=seed,
            prefix_caching=prefix_caching,
            tokenizer=tokenizer,
            eos_ids=stop_tokens(source.folder, tokenizer),
            speculator=speculator,
        )
        if choice is not None and speculator is not None:
            making.settle(speculator, choice, decoder, num_blocks, max_tokens_per_step)
        self._set_up(engine, tokenizer, max_queued_requests)
        self.draft = choice.name if choice else None

    @classmethod
    def from_engine(
        cls, engine: Engine, tokenizer: Any = None, max_queued_requests: int | None = None
    ) -> LLM:
        """Wrap an engine that was made by hand, with the tokenizer that it has, if any."""
        llm = cls.__new__(cls)
        llm._set_up(engine, tokenizer, max_queued_requests)
        return llm

    def _set_up(self, engine: Engine, tokenizer: Any, max_queued_requests: int | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.draft: str | None = None  # what proposes tokens, in a user's words
        most = None
        if max_queued_requests is not None:
            if max_queued_requests < 0:
                raise InputError(
                    f"max_queued_requests = {max_queued_requests}; allowed is 0 or more"
                )
            most = engine.scheduler.max_sequences + max_queued_requests
        self._loop = EngineLoop(engine, most)
        self._doorbells: MutableMapping[asyncio.AbstractEventLoop, Doorbell]
        self._doorbells = weakref.WeakKeyDictionary()
        self._numbers = itertools.count()
        self._finalizer = weakref.finalize(self, self._loop.close)

    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts together; outputs come in the order of the prompts.

        `params` are for all prompts, or one for each.  Raises InputError before anything runs if
        one of the requests never can; other errors end the whole call.
        """
        several = _as_list(prompts)
        settings = _one_each(params, len(several))
        requests = [self._prepare(*pair) for pair in zip(several, settings, strict=True)]
        outputs = [_empty_output(*pair) for pair in zip(several, requests, strict=True)]
        finished: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        listeners = [_collector(output, finished) for output in outputs]
        self._loop.submit(list(zip(requests, listeners, strict=True)))
        waits = range(len(outputs))
        try:
            for _ in track(waits, "Generating") if progress else waits:
                if (error := finished.get()) is not None:
                    raise error
        except BaseException:  # an interrupt too: nothing goes on behind the caller's back
            self._loop.abort(request.id for request in requests)
            raise
        for output, request in zip(outputs, requests, strict=True):
            output.prompt_logprobs = request.prompt_logprobs
            output.num_cached_tokens = request.cached_tokens or 0
        return outputs

    def chat(
        self,
        messages: Items[Message] | Items[Items[Message]],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, through the tokenizer's chat template."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        prompts = [self.chat_prompt(conversation) for conversation in conversations]
        return self.generate(prompts, params, progress=progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Yield what each step adds, until all outputs have ended.

        Called in an event loop.  The request is checked and queued at once: InputError if it never
        can run, QueueFullError if too many are waiting.
        """
        return self.streams([prompt], params)[0]

    def streams(
        self,
        prompts: Items[Prompt],
        params: SamplingParams | Items[SamplingParams] | None = None,
    ) -> list[Stream]:
        """Streams of several prompts, all of which are queued or none."""
        settings = _one_each(params, len(prompts))
        loop = asyncio.get_running_loop()
        doorbell = self._doorbells.setdefault(loop, Doorbell(loop))
        requests = [self._prepare(*pair) for pair in zip(prompts, settings, strict=True)]
        inboxes = [Inbox(doorbell) for _ in requests]
        listeners = [inbox.put for inbox in inboxes]
        self._loop.submit(list(zip(requests, listeners, strict=True)))
        pairs = zip(requests, inboxes, strict=True)
        return [Stream(request, inbox, self._loop.abort) for request, inbox in pairs]

    def chat_prompt(
        self, messages: Items[Message], template_values: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation, with the beginning of the answer's turn.

        `template_values` are names that the template asks for, as Qwen3's asks `enable_thinking`.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template; use generate instead")
        render, values = self.tokenizer.apply_chat_template, template_values or {}
        if taken := inspect.signature(render).parameters.keys() & values.keys():
            name = min(taken)
            raise SettingError("chat_template_kwargs", f"chat_template_kwargs: {name} is not yours")
        try:
            text = render(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                **values,
            )
        except Exception as error:  # templates are programs of any origin
            raise InputError(f"the chat template refuses this: {reason_of(error)}") from error
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def statistics(self) -> Statistics:
        """Return the engine's counts; while it runs they may be of different steps."""
        return self.engine.statistics()

    @property
    def cache_description(self) -> str:
        """How large the cache is, for people."""
        pool, found = self.engine.pool, self.statistics()
        layout, context = pool.layout, self.engine.model.max_context
        if not layout.windowed:
            return (
                f"Keys and values take {found.cache_bytes_per_token:,} bytes a token; room for "
                f"{pool.num_blocks * pool.block_size:,} tokens"
            )
        each = found.cache_bytes_per_token // (pool.groups * layout.width)  # of a layer
        kinds = [
            f"{each * layers:,} bytes a token"
            + (f" in windows of {window:,}" if window else " of the whole text")
            for window, layers in layout.kinds
        ]
        room = pool.num_blocks / layout.blocks_for(context)
        return (
            f"Keys and values take {' and '.join(kinds)}; room for {room:,.1f} sequences of "
            f"{context:,} tokens"
        )

    @property
    def fault(self) -> str | None:
        """Why the engine computes nothing now: a step failed, or hangs, or its thread has ended."""
        return self._loop.fault

    def close(self) -> None:
        """End the engine's thread.  Unfinished requests fail."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> Request:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("a prompt of text needs a tokenizer; give token ids")
            tokens: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]
        else:
            tokens = prompt
        return self.engine.prepare(str(next(self._numbers)), tokens, params)


def stop_tokens(folder: Path, tokenizer: Any) -> set[int]:
    """Tokens that end a text, by generation_config.json, config.json and the tokenizer."""
    given = [read_config(folder).get("eos_token_id"), tokenizer.eos_token_id]
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            given.append(settings.get("eos_token_id"))
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"cannot read {path}: {error}; download it again") from None
    flat = itertools.chain(*(value if isinstance(value, list) else [value] for value in given))
    return {value for value in flat if isinstance(value, int)}


def _device(name: str) -> torch.device:
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device '{name}' is unknown; allowed are auto, cpu, cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device '{name}': torch finds no GPU here; use cpu")
    return device


def cache_memory(device: torch.device) -> int:
    """Bytes that the cache may take, once the model is loaded."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory()
    return int(free * SHARE_OF_MEMORY[device.type])


def _as_list(prompts: Prompt | Items[Prompt]) -> list[Prompt]:
    """A list of prompts from one or several."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(
    params: SamplingParams | Items[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Settings for each prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InputError(f"{len(params)} params for {count} prompts; give one, or one for each")
    if wrong := [entry for entry in params if not isinstance(entry, SamplingParams)]:
        raise InputError(f"params = {shown(wrong[0])}; give SamplingParams")
    return list(params)


def _empty_output(prompt: Prompt, request: Request) -> RequestOutput:
    return RequestOutput(
        request_id=request.id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=request.prompt.tolist(),
        outputs=[CompletionOutput(index) for index in range(request.params.n)],
    )


def _collector(output: RequestOutput, finished: queue.SimpleQueue[Exception | None]) -> Listener:
    """A listener that fills `output`, and says when it is whole, or what went wrong."""

    def listen(item: Increment | Exception) -> None:
        if isinstance(item, Exception):
            finished.put(item)
            return
        output.outputs[item.index].add(item)
        if item.finish_reason and output.finished:
            finished.put(None)

    return listen
