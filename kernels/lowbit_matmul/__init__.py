"""Linear layers on weights of few bits: packed once for a device and dtype, called many times."""

from typing import Protocol

import torch
from torch import Tensor

from compress.kernels.lowbit_matmul import cpu
from compress.kernels.lowbit_matmul.weight import LinearWeight

__all__ = ["LinearWeight", "PackedLinear", "pack"]


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
    return cpu.DenseLinear(weight, dtype, device)
