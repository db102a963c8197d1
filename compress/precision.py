"""Bits a number by name: bf16, fp8, int4, int4-g64, ...

An integer grid stores, for each group of G numbers, a 16-bit scale: b + 16 / G bits a number.
Int4 in groups of 128 is 4.125.  Zero points, where a format has them, are b / G more and left out.
"""

import re
from dataclasses import dataclass

from compress.core.errors import InputError, nearest, shown

FLOATS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "fp8": 8.0}
INTEGERS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
GROUP = 128
SCALE_BITS = 16
NORM_BITS = 16  # norms stay as they are


@dataclass(frozen=True)
class Precision:
    """Bits a number, scales included, and the units that multiply the linears.

    weights     of the linears in the layers
    embeddings  of the table of embeddings
    head        of the last linear; a tied model has a copy of the table if the two differ
    kv          of keys and values
    compute     a name in Device.rates
    """

    weights: float = 16.0
    embeddings: float = 16.0
    head: float = 16.0
    kv: float = 16.0
    compute: str = "bf16"


def bits(name: str) -> float:
    """Bits a number of a format, scales included.  Raises InputError for an unknown one."""
    match = re.fullmatch(r"([a-z0-9]+?)(?:-g([1-9][0-9]{0,4}))?", name)
    kind, group = match.groups() if match else (name, None)
    if kind in INTEGERS:
        return INTEGERS[kind] + SCALE_BITS / int(group or GROUP)
    if kind in FLOATS and group is None:
        return FLOATS[kind]
    known = [*FLOATS, *INTEGERS, "w8a8"]
    raise InputError(
        f"precision {shown(name)} is unknown; give one of {', '.join(known)}, or with a group "
        f"size int4-g64{nearest(name, known)}"
    )


def precision(
    weights: str = "bf16",
    kv: str = "bf16",
    embeddings: str = "bf16",
    head: str | None = None,
) -> Precision:
    """A Precision from names; the head is stored as the embeddings unless it is named.

    `fp8` and `w8a8` (int8) weights multiply activations of 8 bits too, on the device's units for
    that; all other weights are turned into 16 bits on the way.
    """
    compute = {"fp8": "fp8", "w8a8": "int8"}.get(weights, "bf16")
    return Precision(
        weights=8.0 if weights == "w8a8" else bits(weights),
        embeddings=bits(embeddings),
        head=bits(head or embeddings),
        kv=bits(kv),
        compute=compute,
    )
