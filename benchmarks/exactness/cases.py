"""Every setting that changes what is drawn, alone and together, for models of 6 to 12 tokens."""

from __future__ import annotations

from .distribution import Case, Outcome


def some(vocab: int) -> list[Case]:
    """Few cases that together use every setting."""
    return [
        Case("plain"),
        Case("filters", {"temperature": 1.7, "top_k": vocab - 2, "top_p": 0.9, "min_p": 0.07}),
        Case(
            "penalties, bias",
            {
                "temperature": 0.7,
                "repetition_penalty": 1.5,
                "presence_penalty": 0.8,
                "frequency_penalty": -0.6,
                "logit_bias": {2: 1.5, 4: -2.0},
                "logprobs": 2,
            },
        ),
        Case("grammar, stops", {"stop_token_ids": (2,), "min_tokens": 3, "seed": 5}, rule(vocab)),
    ]


def every(vocab: int) -> list[Case]:
    """Each setting alone, and the combinations of `some`."""
    return [
        Case("temperature 0.6", {"temperature": 0.6}),
        Case("temperature 1.7", {"temperature": 1.7}),
        Case("top_k", {"top_k": vocab // 2}),
        Case("top_p", {"top_p": 0.75}),
        Case("min_p", {"min_p": 0.12}),
        Case("repetition_penalty", {"repetition_penalty": 1.6}),
        Case("presence_penalty", {"presence_penalty": 1.3}),
        Case("frequency_penalty", {"frequency_penalty": 0.9}),
        Case("logit_bias", {"logit_bias": {1: 2.0, 3: -1.0, 5: -100.0}}),
        Case("stop tokens", {"stop_token_ids": (2, 4)}),
        Case("min_tokens", {"stop_token_ids": (2, 4), "min_tokens": 3}),
        Case("grammar", rule=rule(vocab)),
        Case("grammar that ends", rule=rule_that_ends(vocab)),
        Case("seeds", {"seed": 7}),
        Case("log-probabilities", {"logprobs": 3}),
        *some(vocab),
    ]


def rule(vocab: int):
    """A third of the tokens may not follow; which, depends on the output."""
    return lambda output: [t for t in range(vocab) if (t + sum(output) + len(output)) % 3 != 1]


def rule_that_ends(vocab: int):
    """The same, but nothing may follow an output of 3 tokens with an even sum."""
    allowed = rule(vocab)

    def then(output: Outcome) -> list[int]:
        return [] if len(output) == 3 and sum(output) % 2 == 0 else allowed(output)

    return then
