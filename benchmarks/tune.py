"""Find the fastest configurations of the low-bit product on this GPU, for kernels/.../configs.json.

    python benchmarks/tune.py [--bits 4] [--minutes 20] [--write]
    python benchmarks/tune.py --attention

For each width of codes and row of the table: every candidate of `configs.candidates`, by the time
of the four linears of a Llama-3-8B layer together, each with a cold L2 in CUDA graphs.  A
candidate that is wrong, or that does not launch, is out.  Rows are tried from 1 upwards; above the
last for which a product beats de-quantizing, the table ends.  Times are kept in the work folder as
they come, so a second call goes on where the first stopped.  `--write` puts the rows of this
device's generation into configs.json; without it they are printed.

`--attention` times the candidates of kernels/paged_attention/shapes.py for decode instead, and
prints the best; what of it goes into `choose` there is for a person to say.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from gpu.place import INTERPRETER, ROOT, Place

CONFIGS = ROOT / "kernels" / "lowbit_matmul" / "configs.json"
TOKENS = (8, 16, 32, 64, 128, 256)  # a row of the table each
ROWS = {8: 1}  # of x, that are timed for a row of the table: one stream is what users wait for
TINY_TOKENS = (8,)
TINY_CANDIDATES = 2
MARGIN = 0.98  # of the present choice's time: less is not worth a change, it may be noise


@dataclass(frozen=True)
class Linear:
    """One of the four: its copies, used in turn, and a check of what they give."""

    x: Any
    copies: list[Any]
    expected: Any


@click.command()
@click.option("--bits", default="4,8,3,2", show_default=True, help="Widths of codes, with commas.")
@click.option("--minutes", type=click.FloatRange(0), default=25.0, show_default=True)
@click.option("--attention", is_flag=True, help="Shapes of paged attention instead.")
@click.option("--write", is_flag=True, help="Put what was found into configs.json.")
@click.option(
    "--stand-in", type=click.Choice(["interpreter"]),
    help="Without a GPU, on tiny sizes: no time means anything then, and nothing is written.",
)  # fmt: skip
@click.option(
    "--work", type=click.Path(path_type=Path), default=ROOT / "build" / "tune",
    help="Where times are kept.  [default: build/tune]",
)  # fmt: skip
def main(
    bits: str, minutes: float, attention: bool, write: bool, stand_in: str | None, work: Path
) -> None:  # fmt: skip
    """Time the candidates for the low-bit product, or for attention, on this machine's GPU."""
    if stand_in:
        os.environ.update(INTERPRETER)  # before Triton is imported
    import torch

    if not stand_in and not torch.cuda.is_available():
        raise click.UsageError("torch finds no GPU here; --stand-in interpreter proves the command")
    if stand_in and write:
        raise click.UsageError("--write needs a GPU: the interpreter's times mean nothing")
    place, deadline = Place(stand_in is not None), time.monotonic() + 60 * minutes
    if attention:
        from gpu.attention import shape_times

        for line in shape_times(place, deadline):
            click.echo(line)
        return
    work.mkdir(parents=True, exist_ok=True)
    key = place.key_of("kernels/lowbit_matmul", endings=(".py",))  # configs.json is the output
    path = work / f"{place.slug}-{key}.json"
    times: dict[str, float | None] = json.loads(path.read_text()) if path.exists() else {}
    for width in map(int, bits.split(",")):
        for line in _tune(place, width, times, deadline):
            path.write_text(json.dumps(times, indent=1))
            click.echo(line)
    from compress.kernels.lowbit_matmul.configs import as_json

    rows = _rows(place, times)
    if write:
        _write(rows)
    elif rows:
        click.echo(as_json(rows).strip())
    if time.monotonic() > deadline:
        click.echo("The time was up: call again to go on")
        sys.exit(1)


def _tune(
    place: Place, bits: int, times: dict[str, float | None], deadline: float
) -> Iterator[str]:
    """Fill `times` for a width of codes; a line for each number of rows."""
    for tokens in TINY_TOKENS if place.stand_in else TOKENS:
        todo = [(key, config) for key, config in _cases(place, bits, tokens) if key not in times]
        if not todo:
            continue
        linears = _linears(place, bits, tokens)
        for done, (key, config) in enumerate(todo):
            if time.monotonic() > deadline:
                return
            times[key] = _time(place, linears, config)
            if done % 20 == 19:
                yield f"w{bits}, {tokens} rows: {done + 1} of {len(todo)} candidates"
        best = _best(place, times, bits, tokens)
        yield f"w{bits}, {tokens} rows: {best or 'de-quantizing is faster'}"


def _cases(place: Place, bits: int, tokens: int) -> list[tuple[str, Any]]:
    """(key, Config) of each candidate, and of de-quantizing, which is None."""
    from compress.kernels.lowbit_matmul.configs import candidates, choose

    found = candidates(tokens, _capability(place))
    present = choose(tokens, bits, _capability(place))
    if place.stand_in:
        found = found[:TINY_CANDIDATES]
    if present is not None and present not in found:
        found.append(present)
    return [(_key(bits, tokens, config), config) for config in [None, *found]]


def _key(bits: int, tokens: int, config: Any) -> str:
    return f"{bits} {tokens} {'-' if config is None else json.dumps(asdict(config))}"


def _linears(place: Place, bits: int, tokens: int) -> list[Linear]:
    import torch
    from gpu.lowbit import GROUP, MOST_COPIES
    from gpu.weights import quantized, shape_of
    from torch.nn import functional as F

    from compress.kernels.lowbit_matmul.triton import TritonLinear
    from compress.kernels.workspace import Workspace

    found, workspace = [], Workspace(place.device)
    for out, width in shape_of(place).linears.values():
        weight = quantized(out, width, bits, GROUP, place)
        one = TritonLinear(weight, place.dtype, place.device, workspace)
        memo = {id(workspace): workspace}
        count = min(MOST_COPIES, place.copies(one.bytes))
        copies = [one] + [copy.deepcopy(one, dict(memo)) for _ in range(count - 1)]
        rows = ROWS.get(tokens, tokens)
        x = torch.randn(rows, width, device=place.device, dtype=place.dtype)
        expected = F.linear(x.float(), weight.dequantize(torch.float32))
        found.append(Linear(x, copies, expected))
    return found


def _time(place: Place, linears: list[Linear], config: Any) -> float | None:
    """Seconds of the four linears; None for a candidate that is wrong or does not launch."""
    from gpu.lowbit import TOLERANCE
    from gpu.timing import relative_error, seconds
    from triton.runtime.errors import OutOfResources

    try:
        for linear in linears:
            error = relative_error(linear.copies[0].run(linear.x, config), linear.expected)
            if not error <= TOLERANCE:
                return None
        return sum(
            seconds(place, [partial(one.run, linear.x, config) for one in linear.copies])
            for linear in linears
        )
    except OutOfResources:
        return None


def _best(place: Place, times: dict[str, float | None], bits: int, tokens: int) -> Any:
    """The Config to take; None where de-quantizing is faster.

    The present one stays unless another is faster by more than noise.
    """
    from compress.kernels.lowbit_matmul.configs import choose

    cases = _cases(place, bits, tokens)
    timed = {config: taken for key, config in cases if (taken := times.get(key)) is not None}
    best = min(timed, key=lambda config: timed[config], default=None)
    present = choose(tokens, bits, _capability(place))
    if present in timed and timed[best] > MARGIN * timed[present]:
        return present
    return best


def _rows(place: Place, times: dict[str, float | None]) -> list[tuple[int, int, int, Any]]:
    """Rows of the table for each width that was timed to its end.

    They end where de-quantizing is faster.
    """
    found = []
    for bits in (2, 3, 4, 8):
        rows, known = [], True
        for tokens in TINY_TOKENS if place.stand_in else TOKENS:
            known = all(key in times for key, _ in _cases(place, bits, tokens))
            best = _best(place, times, bits, tokens) if known else None
            if best is None:
                break
            rows.append((_capability(place), bits, tokens, best))
        found += rows if known else []
    return found


def _write(rows: list[tuple[int, int, int, Any]]) -> None:
    """Replace the rows of the same generation and widths."""
    from compress.kernels.lowbit_matmul.configs import as_json, table

    new = {row[:2] for row in rows}
    kept = [row for row in table() if row[:2] not in new]
    CONFIGS.write_text(as_json([*kept, *rows]), encoding="utf-8")


def _capability(place: Place) -> int:
    """The generation in the table that this device goes by."""
    from compress.kernels.lowbit_matmul.configs import CAPABILITIES

    if place.stand_in:
        return CAPABILITIES[0]
    major = int(place.facts["capability"].partition(".")[0])
    return max(known for known in CAPABILITIES if known <= max(10 * major, CAPABILITIES[0]))


if __name__ == "__main__":
    main()
