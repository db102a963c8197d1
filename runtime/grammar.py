"""Outputs that a grammar constrains: any JSON object, or JSON that fits a schema.

A matcher follows one output token by token and says which tokens may come next; all others get the
logit -inf.  llguidance (an extra) makes the matcher: an Earley parser over a lexer of lazily built
automata, so that nothing is computed ahead for a schema.  Of 49,152 tokens it takes 0.03 to 0.05 ms
to say which may follow, and as long to apply.  What a schema may cost is in `grammar_trial`.

An output ends as soon as the grammar lets nothing follow.  Where it may end or go on, as after a
digit, stop tokens are allowed beside what may follow.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.core.errors import reason_of, shown
from compress.runtime import grammar_trial
from compress.runtime.sampling_params import SettingError

KINDS = ("json_object", "json_schema")
MOST_CHARACTERS = 100_000  # of a schema
MOST_KEPT = 32  # compiled grammars; a large one takes 10 MB
PATIENCE = 60  # seconds for a trial that is given no processor time
SAMPLE = '{"a": [1, -2.5e3, true, null], "b": "\\n"}'  # what every tokenizer must spell
FOREIGN = "\u00e9\u6f22\n \U0001f600"  # what it need not, but both views must be the same


@dataclass(frozen=True)
class Grammar:
    """What an output may be.  Raises SettingError for what is no such thing."""

    kind: str  # "json_object" or "json_schema"
    schema: str = ""  # JSON text of a JSON Schema, for "json_schema"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise _error(f"kind = {shown(self.kind)}; allowed are {', '.join(KINDS)}")
        if not isinstance(self.schema, str):
            raise _error(f"schema = {shown(self.schema)}; give JSON text")


class _UntriedError(SettingError):
    """Nothing is known of a schema yet."""


class GrammarError(RuntimeError):
    """A matcher cannot go on, as where a pattern's automaton grows too large."""


class Matcher:
    """Follows one output."""

    __slots__ = ("_eos_ids", "_matcher", "allowed", "may_end")

    def __init__(self, matcher: Any, allowed: np.ndarray, may_end: bool, eos_ids: list[int]):
        self._matcher = matcher
        self._eos_ids = eos_ids  # the tokenizer's; what ends an output is the request's to say
        self.allowed = allowed  # bool [V], what may follow; not to be changed
        self.may_end = may_end  # whether the output is whole

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return self.may_end and not self.allowed.any()

    def copy(self) -> Matcher:
        """A matcher at the same place, which goes on by itself."""
        return Matcher(self._matcher.deep_copy(), self.allowed, self.may_end, self._eos_ids)

    def accept(self, token: int) -> None:
        """Go on by a token.  GrammarError when that cannot be done."""
        self._matcher.consume_token(token)
        self.look()

    def look(self) -> None:
        """Find out what may follow."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot go on: {_line(self._matcher.get_error())}")
        allowed = np.unpackbits(bits, count=len(self.allowed), bitorder="little").view(bool)
        allowed[self._eos_ids] = False
        self.allowed, self.may_end = allowed, self._matcher.is_accepting()
        if not self.may_end and not allowed.any():
            raise GrammarError("the grammar cannot go on: no token of the vocabulary fits")


class GrammarCompiler:
    """Makes matchers for a tokenizer and a model of `vocab_size` tokens.  Safe for threads."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._library_tokenizer: Any = None
        self._kept: OrderedDict[Grammar, Matcher | SettingError] = OrderedDict()  # oldest use first
        self._looking = threading.Lock()  # guards what is kept
        self._compiling = threading.Lock()

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning, to be copied for each output.

        SettingError for a schema that is wrong, asks for what cannot be enforced or takes too
        much.  A schema that was not seen before takes 0.2 s, a bad one 1 s, the first one 1 s more.
        """
        found = self._find(grammar)
        if found is None:
            with self._compiling:
                found = self._find(grammar) or self._keep(grammar)
        if isinstance(found, SettingError):
            raise SettingError(found.name, str(found))
        return found

    def knows(self, grammar: Grammar) -> bool:
        """Whether to compile it takes no time."""
        return self._find(grammar) is not None

    def _find(self, grammar: Grammar) -> Matcher | SettingError | None:
        with self._looking:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
            return self._kept.get(grammar)

    def _keep(self, grammar: Grammar) -> Matcher | SettingError:
        try:
            made: Matcher | SettingError = self._compile(grammar)
        except _UntriedError:
            raise
        except SettingError as error:
            made = error.with_traceback(None)
        with self._looking:
            self._kept[grammar] = made
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return made

    def _compile(self, grammar: Grammar) -> Matcher:
        if self._library_tokenizer is None:
            self._library_tokenizer = _library_tokenizer(self._tokenizer, self._vocab_size)
        schema = '{"type": "object"}'
        if grammar.kind == "json_schema":
            schema = _checked(grammar.schema)
            _try(schema)
        tokenizer = self._library_tokenizer
        try:
            made = grammar_trial.make_matcher(tokenizer, schema)
            matcher = Matcher(made, np.zeros(self._vocab_size, bool), False, tokenizer.eos_tokens)
            matcher.look()
        except (ValueError, GrammarError) as error:
            raise _refused(str(error)) from None
        return matcher


def _library_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """The grammar library's view of a tokenizer; SettingError where the two would not agree."""
    if importlib.util.find_spec("llguidance") is None:
        raise _error("needs the package llguidance; pip install 'compress-llm[grammar]'")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise _error(f"needs a tokenizer of the library tokenizers; {type(tokenizer)} is none")
    from llguidance.hf import from_tokenizer

    try:
        size = max(vocab_size, 1 + max(tokenizer.get_vocab().values()))
        made = from_tokenizer(tokenizer, n_vocab=size)
        tokens = tokenizer(SAMPLE + FOREIGN, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        agree = made.decode_str(tokens).strip() == text.strip()
    except Exception as error:  # tokenizers are programs of any origin
        raise _error(f"not with this tokenizer: {reason_of(error)}") from error
    if not agree or not text.strip().startswith(SAMPLE):
        raise _error("not with this tokenizer: it cannot spell JSON")
    return made


def _checked(schema: str) -> str:
    """A schema's JSON text as the library takes it, without its own extensions."""
    if len(schema) > MOST_CHARACTERS:
        raise _error(f"a schema of {len(schema)} characters; allowed are {MOST_CHARACTERS}")
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise _error(f"the schema is no JSON: {reason_of(error)}") from None
    if parsed is True:
        return "{}"
    if not isinstance(parsed, dict):
        raise _error(f"schema = {shown(parsed)}; give an object")
    parsed.pop("x-guidance", None)
    return json.dumps(parsed)


def _try(schema: str) -> None:
    """Have the schema compiled in a process of its own; SettingError where that fails."""
    try:
        trial = subprocess.run(
            [sys.executable, "-P", grammar_trial.__file__],
            input=schema, capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        message = str(_refused("it could not be tried; try again"))
        raise _UntriedError("grammar", message) from None
    if trial.stdout == grammar_trial.PASSED:
        return
    if trial.returncode or not trial.stdout:
        raise _refused("it takes too much time or memory; make it simpler")
    raise _refused(trial.stdout)


def _refused(reason: str) -> SettingError:
    if reason.startswith("NoExtension"):
        reason = "nothing fits it"
    elif reason.startswith("Unimplemented keys: "):
        reason = f"it uses {reason.removeprefix('Unimplemented keys: ')}; leave that out"
    return _error(f"the JSON schema cannot be enforced: {_line(reason)}")


def _error(message: str) -> SettingError:
    return SettingError("grammar", f"grammar: {message}")


def _line(text: str) -> str:
    """A message of the library in one line, without its mark for what it leaves out."""
    return " ".join(text.replace("<non-verbose/>", "").split())
