"""Drafts of a smaller model with the same vocabulary, or of the model's own layers.

A draft model computes what its own cache lacks of a sequence, draws a token from the last row, and
so on from that token: one batch for each place in the drafts, all sequences together.  Its cache
has the model's block numbers, so no block is accounted for twice.

**What its cache holds.**  Nothing at first: prompts are computed when their sequence is first
asked for, a batch at a time; until that is done there is no draft.  Rejected tokens are dropped by
position alone, as their places are written again before they are read.  For full blocks it is
noted what the draft model wrote into them, (number of the block before, tokens), which is found
again by whoever shares the block: other samples of the prompt, later requests with its prefix,
and the sequence itself after a preemption.

**How it draws.**  As the request asks, from its own logits: with the number that will decide the
model's draw (a guess), or, where the request has no seed and the host draws, with a number of its
own (a sample).  compress.runtime.speculation.proposer says what either means.
"""

from __future__ import annotations

from array import array

import numpy as np
import torch
from torch import Tensor

from compress.runtime.batch import AsynchronousModel, Model
from compress.runtime.batch_builder import build_batch
from compress.runtime.sampler import DRAFT, SamplingState, draw_from, probabilities, sample
from compress.runtime.sequence import Sequence
from compress.runtime.speculation.acceptance import Acceptance, Record
from compress.runtime.speculation.draft_chain import draft_chain
from compress.runtime.speculation.proposer import Draft
from compress.runtime.speculation.step_cost import StepCost, measure_steps

ROOT = 0  # number of what comes before a sequence's first block
MANY = 64  # tokens of a batch whose time is by their number


class _Context:
    """A sequence as the draft model has it in its cache; a `Part` of its batches."""

    __slots__ = (
        "broken",
        "computed",
        "count",
        "known",
        "noted",
        "number",
        "record",
        "tables",
        "tokens",
    )

    def __init__(self) -> None:
        self.tokens = array("q")  # the sequence's, and those of a draft
        self.tables: list[array[int]] = []  # the sequence's
        self.computed = 0  # tokens in the cache
        self.known = 0  # of the tokens: the sequence's, when it was last asked for
        self.count = 0  # tokens in the batch under way
        self.noted = 0  # full blocks of which it is noted what they hold
        self.number = ROOT  # of the last of these
        self.broken = False  # no draft can come of it any more
        self.record = Record()

    @property
    def blocks(self) -> array[int]:
        """Of all layers; of a `SelfDraft`, whose layers may have several tables, the first's."""
        return self.tables[0]

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.computed

    def more_rows(self) -> range:
        return range(0)


class _Drafting:
    """A draft in the making."""

    __slots__ = ("context", "ended", "most", "probabilities", "samples", "sampling", "tokens")

    def __init__(
        self, context: _Context, sampling: SamplingState, most: int, samples: bool
    ) -> None:
        self.context = context
        self.sampling = sampling  # a copy of the sequence's, which goes on with the draft
        self.most = most
        self.samples = samples
        self.tokens: list[int] = []
        self.probabilities: list[np.ndarray] = []
        self.ended = False

    @property
    def goes_on(self) -> bool:
        return not self.ended and len(self.tokens) < self.most

    def take(self, token: int) -> None:
        """Append a token, and end where nothing can follow it."""
        self.tokens.append(token)
        self.context.tokens.append(token)
        try:
            self.sampling.record(token)
            self.ended = self.sampling.complete or token in self.sampling.stop_ids
        except Exception:  # the grammar's; the model's own will say so, if it comes to this token
            self.ended = True

    def whole(self) -> Draft:
        if self.samples and self.tokens:
            return Draft(self.tokens, np.stack(self.probabilities))
        return Draft(self.tokens)


class DraftModel:
    """Proposes what `model` draws (compress.runtime.speculation.proposer.Proposer).

    target       whose tokens they are to be, with the same ids up to the smaller vocabulary
    most         tokens of one draft
    most_tokens, most_sequences  of a batch of `model`
    description  one line for people
    """

    def __init__(
        self,
        model: Model,
        target: Model,
        most: int,
        most_tokens: int,
        most_sequences: int,
        description: str,
    ) -> None:
        self.most = most
        self.description = description
        self._model = model
        self._vocab_size = target.vocab_size
        self._device_draws = isinstance(target, AsynchronousModel)
        self._most_tokens, self._most_sequences = most_tokens, most_sequences
        self._contexts: dict[Sequence, _Context] = {}
        # What the draft model wrote into full blocks: (number of the block before, tokens), and
        # a number for that, given out once.
        self._contents: dict[int, tuple[int, bytes, int]] = {}
        self._next_number = ROOT + 1
        self._acceptance = {greedy: Acceptance(most) for greedy in (False, True)}
        self._cost: StepCost | None = None  # of a batch, draws included

    @property
    def bytes_per_block(self) -> int:
        """Of the draft model's own cache."""
        return self._model.bytes_per_block

    def allocate(self, num_blocks: int) -> None:
        """Make its cache."""
        self._contexts.clear()
        self._contents.clear()
        self._model.allocate(num_blocks)
        if isinstance(self._model, AsynchronousModel):
            self._model.capture(self._most_sequences, 1)  # two tokens, after a draft that was right

    def measure(self, num_blocks: int) -> None:
        """Measure what `seconds` estimates, on a cache of `num_blocks` that holds nothing yet."""
        self._cost = StepCost(measure_steps(self._model, num_blocks, self._most_tokens))

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy each (source, target) in turn."""
        self._model.copy_blocks(pairs)
        for source, target in pairs:
            self._contents.pop(target, None)
            if source in self._contents:
                self._contents[target] = self._contents[source]

    def outlook(self, sequence: Sequence, most: int) -> list[float]:
        """How likely each token of a draft would be accepted."""
        context = self._context(sequence)
        if context.broken:
            return []
        most = min(most, self._model.max_context + 1 - len(sequence.tokens))
        acceptance = self._acceptance[sequence.request.params.greedy]
        return acceptance.rates(context.record, max(0, most))

    @torch.inference_mode()
    def propose(self, asked: list[tuple[Sequence, int]]) -> list[Draft]:
        """Draft up to so many tokens for each, in one batch for each place in the drafts.

        The first batch also computes what its cache lacks of the sequences, up to `most_tokens`;
        who lacks more gets no draft in this step.
        """
        drafting = [self._begin(sequence, most) for sequence, most in asked]
        step = self._first([one for one in drafting if one.goes_on])
        if isinstance(self._model, AsynchronousModel):
            chained = [one for one in step if not one.samples and not one.sampling.on_host]
            if chained:
                self._chain(self._model, chained)
            step = [one for one in step if one not in chained]
        while step:
            logits = self._forward([one.context for one in step])
            complete = [one for one in step if not one.context.remaining]
            self._draw(logits, complete)
            step = [one for one in complete if one.goes_on]
            for one in step:
                one.context.count = 1
        return [one.whole() for one in drafting]

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Learn how a draft fared."""
        if context := self._contexts.get(sequence):
            acceptance = self._acceptance[sequence.request.params.greedy]
            acceptance.learn(context.record, drafted, accepted)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence; what is in its blocks stays noted."""
        self._contexts.pop(sequence, None)

    def seconds(self, counts: list[int]) -> float:
        """Estimated time to draft so many tokens for so many sequences; `measure` comes first.

        A batch for each place in the drafts.
        """
        assert self._cost is not None
        seconds, going, drafted, total = self._cost.seconds, len(counts), 0, 0.0
        for count in sorted(counts):
            if count > drafted:
                total += (count - drafted) * seconds(going)
                drafted = count
            going -= 1
        return total

    def behind(self, sequence: Sequence) -> float:
        """Estimated time to compute what the cache lacks of it, but for the last token."""
        assert self._cost is not None
        context = self._context(sequence)
        if not context.computed:
            self._take(context, sequence)  # another sequence may have filled its blocks
        lacking = len(sequence.tokens) - 1 - context.computed
        if lacking <= 0:
            return 0.0
        if lacking >= MANY:
            return lacking / MANY * self._cost.seconds(MANY)
        return self._cost.seconds(1 + lacking) - self._cost.seconds(1)

    def _context(self, sequence: Sequence) -> _Context:
        return self._contexts.get(sequence) or self._contexts.setdefault(sequence, _Context())

    def _begin(self, sequence: Sequence, most: int) -> _Drafting:
        """A draft that lacks all its tokens, of a context that has all of the sequence's."""
        context = self._context(sequence)
        params = sequence.request.params
        samples = not params.greedy and params.seed is None
        samples = samples and (not self._device_draws or sequence.draws_on_host)
        self._take(context, sequence)
        room = self._model.max_context + 1 - context.known
        most = 0 if context.broken else min(most, room)
        return _Drafting(context, sequence.sampling.fork(), most, samples)

    def _take(self, context: _Context, sequence: Sequence) -> None:
        """Bring a context up to the sequence's tokens, and to what its blocks hold of them."""
        context.tables = sequence.tables
        self._roll_back(context, sequence)
        new = sequence.tokens[len(context.tokens) :]
        context.tokens.extend(new)
        context.known = len(context.tokens)
        size = self._model.vocab_size
        if size < self._vocab_size and max(new, default=0) >= size:
            context.broken = True  # a token that the draft model has no embedding for
        self._find(context)

    def _roll_back(self, context: _Context, sequence: Sequence) -> None:
        """Drop what was drafted and is not the sequence's."""
        kept, end = context.known, min(len(context.tokens), len(sequence.tokens) - 1)
        while kept < end and context.tokens[kept] == sequence.tokens[kept]:
            kept += 1
        del context.tokens[kept:]
        context.computed = min(context.computed, kept, len(sequence.tokens) - 1)

    def _find(self, context: _Context) -> None:
        """Go on to where the blocks hold, by what is noted, what the context lacks."""
        size = self._model.block_size
        while context.noted * size == context.computed < context.known - size:
            held = self._contents.get(context.blocks[context.noted])
            if held is None or held[:2] != self._key(context):
                return
            context.number = held[2]
            context.noted += 1
            context.computed += size

    def _note(self, context: _Context) -> None:
        """Note what the blocks hold that the sequence's tokens filled."""
        size = self._model.block_size
        while (context.noted + 1) * size <= min(context.computed, context.known):
            key, number = self._key(context), self._next_number
            self._contents[context.blocks[context.noted]] = (*key, number)
            self._next_number += 1
            context.number = number
            context.noted += 1

    def _key(self, context: _Context) -> tuple[int, bytes]:
        """What the next block to note holds, once it is filled."""
        start, size = context.noted * self._model.block_size, self._model.block_size
        return context.number, context.tokens[start : start + size].tobytes()

    def _first(self, drafting: list[_Drafting]) -> list[_Drafting]:
        """Who is in the first batch, each with its `count`: those who lack least come first.

        Of sequences that share a block that must be computed, one computes it.
        """
        step, room, shared = [], self._most_tokens, set()
        size = self._model.block_size
        for one in sorted(drafting, key=lambda one: one.context.remaining):
            context = one.context
            context.count = min(context.remaining, room)
            first = context.blocks[context.computed // size]
            if not context.count or first in shared:
                continue
            shared.add(first)
            room -= context.count
            step.append(one)
        return step

    def _forward(self, step: list[_Context]) -> Tensor:
        """Compute the `count` next tokens of each: logits float32 [who is complete, V]."""
        for context in step:
            self._write(context, context.count)
        logits = self._model.forward(build_batch(step, self._model.block_size))
        for context in step:
            context.computed += context.count
            self._note(context)
        lacking = self._vocab_size - self._model.vocab_size
        if lacking > 0:
            return torch.nn.functional.pad(logits, (0, lacking), value=-torch.inf)
        return logits[:, : self._vocab_size]

    def _write(self, context: _Context, count: int) -> None:
        """Note that the blocks of the next `count` tokens will hold something else."""
        size = self._model.block_size
        for place in range(context.computed // size, -(-(context.computed + count) // size)):
            self._contents.pop(context.blocks[place], None)

    def _chain(self, model: AsynchronousModel, step: list[_Drafting]) -> None:
        """All drafts of those whose tokens the device can draw; waits once."""
        for one in step:
            self._write(one.context, one.context.count + one.most - 1)
        contexts = [one.context for one in step]
        drawn = draft_chain(
            model, contexts, [one.sampling for one in step], [one.most for one in step]
        )
        for one, tokens in zip(step, drawn, strict=True):
            complete = one.context.computed >= one.context.known
            self._note(one.context)
            for token in tokens:
                if token >= self._vocab_size or one.ended:
                    break
                one.take(token)
            if complete and len(tokens) < one.most:
                self._break(one)

    def _draw(self, logits: Tensor, drafting: list[_Drafting]) -> None:
        """The next token of each draft; one that cannot be drawn ends its draft."""
        guessing = [place for place, one in enumerate(drafting) if not one.samples]
        rows = logits if len(guessing) == len(drafting) else logits[guessing]
        drawn, _ = sample(rows, [drafting[place].sampling for place in guessing])
        tokens: list[int | Exception | None] = [None] * len(drafting)
        for place, token in zip(guessing, drawn, strict=True):
            tokens[place] = token
        for place, (one, token) in enumerate(zip(drafting, tokens, strict=True)):
            if token is None:
                token = _drawn_sample(logits[place].cpu().numpy(), one)
            if isinstance(token, Exception):
                self._break(one)
            else:
                one.take(token)

    def _break(self, one: _Drafting) -> None:
        """End a draft whose logits gave no token, as with NaN, which may be in the cache now."""
        one.ended = one.context.broken = True
        for block in one.context.blocks:
            self._contents.pop(block, None)


def _drawn_sample(row: np.ndarray, one: _Drafting) -> int | Exception:
    """A token from the draft's own distribution, which is noted, by a number of its own."""
    state = one.sampling
    try:
        q = probabilities(state.adjusted(row), state.params)
    except ArithmeticError as error:
        return error
    one.probabilities.append(q)
    purpose = DRAFT + bytes([len(one.tokens)])
    return draw_from(q, state.uniform(state.produced, purpose))


class SelfDraft(DraftModel):
    """Proposes what the target draws without some of its layers (Zhang et al. 2023, Draft & Verify,
    arXiv:2309.08168).

    `model` is `Decoder.without` of the target: their cache is one.  So a draft reads what the
    whole model wrote of the sequence, and there are no prompts to compute.  What it writes for
    the tokens that it reads is overwritten when these are verified.
    """

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """The target has done it."""

    def _roll_back(self, context: _Context, sequence: Sequence) -> None:
        super()._roll_back(context, sequence)
        context.computed = sequence.computed

    def _find(self, context: _Context) -> None:
        """All is there."""

    def behind(self, sequence: Sequence) -> float:
        """Nothing to compute."""
        return 0.0

    def _note(self, context: _Context) -> None:
        """Nothing is there but what is the target's."""
