"""Printing which linears got which bits, and what that is expected to lose."""

import re
from typing import Any

from rich.console import Console
from rich.table import Table


def print_allocation(report: dict[str, Any]) -> None:
    """Print `allocation` of what `run_recipe` returned: a row a block, a column a kind of group."""
    allocation = report["allocation"]
    cells: dict[str, dict[str, str]] = {}
    kinds: dict[str, None] = {}
    for group in allocation["groups"]:
        block, kind = place_of(group["linears"])
        cells.setdefault(block, {})[kind] = group["chosen"]["choice"]
        kinds[kind] = None
    table = Table(title="Bits and group size by block", title_justify="left")
    table.add_column("block", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for block, found in cells.items():
        table.add_row(block, *(found.get(kind, "") for kind in kinds))
    losses = Table(title="What is expected to be lost", title_justify="left")
    for column in ("", "bits a weight", "KL predicted"):
        losses.add_column(column, justify="right" if column else "left")
    losses.caption_justify = "left"
    losses.caption = (
        "Nats a token, each linear by itself, added up; rounded to nearest on searched scales. "
        f"Gap to the proven bound: {allocation['gap']:.1e}"
    )
    rows = [(f"all {point['choice']}", point) for point in allocation["uniform"]]
    rows.append((f"taken, for {allocation['target_bits']:g}", allocation))
    for name, point in sorted(rows, key=lambda row: row[1]["bits"]):
        losses.add_row(name, f"{point['bits']:.3f}", f"{point['predicted_kl']:.4f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(losses)


def place_of(linears: list[str]) -> tuple[str, str]:
    """The block and the kind of a group: `model.layers.3.mlp.up_proj`, ... -> 3, `gate+up`."""
    found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", linears[0])
    block = found[1] if found else ""
    leaves = (name.rpartition(".")[2].removesuffix("_proj") for name in linears)
    return block, "+".join(leaves)
