"""A linear layer on a quantized weight, in plain PyTorch: de-quantize, then multiply.

    y = x Wᵀ + bias          (see LinearWeight for W)

W is rounded to the dtype of x and products are summed by PyTorch's own matrix product.
"""

from torch import Tensor
from torch.nn import functional as F

from compress.kernels.lowbit_matmul.weight import LinearWeight


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x [T, in], any float dtype -> [T, out] in that dtype."""
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    return F.linear(x, weight.dequantize(x.dtype), bias)
