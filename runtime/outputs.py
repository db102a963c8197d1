"""What requests give back, as it arises and as a whole, and the counts of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the model's own distribution, before any setting."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, likeliest first


@dataclass(slots=True)
class Increment:
    """What one step added to one output of a request."""

    request_id: str
    index: int  # which of the n outputs
    token_ids: list[int]
    text: str  # may lag behind the tokens: part of a character, or of a stop string
    finish_reason: str | None = None  # "stop", "length", "abort", "error"
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None


@dataclass
class CompletionOutput:
    """One of the n outputs of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # a stop token included
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None  # what went wrong, where finish_reason is "error"

    def add(self, increment: Increment) -> None:
        """Append what a step gave."""
        self.text += increment.text
        self.token_ids += increment.token_ids
        if increment.logprobs is not None:
            self.logprobs = (self.logprobs or []) + increment.logprobs
        self.finish_reason = increment.finish_reason
        self.error = increment.error


@dataclass
class RequestOutput:
    """A request and all its outputs."""

    request_id: str
    prompt: str | None  # None when token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None  # None for the first token
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache

    @property
    def finished(self) -> bool:
        """Whether every output has ended."""
        return all(output.finish_reason for output in self.outputs)


@dataclass(frozen=True)
class Statistics:
    """Counts since the engine was made, and its state now."""

    steps: int
    computed_tokens: int  # what forward passes were given, prompts and what was preempted
    prompt_tokens: int  # of requests whose prompt is computed
    cached_prompt_tokens: int  # of these, found in the prefix cache
    generated_tokens: int
    preemptions: int
    running: int
    waiting: int
    blocks_in_use: int
    blocks_cached: int
    blocks_free: int
    drafts: int = 0  # verified proposals of some tokens each
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    # Keys and values, a draft model's own included: of a token that all layers see, and of the
    # blocks in use.
    cache_bytes_per_token: int = 0
    cache_bytes_in_use: int = 0
    accepted_at: tuple[int, ...] = ()  # how many drafts had their first, second ... token accepted
