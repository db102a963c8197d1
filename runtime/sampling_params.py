"""How a request's tokens are drawn and when it ends, under the names of vLLM and OpenAI."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.core.errors import InputError, shown

if TYPE_CHECKING:
    from compress.runtime.grammar import Grammar

MOST_LOGPROBS = 1000


class SettingError(InputError):
    """A setting has a value that is not allowed.  `name` says which."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request.  Raises SettingError for a value out of range.

    Order of work: penalties, logit_bias, grammar, temperature, top_k, top_p, min_p.
    """

    max_tokens: int | None = 256  # None: as many as context and cache hold
    temperature: float = 1.0  # 0, or below 1e-5, takes the likeliest token
    top_p: float = 1.0  # the fewest tokens that hold this much probability; 1 is off
    top_k: int = 0  # the k likeliest tokens; 0 or -1 is off
    min_p: float = 0.0  # only tokens at least this likely, relative to the likeliest; 0 is off
    seed: int | None = None  # None: drawn from the engine's seed and the request's number
    stop: str | tuple[str, ...] = ()  # strings that end the text; they are not part of it
    stop_token_ids: tuple[int, ...] = ()  # end the output, besides the model's own
    n: int = 1  # outputs drawn for the prompt
    logprobs: int | None = None  # log-probabilities of the drawn token and of this many likeliest
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    ignore_eos: bool = False  # go on after the model's own end
    min_tokens: int = 0  # no stop token before this many
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and output become less likely
    presence_penalty: float = 0.0  # taken from the logits of tokens in the output
    frequency_penalty: float = 0.0  # the same, times how often the token is in the output
    # what is added to tokens' logits, -100 to 100; keys may be digits, as in JSON
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    grammar: Grammar | None = None  # what the output may be; it ends once nothing may follow

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self._tuple("stop")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", self._tuple("stop_token_ids"))
        if any(not isinstance(text, str) or not text for text in stop):
            message = f"stop = {shown(self.stop)}; give strings that are not empty"
            raise SettingError("stop", message)
        if any(not _is_int(token) or token < 0 for token in self.stop_token_ids):
            message = f"stop_token_ids = {shown(self.stop_token_ids)}; give token numbers"
            raise SettingError("stop_token_ids", message)
        if self.max_tokens is not None:
            self._check_int("max_tokens", 1, None)
        if self.seed is not None:
            self._check_int("seed", -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_int(name, 0, MOST_LOGPROBS)
        self._check_int("n", 1, None)
        self._check_int("top_k", -1, None)
        self._check_int("min_tokens", 0, self.max_tokens)
        self._check_number("temperature", 0, math.inf)
        self._check_number("top_p", 0, 1)
        self._check_number("min_p", 0, 1)
        self._check_number("repetition_penalty", 0.01, 100)  # beyond, logits become infinite
        self._check_number("presence_penalty", -2, 2)
        self._check_number("frequency_penalty", -2, 2)
        if self.top_p == 0:
            raise SettingError("top_p", "top_p = 0; give a number above 0, or 1 to switch it off")
        if not isinstance(self.ignore_eos, bool):
            message = f"ignore_eos = {shown(self.ignore_eos)}; allowed are true and false"
            raise SettingError("ignore_eos", message)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        if self.grammar is not None:
            self._check_grammar()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < 1e-5

    @property
    def penalized(self) -> bool:
        """Whether any penalty changes the logits."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0)

    def _check_grammar(self) -> None:
        from compress.runtime.grammar import Grammar  # which imports this module

        if not isinstance(self.grammar, Grammar):
            raise SettingError("grammar", f"grammar = {shown(self.grammar)}; give a Grammar")

    def _tuple(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple | set | frozenset):
            raise SettingError(name, f"{name} = {shown(value)}; give a list")
        return tuple(value)

    def _check_int(self, name: str, least: int, most: int | None) -> None:
        value = getattr(self, name)
        if not _is_int(value) or value < least or (most is not None and value > most):
            allowed = f"{least} or more" if most is None else f"{least} to {most}"
            message = f"{name} = {shown(value)}; allowed is a whole number, {allowed}"
            raise SettingError(name, message)

    def _check_number(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or not least <= value <= most or not math.isfinite(value):
            allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
            message = f"{name} = {shown(value)}; allowed is a number, {allowed}"
            raise SettingError(name, message)


def _bias(given: Any) -> dict[int, float]:
    """A copy of logit_bias with numbers as keys."""
    if not isinstance(given, Mapping):
        message = f"logit_bias = {shown(given)}; give a table from tokens to numbers"
        raise SettingError("logit_bias", message)
    bias = {}
    for key, value in given.items():
        token: Any = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key
        if not _is_int(token) or token < 0:
            raise SettingError("logit_bias", f"logit_bias: {shown(key)} is no token number")
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 100:
            message = f"logit_bias of token {token} = {shown(value)}; allowed is -100 to 100"
            raise SettingError("logit_bias", message)
        bias[token] = float(value)
    return bias


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
