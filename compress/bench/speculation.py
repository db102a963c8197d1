"""What runs with and without speculation come to: acceptance, speed-up, what was to be expected.

**Acceptance** a is the probability that a proposed token is accepted, given that those before it
were: accepted / (accepted + refused), the likeliest value, since a draft ends at its first refusal.

**Expectation.**  A step that proposes k tokens to a sequence gives

    1 + a + a^2 + ... + a^k = (1 - a^(k+1)) / (1 - a)

on average (Leviathan et al. 2023, arXiv:2211.17192, equation 1), and costs c(k) plain steps.  That
is the time of a plain step, and besides the time to draft, what a forward pass of k tokens more
takes longer, and draws of the tokens that come out.  Forward passes and draws are timed alone,
between the runs: so what the engine itself loses by speculation is not in the cost, and shows as a
measured speed-up below the expected one.  Refusals come in runs (a text is copied or it is not), so
the formula may miss the length; the expectation is also made with the measured length.

**Loops.**  A small model often ends in repeating itself, and what repeats is guessed for nothing.
See `loops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LONGEST_PERIOD = 64  # tokens: a paragraph or an entry of a list
LEAST_REPEATED = 16  # tokens: a short answer such as "No, no, no." is no loop
SHARE_EQUAL = 0.75  # a loop may count, or change a word: "12. ...", "13. ..."
RESAMPLES = 2000


@dataclass(frozen=True)
class Step:
    """A step in which `sequences` decoded: its seconds, and of these to draft; new tokens."""

    seconds: float
    sequences: int
    tokens: int
    drafts: tuple[tuple[int, int], ...] = ()  # of each: tokens drafted, and accepted
    drafting: float = 0.0

    @property
    def computed(self) -> int:
        """Tokens that the model was given."""
        return self.sequences + sum(drafted for drafted, _ in self.drafts)


@dataclass(frozen=True)
class Run:
    """Prompts answered together.

    prefill  seconds until the last one had its first token
    steps    after that, as long as all of them decode: what a server with a queue does all day
    tail     the steps after those, with fewer and fewer sequences
    """

    outputs: list[list[int]]
    prefill: float
    steps: list[Step]
    tail: list[Step] = field(default_factory=list)

    @property
    def decode(self) -> float:
        """Seconds of the steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def tokens(self) -> int:
        """New tokens of the steps."""
        return sum(step.tokens for step in self.steps)


@dataclass(frozen=True)
class Pair:
    """The same prompts without and with speculation."""

    plain: Run
    fast: Run

    @property
    def looping(self) -> bool:
        """Whether an output repeats itself: then the pair says nothing of other text."""
        return any(map(loops, (*self.plain.outputs, *self.fast.outputs)))


@dataclass(frozen=True)
class Costs:
    """Timed alone: seconds of a forward pass by its tokens, and of the draw of a token."""

    forward: Callable[[int], float]
    draw: float


@dataclass(frozen=True)
class Expectation:
    """Of some steps: seconds they should take, also as plain steps, and tokens by the formula."""

    seconds: float
    plain_seconds: float
    tokens: float

    def __add__(self, other: Expectation) -> Expectation:
        return Expectation(
            self.seconds + other.seconds,
            self.plain_seconds + other.plain_seconds,
            self.tokens + other.tokens,
        )


def loops(tokens: Sequence[int]) -> bool:
    """Whether an output ends in repeating itself.

    That is: for some period up to LONGEST_PERIOD, in the last third of the output, at least
    LEAST_REPEATED tokens, SHARE_EQUAL of the tokens equal the one a period before.  From a third
    on it is the loop that a speed-up would mostly measure.
    """
    text = np.asarray(tokens)
    tail = max(LEAST_REPEATED, -(-len(text) // 3))
    for period in range(1, min(LONGEST_PERIOD, len(text) - tail) + 1):
        same = text[period:] == text[:-period]
        if same[-tail:].mean() >= SHARE_EQUAL:
            return True
    return False


def acceptance(steps: Sequence[Step]) -> float | None:
    """The probability a; None where nothing was proposed."""
    drafts = [draft for step in steps for draft in step.drafts]
    accepted = sum(taken for _, taken in drafts)
    refused = sum(taken < drafted for drafted, taken in drafts)
    return accepted / (accepted + refused) if drafts else None


def expected_length(a: float, k: int) -> float:
    """Tokens that a step gives a sequence for which k are proposed."""
    return sum(a**place for place in range(k + 1))


def expect(plain: Sequence[Step], fast: Sequence[Step], costs: Costs) -> Expectation:
    """What the steps `fast` should take by what the steps `plain` took and by the costs."""
    a = acceptance(fast) or 0.0

    def alone(step: Step, tokens: int) -> float:
        return costs.forward(tokens) + costs.draw * step.tokens

    # scheduler, text and the like, the same for each step; less than nothing only by noise
    rest = max(0.0, sum(step.seconds - alone(step, step.computed) for step in plain) / len(plain))
    plain_draws = sum(step.tokens / step.sequences for step in plain) / len(plain)
    seconds = plain_seconds = tokens = 0.0
    for step in fast:
        seconds += rest + step.drafting + alone(step, step.computed)
        plain_seconds += (
            rest + costs.forward(step.sequences) + costs.draw * plain_draws * step.sequences
        )
        tokens += step.sequences - len(step.drafts)
        tokens += sum(expected_length(a, drafted) for drafted, _ in step.drafts)
    return Expectation(seconds, plain_seconds, tokens)


def summary(pairs: Sequence[Pair], expected: Expectation | None) -> dict[str, Any]:
    """A row of the report from pairs that do not loop; without one that decodes only their number.

    `expected` is of all their steps; None where costs are not known.
    """
    pairs = [pair for pair in pairs if pair.plain.steps and pair.fast.steps]
    if not pairs:
        return {"prompts": 0}
    steps = [step for pair in pairs for step in pair.fast.steps]
    drafts = [draft for step in steps for draft in step.drafts]
    plain_tokens = sum(pair.plain.tokens for pair in pairs)
    tokens = sum(step.tokens for step in steps)
    sequence_steps = sum(step.sequences for step in steps)
    low, high = interval(pairs)
    row: dict[str, Any] = {
        "prompts": sum(len(pair.plain.outputs) for pair in pairs),
        "tokens": tokens,
        "plain_ms_per_token": 1000 * sum(pair.plain.decode for pair in pairs) / plain_tokens,
        "ms_per_token": 1000 * sum(step.seconds for step in steps) / tokens,
        "speed_up": speed_up(pairs),
        "speed_up_low": low,
        "speed_up_high": high,
        "whole_speed_up": _whole([pair.plain for pair in pairs])
        / _whole([pair.fast for pair in pairs]),
        "steps": len(steps),
        "drafts": len(drafts),
        "drafted": sum(drafted for drafted, _ in drafts),
        "accepted": sum(taken for _, taken in drafts),
        "acceptance": acceptance(steps),
        "accepted_at": by_place(drafts),
        "tokens_per_draft": 1 + sum(taken for _, taken in drafts) / max(1, len(drafts)),
        "tokens_per_step": tokens / sequence_steps,
        "drafting_ms_per_step": 1000 * sum(step.drafting for step in steps) / len(steps),
    }
    if expected is not None:
        per_token = row["plain_ms_per_token"] / 1000
        by_formula = per_token * expected.tokens / expected.seconds
        by_length = per_token * tokens / expected.seconds
        row |= {
            "cost": expected.seconds / expected.plain_seconds,
            "expected_tokens_per_step": expected.tokens / sequence_steps,
            "expected_speed_up": by_formula,
            "of_expected": row["speed_up"] / by_formula,
            "expected_speed_up_by_length": by_length,
            "of_expected_by_length": row["speed_up"] / by_length,
        }
    return {name: _rounded(value) for name, value in row.items()}


def by_place(drafts: Sequence[tuple[int, int]]) -> list[float]:
    """Of drafts with an i-th token, the share that had it accepted."""
    longest = max((drafted for drafted, _ in drafts), default=0)
    shares = []
    for place in range(longest):
        long_enough = [taken for drafted, taken in drafts if drafted > place]
        shares.append(sum(taken > place for taken in long_enough) / len(long_enough))
    return shares


def speed_up(pairs: Sequence[Pair]) -> float:
    """Decode seconds a token without speculation, over those with it."""
    return float(_ratio(_sums(pairs).sum(0)))


def interval(pairs: Sequence[Pair]) -> tuple[float | None, float | None]:
    """95% of the bootstrap's speed-ups: prompts drawn anew with replacement (Efron 1979)."""
    if len(pairs) < 2:
        return None, None
    draw = np.random.default_rng(0)
    picks = draw.integers(len(pairs), size=(RESAMPLES, len(pairs)))
    low, high = np.quantile(_ratio(_sums(pairs)[picks].sum(1)), (0.025, 0.975))
    return float(low), float(high)


def _whole(runs: Sequence[Run]) -> float:
    """Seconds a token of the runs from their beginning to their end."""
    tokens = sum(len(output) for run in runs for output in run.outputs)
    tails = sum(step.seconds for run in runs for step in run.tail)
    return (sum(run.prefill + run.decode for run in runs) + tails) / tokens


def _sums(pairs: Sequence[Pair]) -> np.ndarray:
    """[pairs, 4]: seconds and tokens without, seconds and tokens with speculation."""
    return np.array([(p.plain.decode, p.plain.tokens, p.fast.decode, p.fast.tokens) for p in pairs])


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1] * sums[..., 3] / sums[..., 2]


def _rounded(value: Any) -> Any:
    """Six significant digits: times of small models are small."""
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
