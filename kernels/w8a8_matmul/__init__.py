"""Linear layers on 8-bit codes that round their inputs: LLM.int8, W8A8 and fp8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.kernels.lowbit_matmul.weight import LinearWeight
from compress.kernels.w8a8_matmul.cpu import RoundingLinear
from compress.kernels.workspace import Workspace

if TYPE_CHECKING:
    from compress.kernels.w8a8_matmul.triton import TritonRoundingLinear

__all__ = ["RoundingLinear", "check", "pack", "pack_for_triton"]

MOST_COLUMNS = (1 << 31) // (128 * 128) - 1  # whose products of int8 codes int32 can sum


def check(weight: LinearWeight) -> None:
    """InputError for a weight that no kernel here is right for."""
    assert weight.inputs is not None
    assert weight.codes is not None
    columns = weight.shape[1]
    if weight.inputs.kind == "int8" and columns > MOST_COLUMNS:
        raise InputError(
            f"a linear layer reads {columns:,} columns, and int8 activations are served with up to "
            f"{MOST_COLUMNS:,}; quantize its weights alone"
        )
    if weight.inputs.kind == "fp8" and (weight.codes.view(torch.uint8) & 0x7F == 0x7F).any():
        raise InputError(
            f"a linear layer of {weight.shape[0]} x {columns} in float8_e4m3fn holds NaN; its "
            "checkpoint is damaged: quantize the model again"
        )


def pack(
    weight: LinearWeight, dtype: torch.dtype, device: torch.device, surplus: Tensor
) -> RoundingLinear:
    """Lay a weight with `inputs` out for PyTorch's operations; RoundingLinear has the arguments."""
    check(weight)
    return RoundingLinear(weight, dtype, device, surplus)


def pack_for_triton(
    weight: LinearWeight,
    dtype: torch.dtype,
    device: torch.device,
    workspace: Workspace,
    surplus: Tensor,
    silu_mul: bool = False,
) -> TritonRoundingLinear:
    """Lay a weight with `inputs` out for the Triton kernels, on a GPU or in the interpreter."""
    from compress.kernels.w8a8_matmul.triton import TritonRoundingLinear

    check(weight)
    return TritonRoundingLinear(weight, dtype, device, workspace, surplus, silu_mul)
