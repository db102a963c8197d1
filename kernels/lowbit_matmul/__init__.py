"""Linear layers on weights of few bits: packed once for a device and dtype, called many times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from compress.core.progress import say
from compress.kernels.lowbit_matmul import cpu
from compress.kernels.lowbit_matmul.dense import DenseLinear
from compress.kernels.lowbit_matmul.weight import LinearWeight
from compress.kernels.workspace import Workspace

if TYPE_CHECKING:
    from compress.kernels.lowbit_matmul.triton import TritonLinear

__all__ = ["LinearWeight", "PackedLinear", "pack", "pack_for_triton"]


class PackedLinear(Protocol):
    """A linear layer in the layout of one implementation, which `kind` names.

    `bytes` is what a product with few rows of x reads.
    """

    bytes: int

    kind: str

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] in the dtype it was packed for -> [T, out] in that dtype, bias added."""
        ...


def pack(weight: LinearWeight, dtype: torch.dtype, device: torch.device) -> PackedLinear:
    """Choose an implementation for activations in `dtype` on `device`, and lay the weight out."""
    if device.type == "cpu":
        return cpu.pack(weight, dtype)
    return DenseLinear(weight, dtype, device)


def pack_for_triton(
    weight: LinearWeight,
    dtype: torch.dtype,
    device: torch.device,
    workspace: Workspace,
    silu_mul: bool = False,
) -> TritonLinear | DenseLinear:
    """Lay a weight out for a GPU: codes for the Triton kernels, floats for the vendor's library.

    Codes on a grid that the kernels do not take are de-quantized, which is said.  With `silu_mul`
    the weight is gate over up, and a TritonLinear's result silu(gate) * up.
    """
    from compress.kernels.lowbit_matmul.triton import TritonLinear, fits

    if weight.codes is not None:
        reason = fits(weight)
        if reason is None:
            return TritonLinear(weight, dtype, device, workspace, silu_mul)
        rows, columns = weight.shape
        say(f"A linear layer of {rows} x {columns} is de-quantized: {reason}")
    return DenseLinear(weight, dtype, device)
