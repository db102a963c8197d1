"""Linear layers on weights in the dtype of the activations, by PyTorch, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.lowbit_matmul.weight import LinearWeight


class DenseLinear:
    """A weight that is de-quantized once, in the dtype of the activations."""

    kind = "dense"

    def __init__(
        self, weight: LinearWeight, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self._weight = weight.dequantize(dtype).to(device)
        self._bias = None if weight.bias is None else weight.bias.to(device, dtype)
        self.bytes = self._weight.nbytes

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [T, in] -> [T, out] in the dtype of x, or then cast to `out_dtype`."""
        return F.linear(x, self._weight, self._bias).to(out_dtype or x.dtype)
