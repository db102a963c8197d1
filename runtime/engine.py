"""The engine: requests in, increments of their outputs out, one step at a time.

    schedule -> copy blocks, launch -> collect drawn tokens, end what has ended -> publish blocks

**One step ahead.**  A model that draws on its device (`AsynchronousModel`) is given the next step
before the tokens of this one are known, so it never waits for the host.  A token that is being
drawn stands in its sequence as -1 - i, which the device reads as "draw i of the launch before".
What the host cannot know then, that a token ended its sequence, costs a row computed for nothing;
blocks can be given to others at once, since the device does one launch after another.  Penalties,
log-probabilities, grammars and the like are the host's: a step with any of them is waited for, as
is every step of another model.

**What ends one sequence alone.**  Logits with NaN, and exceptions in drawing, in a grammar and in
making text: finish reason "error".  An exception of the model is not one sequence's: `step` raises.

**Speculation.**  With a `Speculator`, tokens are proposed to sequences that decode, and a step
computes the logits of all of them.  They are then drawn from one by one, as in as many steps, for
as long as what is drawn is what was proposed.  So nothing is ever noted of a proposal that was not
accepted but its keys and values, which the next step overwrites.  Such a step is waited for.

Not safe for threads; `compress.runtime.engine_loop` gives it one of its own.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import InputError, reason_of, shown
from compress.runtime.batch import AsynchronousModel, Model
from compress.runtime.batch_builder import build_batch
from compress.runtime.block_pool import BlockPool
from compress.runtime.detokenizer import Detokenizer
from compress.runtime.flight import Draw, Flight, drawn, drawn_one_by_one
from compress.runtime.grammar import GrammarCompiler
from compress.runtime.outputs import Increment, Statistics, TokenLogprob
from compress.runtime.sampler import SamplingState, draws_of, log_probability
from compress.runtime.sampling_params import SamplingParams, SettingError
from compress.runtime.scheduler import Scheduler
from compress.runtime.sequence import Request, Sequence
from compress.runtime.speculation.proposer import Draft
from compress.runtime.speculation.speculator import Speculator

TO_COME = -1  # stands for a token until it is drawn


class PromptTooLongError(InputError):
    """The prompt leaves no room in the model's context, or in a cache smaller than that."""


class Engine:
    """Runs requests on `model`, whose cache it makes with `num_blocks` blocks.

    `eos_ids` end an output unless a request says otherwise.  Without a `tokenizer` increments hold
    no text, and stop strings are refused.
    """

    def __init__(
        self,
        model: Model,
        num_blocks: int,
        *,
        max_tokens_per_step: int = 512,
        max_sequences: int = 64,
        seed: int = 0,
        prefix_caching: bool = True,
        tokenizer: Any = None,
        eos_ids: Iterable[int] = (),
        speculator: Speculator | None = None,
    ) -> None:
        if num_blocks < 1:
            raise InputError(
                f"a cache of {num_blocks} blocks holds nothing; one block of {model.block_size} "
                f"tokens takes {model.bytes_per_block:,} bytes, so give it more memory"
            )
        self.model = model
        self.pool = BlockPool(num_blocks, model.layout, prefix_caching)
        self._room = model.layout.most_tokens(num_blocks, model.max_context)
        self.scheduler = Scheduler(self.pool, max_tokens_per_step, max_sequences)
        self.requests: dict[str, Request] = {}  # unfinished
        self.grammars = GrammarCompiler(tokenizer, model.vocab_size)
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(token for token in eos_ids if token < model.vocab_size)
        self._seed = seed
        self._arrived = 0
        self._steps = self._computed = self._prompt = self._cached = self._generated = 0
        self._pending: list[Increment] = []  # of aborted requests
        self._flight: Flight | None = None  # whose tokens are not known yet
        self._ahead = model if isinstance(model, AsynchronousModel) else None
        self._speculator = speculator
        self._finished = 0.0  # when the last step was
        drafting = speculator.proposer.bytes_per_block if speculator else 0
        self._bytes_per_block = model.bytes_per_block + drafting
        model.allocate(num_blocks)
        if speculator:
            speculator.proposer.allocate(num_blocks)
            self.scheduler.on_evict = speculator.proposer.forget
        if self._ahead:
            self._ahead.capture(max_sequences, speculator.proposer.most if speculator else 0)

    def prepare(self, request_id: str, prompt: list[int], params: SamplingParams) -> Request:
        """Make a request of a prompt's token ids.  InputError for what can never run.

        Changes nothing in the engine, so any thread may call it.  A grammar that was not seen
        before takes 0.2 s to 2 s; who must not wait has `grammars.compile` do it elsewhere first.
        """
        if params.stop and self._tokenizer is None:
            message = f"stop = {shown(params.stop)} needs a tokenizer; give stop_token_ids"
            raise SettingError("stop", message)
        limit = self._limit(prompt, params)
        eos = frozenset() if params.ignore_eos else self._eos_ids
        stop_ids = eos.union(params.stop_token_ids)
        grammar = self.grammars.compile(params.grammar) if params.grammar else None
        return Request(request_id, array("q", prompt), params, limit, stop_ids, grammar)

    def add(self, request: Request) -> None:
        """Queue a request that `prepare` made."""
        if request.id in self.requests:
            raise InputError(f"request '{request.id}' is running already; give another name")
        request.number = self._arrived
        self._arrived += 1
        request.sequences = [self._new_sequence(request, 0, request.prompt[:])]
        self.requests[request.id] = request
        self.scheduler.waiting.append(request.sequences[0])

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams) -> Request:
        """Prepare and add at once."""
        request = self.prepare(request_id, prompt, params)
        self.add(request)
        return request

    def abort(self, request_id: str) -> None:
        """End a request and release its blocks; one that has ended already is left alone.

        The next step's increments say so, with finish reason "abort".
        """
        if request_id in self.requests:
            self._pending += self._drop(self.requests[request_id], "abort")

    def reset(self) -> None:
        """Drop every request without a word, as after a step that failed; the cache goes too."""
        self.requests.clear()
        self._pending.clear()
        self._flight = None
        self.scheduler.reset()

    def has_work(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.requests or self._pending or self._flight)

    @torch.inference_mode()
    def step(self) -> list[Increment]:
        """Compute one batch; return what is new of outputs, in no particular order."""
        increments, self._pending = self._pending, []
        speculator = self._speculator
        if speculator and speculator.lengths.idle:
            speculator = None
        before, self._flight = self._flight, None
        if before and speculator:  # proposals are made from tokens that are known
            increments += self._finish(before)
            before = None
        began = time.perf_counter()
        step = self.scheduler.schedule(speculator.plan if speculator else None)
        flight = self._launch(step) if step else None
        if before:
            increments += self._finish(before)
        if flight:
            flight.began = began
            self._settle(flight)
            if flight.launched and not any(sequence.draft for sequence in step):
                self._flight = flight
            else:
                increments += self._finish(flight)
        return increments

    def _finish(self, flight: Flight) -> list[Increment]:
        """Wait for a step; let the speculator know how long it took since the one before."""
        computed = time.perf_counter()
        increments = self._collect(flight)
        finished = time.perf_counter()
        if self._speculator and flight.decodes:
            # Draws of the host are left out where that can be: those taken cost what they do in
            # plain steps, however many are taken at once.
            on_host = flight.logits is not None and flight.logits.device.type == "cpu"
            waited = self._finished > flight.began  # it was launched while the one before computed
            seconds = (computed if on_host else finished) - max(flight.began, self._finished)
            self._speculator.observe(flight, seconds, waited)
        self._finished = finished
        return increments

    def statistics(self) -> Statistics:
        """Return counts since the start, and who holds what now."""
        speculator = self._speculator
        return Statistics(
            steps=self._steps,
            computed_tokens=self._computed,
            prompt_tokens=self._prompt,
            cached_prompt_tokens=self._cached,
            generated_tokens=self._generated,
            preemptions=self.scheduler.preemptions,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_in_use=self.pool.in_use,
            blocks_cached=self.pool.cached,
            blocks_free=self.pool.free,
            cache_bytes_per_token=(
                self._bytes_per_block * self.pool.groups // self.pool.block_size
            ),
            cache_bytes_in_use=self._bytes_per_block * self.pool.in_use,
            drafts=speculator.drafts if speculator else 0,
            drafted_tokens=speculator.drafted if speculator else 0,
            accepted_tokens=speculator.accepted if speculator else 0,
            accepted_at=tuple(speculator.accepted_at) if speculator else (),
        )

    def check(self) -> None:
        """AssertionError where the accounting of blocks is wrong; takes time, for tests."""
        running = self.scheduler.running
        self.pool.check(table for sequence in running for table in sequence.tables)
        for sequence in running:
            sequence.check(self.pool.layout)

    def _limit(self, prompt: list[int], params: SamplingParams) -> int:
        """Most tokens the request may get; InputError when it can never run.

        The context ends an output early, as elsewhere.  A cache too small does not: another
        setting would hold the request, so it is refused.
        """
        vocab, context = self.model.vocab_size, self.model.max_context
        if not prompt:
            raise InputError("the prompt holds no token; give some text")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise InputError(f"the prompt holds a token outside 0 to {vocab - 1}")
        if wrong := [token for token in params.stop_token_ids if token >= vocab]:
            message = f"stop_token_ids = {wrong[0]}; allowed is 0 to {vocab - 1}"
            raise SettingError("stop_token_ids", message)
        if wrong := [token for token in params.logit_bias or () if token >= vocab]:
            message = f"logit_bias of token {wrong[0]}; allowed are tokens 0 to {vocab - 1}"
            raise SettingError("logit_bias", message)
        if len(prompt) >= context:
            raise PromptTooLongError(
                f"a prompt of {len(prompt)} tokens leaves no room in the model's context of "
                f"{context}; shorten it"
            )
        if params.n > self.scheduler.max_sequences:
            most = self.scheduler.max_sequences
            raise SettingError("n", f"n = {params.n} is more than max_sequences = {most}")
        room = self._room
        limit = context - len(prompt)
        if params.max_tokens is None:
            limit = max(1, min(limit, room + 1 - len(prompt)))
        else:
            limit = min(limit, params.max_tokens)
        if (needed := len(prompt) + limit - 1) > room:  # the last token is not read again
            raise PromptTooLongError(
                f"a prompt of {len(prompt)} tokens and {limit} new ones need a cache of {needed}, "
                f"and it holds {room}; lower max_tokens or give the cache more memory"
            )
        return limit

    def _new_sequence(self, request: Request, index: int, tokens: array[int]) -> Sequence:
        params, prompt = request.params, request.prompt
        seed = params.seed
        if seed is None:
            digest = hashlib.blake2b(f"{self._seed} {request.number}".encode(), digest_size=8)
            seed = int.from_bytes(digest.digest(), "little")
        vocab = self.model.vocab_size
        matcher = request.grammar.copy() if request.grammar else None
        sampling = SamplingState(params, seed, index, prompt, request.stop_ids, vocab, matcher)
        detokenizer = None
        if self._tokenizer is not None:
            stop = (params.stop,) if isinstance(params.stop, str) else params.stop
            detokenizer = Detokenizer(self._tokenizer, prompt, stop)
        return Sequence(request, index, tokens, sampling, detokenizer)

    def _launch(self, step: list[Sequence]) -> Flight:
        """Give the model a step, with the draws where it makes them itself."""
        if self.scheduler.copies:
            self.model.copy_blocks(self.scheduler.copies)
        if self._speculator:
            if self.scheduler.copies:
                self._speculator.proposer.copy_blocks(self.scheduler.copies)
            self._speculator.propose(step)
        flight = self._plan(step)
        if self._speculator:
            flight.charge = self._speculator.taken()
        batch = build_batch(step, self.pool.block_size)
        flight.tokens = batch.tokens.shape[0]
        self._steps += 1
        self._computed += flight.tokens
        if self._ahead and not any(sequence.draws_on_host for sequence in step):
            rows = [row for draw in flight.draws for row in draw.rows]
            states = [
                (draw.sequence.sampling, draw.sequence.produced + place)
                for draw in flight.draws
                for place in range(1 - draw.count, 1)
            ]
            flight.launched = self._ahead.launch(batch, draws_of(rows, states))
        else:
            flight.logits = self.model.forward(batch)
        return flight

    def _plan(self, step: list[Sequence]) -> Flight:
        """Who gets a token of a step, and from which row of its logits.

        A prompt that is complete makes its n sequences, which all draw from its one row.
        """
        flight, row, number = Flight(step), 0, 0
        for sequence in step:
            if positions := sequence.prompt_rows():
                flight.prompts.append((sequence, row, positions))
                row += len(positions)
            request, draft = sequence.request, sequence.draft
            flight.decodes &= bool(draft) or sequence.count == 1
            if sequence.count < sequence.remaining:
                continue
            count = 1 + len(draft.tokens) if draft else 1
            flight.draws.append(Draw(sequence, row, number, count))
            number += count
            if sequence.stands_for_all:
                self._prompt += request.prompt_length
                self._cached += request.cached_tokens or 0
                for index in range(1, request.params.n):
                    sibling = self._new_sequence(request, index, sequence.tokens[:])
                    request.sequences.append(sibling)
                    flight.forks.append((sequence, sibling))
                    flight.draws.append(Draw(sibling, row, number))
                    number += 1
            row += count
        return flight

    def _settle(self, flight: Flight) -> None:
        """Take note of what the step computes; its own draws take their places as tokens to come.

        The tokens of every step before are known by now, so full blocks can be published.  What
        comes of a draft is for `_verify` to see.
        """
        for sequence in flight.step:
            if not sequence.ended and not sequence.draft:
                sequence.advance(self.pool)
                if sequence.lookahead:
                    self.scheduler.trim(sequence)
        for sequence, sibling in flight.forks:
            self.scheduler.fork(sequence, sibling)
        for draw in flight.draws:
            if not draw.sequence.draft:
                draw.sequence.tokens.append(TO_COME - draw.number)

    def _collect(self, flight: Flight) -> list[Increment]:
        """Put the drawn tokens in their places, and end what has ended."""
        increments = []
        for sequence, row, positions in flight.prompts:
            assert flight.logits is not None
            increments += self._note_prompt(sequence.request, positions, flight.logits[row:])
        tokens = flight.launched.tokens() if flight.launched else None
        plain = [draw for draw in flight.draws if not draw.sequence.draft]
        for draw, (token, logprob) in zip(plain, drawn(flight, plain, tokens), strict=True):
            if not draw.sequence.ended:
                increments.append(self._fill(draw.sequence, token, logprob))
        for draw in flight.draws:
            draft = draw.sequence.take_off_draft()
            if draft and not draw.sequence.ended:
                increments.append(self._verify(flight, draw, draft, tokens))
        return increments

    def _verify(
        self, flight: Flight, draw: Draw, draft: Draft, tokens: list[int] | None
    ) -> Increment:
        """Draw for a sequence row by row, as long as what is drawn is what was proposed.

        Each is a step of one token, but that its keys and values are there already.
        """
        assert self._speculator is not None
        sequence = draw.sequence
        increment = Increment(sequence.request.id, sequence.index, [], "")
        following = drawn_one_by_one(flight, draw, draft, tokens)
        for proposed in (*draft.tokens, None):
            sequence.count = 1
            sequence.advance(self.pool)
            sequence.tokens.append(TO_COME)
            self._give(sequence, increment, *next(following))
            if increment.finish_reason or sequence.tokens[-1] != proposed:
                break
        drafted = len(draft.tokens)
        pairs = zip(increment.token_ids, draft.tokens, strict=False)
        accepted = sum(token == proposed for token, proposed in pairs)
        self._speculator.count(drafted, accepted)
        if increment.finish_reason:
            self._end(sequence)
        else:
            self.scheduler.trim(sequence)
            self._speculator.proposer.verified(sequence, drafted, accepted)
        return increment

    def _note_prompt(self, request: Request, positions: range, logits: Tensor) -> list[Increment]:
        """Take the log-probabilities of what follows `positions` of the prompt.

        Where there are none, for NaN, the request ends; what says so is returned.
        """
        assert request.prompt_logprobs is not None
        following = request.prompt[positions.start + 1 : positions.stop + 1]
        top = request.params.prompt_logprobs or 0
        try:
            for row, token in zip(logits[: len(positions)].cpu().numpy(), following, strict=True):
                request.prompt_logprobs.append(log_probability(row, token, top))
        except ArithmeticError as error:
            for sequence in request.sequences:
                self._withdraw(sequence)
            return self._drop(request, "error", _reason("the prompt's log-probabilities", error))
        return []

    def _fill(
        self, sequence: Sequence, token: int | Exception, logprob: TokenLogprob | None
    ) -> Increment:
        """Give a sequence the token that it awaits, and end it if that was its last."""
        increment = Increment(sequence.request.id, sequence.index, [], "")
        self._give(sequence, increment, token, logprob)
        if increment.finish_reason:
            self._end(sequence)
        return increment

    def _give(
        self,
        sequence: Sequence,
        increment: Increment,
        token: int | Exception,
        logprob: TokenLogprob | None,
    ) -> None:
        """Put a token into its place and the increment; note there whether it is the last."""
        if isinstance(token, Exception):
            increment.finish_reason, increment.error = "error", _reason("drawing a token", token)
            self._withdraw(sequence)
        else:
            increment.token_ids.append(token)
            if logprob is not None:
                increment.logprobs = [*(increment.logprobs or ()), logprob]
            self._take(sequence, token, increment)

    def _withdraw(self, sequence: Sequence) -> None:
        """Let nobody find its blocks: what logits with NaN are of may hold NaN too."""
        if sequence.run is not None:
            self.pool.withdraw(sequence.run)

    def _take(self, sequence: Sequence, token: int, increment: Increment) -> None:
        """Append a token; note what its text is, and whether it is the last."""
        request, sampling = sequence.request, sequence.sampling
        sequence.tokens[-1] = token
        self._generated += 1
        doing = "following the grammar"
        try:
            sampling.record(token)
            if token in request.stop_ids or sampling.complete:
                increment.finish_reason = "stop"
            elif sequence.produced >= request.limit:
                increment.finish_reason = "length"
            doing = "turning tokens into text"
            if sequence.detokenizer is not None:
                self._detokenize(sequence.detokenizer, token in request.stop_ids, increment)
        except Exception as error:  # this sequence's own; the others go on
            increment.finish_reason, increment.error = "error", _reason(doing, error)

    def _detokenize(self, detokenizer: Detokenizer, silent: bool, increment: Increment) -> None:
        """Note the text of an increment; a stop token is `silent`."""
        if not silent:
            increment.text += detokenizer.push(increment.token_ids[-1])
        if increment.finish_reason and not detokenizer.stopped:
            increment.text += detokenizer.finish()
        if detokenizer.stopped:
            increment.finish_reason = "stop"

    def _drop(self, request: Request, reason: str, error: str | None = None) -> list[Increment]:
        """End a request and release its blocks; return what says so of each output."""
        indices = [sequence.index for sequence in request.sequences]
        if request.sequences[0].stands_for_all:
            indices = list(range(request.params.n))
        for sequence in request.sequences:
            self.scheduler.remove(sequence)
            sequence.ended = True
        del self.requests[request.id]
        return [Increment(request.id, index, [], "", reason, error=error) for index in indices]

    def _end(self, sequence: Sequence) -> None:
        request = sequence.request
        self.scheduler.remove(sequence)
        sequence.ended = True
        request.sequences.remove(sequence)
        if not request.sequences:
            del self.requests[request.id]


def _reason(doing: str, error: Exception) -> str:
    return f"{doing} failed: {reason_of(error)}"
