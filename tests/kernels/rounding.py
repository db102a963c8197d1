"""Weights and activations for tests of linear layers that round their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.lowbit_matmul.weight import InputRounding

KINDS = ("int8", "w8a8", "llm.int8", "fp8")
THRESHOLD = 3.5


def rounding_weight(
    kind: str, rows: int, columns: int, bias: bool = False, outliers: int = 3
) -> LinearWeight:
    """Random codes over the whole range, scales so that W is around 1 in size.

    "int8" is LLM.int8 without outliers and "llm.int8" with some of both kinds; "w8a8" has
    compressed-tensors' range.
    """
    generator = torch.Generator().manual_seed(rows + 10 * columns)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "fp8":
        codes, unit = (100 * normal).clamp(-448, 448).to(torch.float8_e4m3fn), 100
        inputs = InputRounding("fp8", 448.0)
    else:
        codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
        unit = 74  # root mean square of such codes
        inputs = InputRounding("int8", 127.5 if kind == "w8a8" else 127.0)
    if kind == "llm.int8":
        index = torch.randperm(columns, generator=generator)[:outliers].sort().values
        stored = torch.randn(rows, outliers, generator=generator).half()
        inputs = InputRounding("int8", 127.0, index, stored, THRESHOLD)
    scale = (0.5 + torch.rand(rows, 1, generator=generator)) / unit
    return LinearWeight(
        None, codes, scale, None, columns, 8,
        torch.randn(rows, generator=generator) if bias else None, inputs,
    )  # fmt: skip


def outlying(tokens: int, columns: int, seed: int = 1) -> Tensor:
    """Inputs float32 [tokens, columns] of all that can happen to a token.

    Of eight in turn the first is ordinary (a few elements over THRESHOLD), the second has one
    element of 60, the third 40 of them, the fourth is zero, the fifth tiny.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x[1::8, columns // 2] = 60.0
    x[2::8, : min(40, columns)] *= 20
    x[3::8] = 0
    x[4::8] *= 1e-6
    return x


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()
