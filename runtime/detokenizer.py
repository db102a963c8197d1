"""Text from tokens as they come, and the strings that end it.

A token is no piece of text: a character may need several, and a decoder may treat a token at the
beginning differently.  So tokens are decoded in a short window: those of the last piece of text
again, for context, and those since.  What the window gained is new text.  While it ends in a
replacement character, a character may be incomplete, and nothing is released.
"""

from __future__ import annotations

import itertools
from array import array
from typing import Any

from compress.core.tokenizer import decoder_of

INCOMPLETE = "\ufffd"
MOST_HELD = 8  # tokens; no character is longer, so what they spell is not UTF-8
CONTEXT = 6  # tokens of the prompt that the first window begins with
LONGEST = 32  # tokens of a window; so many without text are special ones


class Detokenizer:
    """Gives out one sequence's text; leaves out special tokens and what stops it."""

    def __init__(self, tokenizer: Any, prompt: array[int], stop: tuple[str, ...]) -> None:
        self._decode = decoder_of(tokenizer)
        self._stop = stop
        # the window; how many of its tokens have their text out; and that text
        self._window, self._known, self._known_text = self._end_of(prompt)
        self._held = ""  # could yet become a stop string
        self.stopped = False  # a stop string was met

    def push(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(INCOMPLETE) and len(self._window) - self._known < MOST_HELD:
            return ""
        return self._release(text)

    def finish(self) -> str:
        """Return what was held back."""
        if self.stopped:
            return ""
        text = self._release(self._decode(self._window))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _end_of(self, prompt: array[int]) -> tuple[list[int], int, str]:
        """Tokens that end the prompt, from one character's beginning on, as the first window.

        Those after the last whole character do not count as known.
        """
        for end, more in itertools.product(range(len(prompt), -1, -1)[:4], range(4)):
            begin = max(0, end - CONTEXT - more)
            text = self._decode(prompt[begin:end].tolist())
            if not text.startswith(INCOMPLETE) and not text.endswith(INCOMPLETE):
                return prompt[begin:].tolist(), end - begin, text
        window = prompt[-CONTEXT:].tolist()  # not UTF-8
        return window, len(window), self._decode(window)

    def _release(self, text: str) -> str:
        """Move the window on past `text`, which it decodes to; return what is new and certain."""
        new = text[len(self._known_text) :]
        if new or len(self._window) > LONGEST:
            del self._window[: self._known if new else -CONTEXT]
            self._known_text = self._decode(self._window)
        self._known = len(self._window)
        return self._until_stop(new) if self._stop else new

    def _until_stop(self, new: str) -> str:
        """Return the text up to a stop string, less an end that could become one."""
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), hold, -1):
                if text.endswith(stop[:length]):
                    hold = length
                    break
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]
