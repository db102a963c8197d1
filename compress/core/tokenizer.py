"""Loading the tokenizer of a model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.errors import InputError, reason_of, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; InputError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a broken tokenizer.json can fail anywhere inside tokenizers
        raise InputError(
            f"'{folder}' has no usable tokenizer: {reason_of(error)}; copy the original's there"
        ) from error


def difference(one: Path, other: Path, common: bool = False) -> str | None:
    """How the tokenizers of two folders differ, in words; None where tokens have the same ids.

    With `common` of the tokens that both have alone: special ones may have been added to one.
    """
    if one == other:
        return None
    first, second = (load_tokenizer(folder).get_vocab() for folder in (one, other))
    looked_at = first.keys() & second.keys() if common else first.keys() | second.keys()
    differing = sorted(token for token in looked_at if first.get(token) != second.get(token))
    if not differing:
        return None
    token = differing[0]
    return (
        f"tokenizers of {len(first)} and {len(second)} tokens, which differ in {len(differing)}, "
        f"such as {shown(token)} ({first.get(token)} and {second.get(token)})"
    )


def decoder_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """Tokens to text, without special tokens and with spaces as they are.

    Where transformers' class only passes tokens on to the tokenizers library, that is asked at
    once: the way through the class takes four times as long.
    """
    from transformers import PreTrainedTokenizerFast

    made = type(tokenizer)
    if all(
        getattr(made, name, None) is getattr(PreTrainedTokenizerFast, name)
        for name in ("decode", "_decode")
    ):
        return tokenizer.backend_tokenizer.decode  # leaves out special tokens by itself
    return lambda tokens: tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
