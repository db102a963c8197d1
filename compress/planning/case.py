"""One thing to plan: a model in a precision on devices, what is asked of it, and what that takes.

time of a token   a decode step at context S; with drafts of k tokens, the time of a pass over
                  k + 1 tokens and of k steps of the draft, over the tokens expected of them
throughput        B / time of a token
first token       the prefill of B prompts of S tokens
whole answer      first token + T times that of a token at context S + T // 2
memory            weights, and keys and values of B sequences of S + T tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from compress import roofline
from compress.core.errors import InputError
from compress.roofline import Device, Memory, ModelShape, Precision, Timing, Work


@dataclass(frozen=True)
class Load:
    """What is asked: B sequences of S tokens, T new ones each, on so many devices together."""

    batch: int = 1
    context: int = 1024
    new_tokens: int = 0
    devices: int = 1


@dataclass(frozen=True)
class Draft:
    """Tokens proposed ahead of the model.

    length      k, tokens a proposal
    acceptance  a, of a proposed token whose forerunners were all accepted
    cost        r, seconds of a step of the draft over those of the model; or None, and `shape` in
                `precision` is the draft
    """

    length: int
    acceptance: float
    cost: float | None = None
    shape: ModelShape | None = None
    precision: Precision | None = None


@dataclass(frozen=True)
class Case:
    """A plan's whole input; its properties are the answers."""

    shape: ModelShape
    precision: Precision
    device: Device
    load: Load
    draft: Draft | None = None

    def __post_init__(self) -> None:
        if self.load.devices > 1 and not self.device.link:
            raise InputError(
                f"device '{self.device.name}' has no link to a second one; lower --tensor-parallel "
                "or give the link's bytes/s in a device file"
            )

    @cached_property
    def part(self) -> ModelShape:
        """What one device holds."""
        many = self.load.devices
        return self.shape if many == 1 else roofline.shard(self.shape, many)

    @cached_property
    def prefill_work(self) -> Work:
        """Of one device."""
        return roofline.prefill(self.part, self.precision, self.load.batch, self.load.context)

    @cached_property
    def decode_work(self) -> Work:
        """Of one device, at context S."""
        return roofline.decode(self.part, self.precision, self.load.batch, self.load.context)

    @cached_property
    def prefill_time(self) -> Timing:
        return self._time(self.prefill_work, self.load.batch * self.load.context)

    @cached_property
    def decode_time(self) -> Timing:
        return self._time(self.decode_work, self.load.batch)

    def _time(self, work: Work, rows: int) -> Timing:
        many = self.load.devices
        linked = roofline.link_bytes(self.shape, rows, many) if many > 1 else 0.0
        return roofline.time_of(work, self.device, self.precision, linked)

    @cached_property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return self.prefill_time.seconds

    @cached_property
    def token(self) -> float:
        """Seconds a token of each sequence, at context S."""
        return self._token_at(self.load.context)

    @property
    def throughput(self) -> float:
        """New tokens/s of all sequences together."""
        return self.load.batch / self.token

    @property
    def answer(self) -> float:
        """Seconds of a whole answer of T tokens."""
        load = self.load
        return self.first_token + load.new_tokens * self._token_at(
            load.context + load.new_tokens // 2
        )

    def _token_at(self, context: int) -> float:
        step = self._step(context)
        if self.draft is None or self.draft.length == 0:
            return step
        draft, batch = self.draft, self.load.batch
        k = draft.length
        check = self._time(
            roofline.decode(self.part, self.precision, batch, context + k, k + 1), batch * (k + 1)
        ).seconds
        proposing = k * self._draft_cost(context) * step
        return (check + proposing) / roofline.expected_tokens(draft.acceptance, k)

    def _step(self, context: int) -> float:
        batch = self.load.batch
        work = roofline.decode(self.part, self.precision, batch, context)
        return self._time(work, batch).seconds

    def _draft_cost(self, context: int) -> float:
        draft = self.draft
        assert draft is not None
        if draft.cost is not None:
            return draft.cost
        assert draft.shape is not None
        assert draft.precision is not None
        work = roofline.decode(draft.shape, draft.precision, self.load.batch, context)
        spent = roofline.time_of(work, self.device, draft.precision).seconds
        return spent / self._step(context)

    @property
    def draft_cost(self) -> float:
        """r of the draft, at context S."""
        return self._draft_cost(self.load.context)

    @cached_property
    def memory(self) -> Memory:
        """Bytes on one device at the end, S + T tokens a sequence; without the draft's."""
        load = self.load
        return roofline.memory(
            self.part, self.precision, load.batch, load.context + load.new_tokens
        )

    @cached_property
    def draft_memory(self) -> float:
        """Bytes of the draft's weights, keys and values; 0 where only its cost is known."""
        return self._draft_bytes(self.load.batch)

    def _draft_bytes(self, batch: int) -> float:
        draft, load = self.draft, self.load
        if draft is None or draft.shape is None or draft.precision is None:
            return 0.0
        context = load.context + load.new_tokens
        return roofline.memory(draft.shape, draft.precision, batch, context).total

    @property
    def held(self) -> float:
        """Bytes on one device, all counted."""
        return self.memory.total + self.draft_memory

    @property
    def fits(self) -> bool:
        return self.held <= self.device.memory

    @cached_property
    def largest_batch(self) -> int:
        """Most sequences of S + T tokens that fit; 0 when the weights alone do not."""
        context = self.load.context + self.load.new_tokens
        weights = self._draft_bytes(0)
        kv = roofline.kv_bytes(self.part, self.precision, context)
        left = self.device.memory - weights - roofline.memory(self.part, self.precision, 0, 1).total
        return max(0, int(left // (kv + self._draft_bytes(1) - weights)))
