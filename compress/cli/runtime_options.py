"""Options that the commands on the decode runtime share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from compress.cli.options import Size
from compress.core.device import DTYPES

if TYPE_CHECKING:
    from compress.runtime.llm import LLM
    from compress.runtime.sampling_params import SamplingParams

Options = list[Callable[[Any], Any]]

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
MODEL: Options = [
    DTYPE,
    HEAD_BITS,
    click.option(
        "--kv-cache-memory",
        type=Size(),
        help="Memory for keys and values: 500MB, 2GiB.  [default: a share of what is free]",
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


@dataclass(frozen=True)
class ModelChoice:
    """A model, and how it is to be loaded."""

    model: str
    dtype: str
    head_bits: str | None
    kv_cache_memory: int | None = None

    @property
    def lm_head_bits(self) -> int | None:
        """Bits of the output layer, or None for those it is stored in."""
        return int(self.head_bits) if self.head_bits else None

    @contextmanager
    def load(self, **settings: Any) -> Iterator[LLM]:
        """An LLM; what libraries print meanwhile goes to standard error."""
        from compress.runtime.llm import LLM

        with contextlib.redirect_stdout(sys.stderr):
            llm = LLM(
                self.model,
                dtype=self.dtype,
                lm_head_bits=self.lm_head_bits,
                kv_cache_memory=self.kv_cache_memory,
                **settings,
            )
        with llm:
            yield llm
