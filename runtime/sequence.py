"""A request and its sequences: the tokens, where they are in the cache, what is yet to compute."""

from __future__ import annotations

import time
from array import array

from compress.runtime.block_pool import NONE, BlockPool, Run
from compress.runtime.cache_layout import CacheLayout
from compress.runtime.detokenizer import Detokenizer
from compress.runtime.grammar import Matcher
from compress.runtime.outputs import TokenLogprob
from compress.runtime.sampler import SamplingState
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.speculation.proposer import Draft


class Request:
    """A prompt, its settings, and the n sequences that continue it."""

    __slots__ = (
        "arrived",
        "cached_tokens",
        "grammar",
        "id",
        "limit",
        "number",
        "params",
        "prompt",
        "prompt_length",
        "prompt_logprobs",
        "sequences",
        "started",
        "stop_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt: array[int],
        params: SamplingParams,
        limit: int,
        stop_ids: frozenset[int],
        grammar: Matcher | None = None,
    ) -> None:
        self.id = request_id
        self.arrived = time.monotonic()
        self.started: float | None = None  # when it was first scheduled, on the same clock
        self.number = 0  # in order of arrival, once it has arrived
        self.prompt = prompt  # int64
        self.prompt_length = len(prompt)
        self.params = params
        self.limit = limit  # most tokens of one output
        self.stop_ids = stop_ids
        self.grammar = grammar  # at the beginning of an output; each gets a copy
        self.sequences: list[Sequence] = []  # one until the prompt is computed, then n
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.cached_tokens: int | None = None  # of the prompt, found when it was first scheduled


class Sequence:
    """Prompt and output of one of a request's n outputs, and its place in the cache."""

    __slots__ = (
        "computed",
        "count",
        "detokenizer",
        "draft",
        "ended",
        "given_back",
        "index",
        "lookahead",
        "published",
        "request",
        "run",
        "sampling",
        "tables",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        tokens: array[int],
        sampling: SamplingState,
        detokenizer: Detokenizer | None,
    ) -> None:
        self.request = request
        self.index = index
        # int64, prompt and output; the last may be a token to come, or those of `draft`
        self.tokens = tokens
        self.sampling = sampling
        self.detokenizer = detokenizer
        self.count = 0  # tokens in the step under way
        self.draft: Draft | None = None  # what is proposed in the step under way
        self.ended = False  # nothing more is wanted, though a step may still be under way
        self.forget()

    def forget(self) -> None:
        """Be in the cache no longer; the blocks must have been released."""
        # The block tables, one for each group of layers and all of one length; none while it waits.
        self.tables: list[array[int]] = []
        self.given_back: list[int] = []  # of each table: how many blocks no token to come sees
        self.computed = 0  # tokens whose keys and values are in the cache
        self.published = 0  # full blocks offered to other requests
        self.run: Run | None = None  # what the last of these hold
        self.lookahead = 0  # tokens that may be proposed for the step under way

    @property
    def draws_on_host(self) -> bool:
        """Whether a device cannot do what is asked of this sequence's logits."""
        return self.sampling.on_host or self.request.prompt_logprobs is not None

    @property
    def produced(self) -> int:
        """Tokens of the output, one to come included."""
        return len(self.tokens) - self.request.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens to compute, beyond those in the cache; a sequence that decodes has one.

        None after the last token that the request may get, since nothing is drawn from it.
        """
        return len(self.tokens) - self.computed if self.produced < self.request.limit else 0

    @property
    def length(self) -> int:
        """Blocks of its tokens, those that were given back too."""
        return len(self.tables[0]) if self.tables else 0

    @property
    def blocks_held(self) -> int:
        """Blocks that its tables name."""
        return len(self.tables) * self.length - sum(self.given_back)

    @property
    def order(self) -> tuple[int, int]:
        """Age: the smaller came first."""
        return self.request.number, self.index

    @property
    def stands_for_all(self) -> bool:
        """Whether nothing is drawn yet: the request's n sequences are still one."""
        return len(self.tokens) == self.request.prompt_length

    @property
    def seats(self) -> int:
        """How many sequences this one is, or will be once its prompt is computed."""
        return self.request.params.n if self.stands_for_all else 1

    def prompt_rows(self) -> range:
        """Positions in this step whose logits say how likely the prompt's next token was."""
        done = self.request.prompt_logprobs
        if done is None:
            return range(0)
        end = min(self.computed + self.count, self.request.prompt_length - 1)
        return range(max(self.computed, len(done) - 1), end)

    def more_rows(self) -> range:
        """Positions in this step whose logits are wanted besides that of the last token."""
        if self.draft is not None:
            return range(self.computed, self.computed + self.count - 1)
        return self.prompt_rows()

    def take_off_draft(self) -> Draft | None:
        """What was proposed, whose tokens are then known no longer."""
        draft, self.draft = self.draft, None
        if draft is not None:
            del self.tokens[-len(draft.tokens) :]
        return draft

    def advance(self, pool: BlockPool) -> None:
        """Note that the step's tokens are in the cache, and publish the blocks they filled.

        Blocks that have left a window go back.
        """
        self.computed += self.count
        self.count = 0
        size = pool.block_size
        while (self.published + 1) * size <= self.computed:
            blocks = [table[self.published] for table in self.tables]
            start = self.published * size
            self.run = pool.publish(blocks, self.run or pool.root, self.tokens, start)
            self.published += 1
        for group, window in pool.layout.windowed:
            first, seen = self.given_back[group], pool.layout.first_seen(window, self.computed)
            if seen > first:
                table = self.tables[group]
                pool.release(table[first:seen])
                table[first:seen] = array("i", [NONE] * (seen - first))
                self.given_back[group] = seen

    def check(self, layout: CacheLayout) -> None:
        """AssertionError where a table names a block too many or too few; for tests."""
        whole = -(-self.computed // layout.block_size)
        for table, gone, window in zip(self.tables, self.given_back, layout.windows, strict=True):
            seen = 0 if window is None else layout.first_seen(window, self.computed)
            assert gone == seen, "a block outside the window is held, or one inside is not"
            assert all(block == NONE for block in table[:gone])
            assert all(block != NONE for block in table[gone:])
            assert len(table) >= whole

    def take_over(self, tables: list[array[int]], run: Run, pool: BlockPool) -> None:
        """Begin with blocks that `pool.match` found, and with what they hold."""
        for table in tables:
            pool.share(table)
        self.tables, self.run = tables, run
        self.given_back = [table.count(NONE) for table in tables]
        self.published = self.length
        self.computed = self.published * pool.block_size

    def share_cache(self, other: Sequence, pool: BlockPool) -> None:
        """Take over the cache of `other`, which begins with the same tokens."""
        for table in other.tables:
            pool.share(table)
        self.tables = [table[:] for table in other.tables]
        self.given_back = other.given_back[:]
        self.computed = other.computed
        self.published = other.published
        self.run = other.run
