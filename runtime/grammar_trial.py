"""What makes a grammar's matcher of a JSON schema; run as a program, a trial of one.

A schema comes from anywhere, and a few lines of it can keep the grammar library busy for hours
(`multipleOf`, patterns that must hold together) or overflow its stack (`$ref` after `$ref`), which
no exception tells of.  So a schema is compiled in a process of its own first, which the system ends
when it takes too much, and only then where the model is.

    python grammar_trial.py < SCHEMA        writes PASSED, or what is wrong

That process imports nothing of ours, so that it is done in 0.1 s.
"""

from __future__ import annotations

import sys
from typing import Any

SECONDS = 0.75  # of processor time
MEMORY = 2 * 2**30  # bytes of address space
STACK = 2**20  # bytes, an eighth of what a thread has elsewhere
PASSED = "passed"

# One space, or one line break and what indents the next line: a small model can go on with white
# space for ever, and JSON needs no more.
WHITE_SPACE = r"[ ]|\n[ \t]{0,24}"

# About half of the library's own bounds, which are meant for machines that do nothing else.
LIMITS = {
    "initial_lexer_fuel": 300_000,
    "max_grammar_size": 60_000,
    "step_lexer_fuel": 100_000,  # some 7 ms
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,  # some 20 MB
    "verbose_errors": False,
}


def make_matcher(tokenizer: Any, schema: str) -> Any:
    """An `LLMatcher` for what `schema`, JSON text of an object, allows.

    ValueError with what is wrong with it, which may have several lines.
    """
    from llguidance import LLMatcher, LLParserLimits

    options: Any = {"whitespace_pattern": WHITE_SPACE, "whitespace_flexible": True}
    options |= {"lenient": False, "coerce_one_of": False}
    text = LLMatcher.grammar_from_json_schema(schema, overrides=options)
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(**LIMITS))
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


class _Bytes:
    """The least of tokenizers, one token a byte, as the library asks for one."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def _try() -> None:
    from llguidance import LLTokenizer, TokenizerWrapper

    try:
        make_matcher(LLTokenizer(TokenizerWrapper(_Bytes())), sys.stdin.read())
        sys.stdout.write(PASSED)
    except ValueError as error:
        sys.stdout.write(str(error))


if __name__ == "__main__":
    import contextlib
    import resource
    import signal
    import threading

    for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, MEMORY)):
        with contextlib.suppress(ValueError, OSError):  # less is allowed already, or not to be set
            resource.setrlimit(limit, (most, most))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whose signal ends the process
    threading.stack_size(STACK)
    thread = threading.Thread(target=_try)
    thread.start()
    thread.join()
