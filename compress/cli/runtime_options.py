"""Options that the commands on the decode runtime share."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from compress.cli.options import Size
from compress.core.device import DTYPES, KV_CACHE_DTYPES

if TYPE_CHECKING:
    from compress.runtime.llm import LLM
    from compress.runtime.sampling_params import SamplingParams

Options = list[Callable[[Any], Any]]
NO_DRAFT = "none"

DTYPE = click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", *DTYPES]),
    help="Precision of activations; auto is bfloat16 where the machine has it, else float32.",
)
HEAD_BITS = click.option(
    "--head-bits",
    type=click.Choice(["8"]),
    help="Round the output layer to 8 bits, one scale a row.  [default: as stored]",
)
KV_CACHE_DTYPE = click.option(
    "--kv-cache-dtype",
    default="auto",
    show_default=True,
    type=click.Choice(KV_CACHE_DTYPES),
    help="Keys and values in 8 bits, with a scale for each token and head; auto is as the "
    "checkpoint says, else the precision of activations.",
)


class DraftTokens(click.ParamType):
    """How many tokens to draft at once, or "auto"."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if value == "auto":
            return value
        if not re.fullmatch(r"0*[1-9]\d{0,8}", str(value)):
            self.fail(f"'{value}' is neither auto nor a number of tokens; give auto or 4")
        return int(value)


MODEL: Options = [
    DTYPE,
    HEAD_BITS,
    click.option(
        "--kv-cache-memory",
        type=Size(),
        help="Memory for keys and values: 500MB, 2GiB.  [default: a share of what is free]",
    ),
    KV_CACHE_DTYPE,
    click.option(
        "--draft",
        default="auto",
        show_default=True,
        metavar="auto|none|ngram|self[:LAYERS]|DRAFT",
        help="Propose tokens, several of which one step verifies: ngram copies what followed the "
        "same tokens before, self is MODEL without some of its layers, DRAFT a smaller model with "
        "the same vocabulary, auto the one that MODEL came with, if it did.",
    ),
    click.option(
        "--num-speculative-tokens",
        type=DraftTokens(),
        metavar="K|auto",
        help="Tokens to propose at once; auto follows what is accepted and what it costs, "
        "down to none.  [default: auto]",
    ),
]
JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)


def sampling(max_tokens: int, temperature: float) -> Options:
    """Options for the settings of a request, with a command's own defaults."""
    return [
        click.option(
            "--max-tokens",
            default=max_tokens,
            show_default=True,
            type=click.IntRange(min=1),
            help="Most new tokens of an answer.",
        ),
        click.option(
            "--temperature",
            default=temperature,
            show_default=True,
            type=click.FloatRange(min=0),
            help="0 takes the likeliest token.",
        ),
        click.option(
            "--top-p", type=float, help="The fewest tokens that hold this much probability."
        ),
        click.option("--top-k", type=int, help="The k likeliest tokens."),
        click.option(
            "--min-p", type=float, help="Tokens at least this likely, relative to the likeliest."
        ),
        click.option(
            "--stop", multiple=True, help="End the text before this string; may be repeated."
        ),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0)),
    ]


def add_options(options: Options) -> Callable[[Any], Any]:
    """Decorate a command with options, in the order in which --help shows them."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def sampling_params(**values: Any) -> SamplingParams:
    """Settings from flags; one that was not given keeps its default."""
    from compress.runtime.sampling_params import SamplingParams

    return SamplingParams(**{key: value for key, value in values.items() if value is not None})


def bits_of(head_bits: str | None) -> int | None:
    """What `--head-bits` was given."""
    return int(head_bits) if head_bits else None


@dataclass(frozen=True)
class ModelChoice:
    """A model, and how it is to be loaded.  UsageError for a number of drafted tokens alone."""

    model: str
    dtype: str
    head_bits: str | None
    kv_cache_memory: int | None = None
    draft: str = NO_DRAFT
    num_speculative_tokens: int | str | None = None
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.num_speculative_tokens is not None and self.draft == NO_DRAFT:
            raise click.UsageError("--num-speculative-tokens goes with --draft")

    @property
    def lm_head_bits(self) -> int | None:
        """Bits of the output layer, or None for those it is stored in."""
        return bits_of(self.head_bits)

    @property
    def settings(self) -> dict[str, Any]:
        """What LLM takes beside the model, by its names; what was not given keeps its default."""
        given = {
            "lm_head_bits": self.lm_head_bits,
            "kv_cache_memory": self.kv_cache_memory,
            "draft": None if self.draft == NO_DRAFT else self.draft,
            "num_speculative_tokens": self.num_speculative_tokens,
        }
        settings = {"dtype": self.dtype, "kv_cache_dtype": self.kv_cache_dtype}
        return settings | {k: v for k, v in given.items() if v is not None}

    @contextmanager
    def load(self, **more: Any) -> Iterator[LLM]:
        """An LLM; what libraries print meanwhile goes to standard error."""
        from compress.runtime.llm import LLM

        with contextlib.redirect_stdout(sys.stderr):
            llm = LLM(self.model, **self.settings, **more)
        with llm:
            yield llm
