"""Log-probabilities of tokens in the shapes of OpenAI's two interfaces."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from compress.runtime.outputs import TokenLogprob
from compress.runtime.server.token_text import TokenText

LEAST = -9999.0  # JSON has no -inf, which a token has whose logit is that


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)


def chat_logprobs(entries: Iterable[TokenLogprob], texts: TokenText) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""

    def described(token: int, logprob: float) -> dict[str, Any]:
        spelled = list(texts.bytes_of(token))
        return {"token": texts.name(token), "logprob": _finite(logprob), "bytes": spelled}

    content = [
        described(entry.token_id, entry.logprob)
        | {"top_logprobs": [described(token, logprob) for token, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """`choices[].logprobs` of one output of a text completion, piece by piece.

    `text_offset` counts characters of the output; a token that begins inside a character has the
    offset of that character.  A token's own entry is among the top ones even if it is not likely.
    """

    def __init__(self, texts: TokenText) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def take(
        self, tokens: Iterable[int], entries: Iterable[TokenLogprob | None]
    ) -> dict[str, list[Any]]:
        """The entries of the next tokens."""
        texts = self._texts
        found: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for token, entry in zip(tokens, entries, strict=True):
            found["tokens"].append(texts.name(token))
            found["text_offset"].append(self._offset)
            if entry is None:
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
            else:
                logprob = _finite(entry.logprob)
                top: dict[str, float] = {}
                for other, value in entry.top:  # two tokens may have one name: the likelier stays
                    top.setdefault(texts.name(other), _finite(value))
                top.setdefault(texts.name(token), logprob)
                found["token_logprobs"].append(logprob)
                found["top_logprobs"].append(top)
            if texts.shows(token):
                self._offset += len(self._decoder.decode(texts.bytes_of(token)))
        return found
