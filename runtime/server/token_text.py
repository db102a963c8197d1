"""What each token spells: its exact bytes, and a name that JSON can hold.

Decoding a token alone does not do: half a character becomes a replacement character, and
SentencePiece's decoders drop a space at the beginning.  So bytes come from the vocabulary, by the
rule of the tokenizer's decoder:

    ByteLevel   each character of an entry stands for one byte (GPT-2's table)
    otherwise   U+2581 stands for a space, and an entry <0xNN> for the byte NN
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """Bytes and names of the tokens of `tokenizer`, kept once they were asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {token: name for name, token in tokenizer.get_added_vocab().items()}
        self._special = frozenset(tokenizer.all_special_ids)
        self._byte_level = _has_byte_level_decoder(tokenizer)
        self._known: dict[int, tuple[str, bytes]] = {}

    def bytes_of(self, token: int) -> bytes:
        """What the token adds to a text.  Of a special token, its name."""
        return self._look_up(token)[1]

    def name(self, token: int) -> str:
        """Its text, or `bytes:\\xe2\\x80` for what is no text alone, as OpenAI writes it."""
        return self._look_up(token)[0]

    def shows(self, token: int) -> bool:
        """Whether decoding keeps it: special tokens are left out of texts."""
        return token not in self._special

    def entry(self, token: int) -> str:
        """Its entry in the vocabulary; empty for a row of the model that no token has."""
        return self._tokenizer.convert_ids_to_tokens([token])[0] or ""

    def _look_up(self, token: int) -> tuple[str, bytes]:
        if token not in self._known:
            spelled = self._spell(token)
            try:
                name = spelled.decode()
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
            self._known[token] = name, spelled
        return self._known[token]

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        entry = self.entry(token)
        if self._byte_level:
            if all(character in BYTES for character in entry):
                return bytes(BYTES[character] for character in entry)
            return entry.encode()
        if found := _BYTE.fullmatch(entry):
            return bytes([int(found[1], 16)])
        return entry.replace(SPACE, " ").encode()


@functools.lru_cache(maxsize=1)
def token_text(tokenizer: Any) -> TokenText:
    """The `TokenText` of a tokenizer, made once."""
    return TokenText(tokenizer)


def _byte_table() -> dict[str, int]:
    """GPT-2's: a byte that prints stands for itself, the others for characters from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printing}
    others = [byte for byte in range(0x100) if byte not in printing]
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_table()


def _has_byte_level_decoder(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return False
    decoder = json.loads(backend.decoder.__getstate__())
    return any(part.get("type") == "ByteLevel" for part in decoder.get("decoders", [decoder]))
