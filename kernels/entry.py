"""One specialisation of a Triton kernel: what is compiled ahead of time, and what is launched.

Each operation's `triton.py` has `entries(capability)`, all that its dispatch can choose.
`compress.kernels.ahead_of_time` compiles them without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from triton import knobs

# Products and sums are fused, as up to Triton 3.9 by default: one instruction less a scale.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

INTERPRETED: bool = knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter: on the CPU, slowly, without inline assembly."""


@dataclass(frozen=True)
class Entry:
    """A kernel, the types of its arguments, and its compile-time constants.

    name        for people and for the cache, such as "lowbit_matmul w4 g128 fp16 rows16"
    types       argument -> Triton's name of its type ("*fp16", "*i32", "i32", "fp32"); those that
                are compile-time constants are in `constants` and not here
    aligned     arguments whose value, or address, is a multiple of 16, as a launch would find out;
                all pointers where it is None
    """

    name: str
    kernel: triton.JITFunction[Any]
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: frozenset[str] | None = field(default=None)
