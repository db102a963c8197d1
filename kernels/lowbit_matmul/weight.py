"""A linear layer as the runtime holds it: dense, or integer codes on a grid.

    y = x Wᵀ + bias,    W dense, or  W[o, i] = codes[o, i] * scale[o, i // G] + shift[o, i // G]

Every integer format of a checkpoint becomes this one form: shift = offset - zero_point * scale.
Where inputs are rounded too (`InputRounding`), x is what is left of it after that.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_FOUND = 32  # elements of a token that `InputRounding.threshold` takes out
CHUNK_ELEMENTS = 1 << 22  # de-quantized at a time, so that float32 is never a second whole copy


@dataclass(frozen=True)
class InputRounding:
    """How a linear layer rounds its input before the product, each token by itself.

        x[t, i] ≈ code[t, i] * s[t],    s[t] = max over i of |x[t, i]| / largest

    kind            "int8": codes are integers, clamped to [-128, 127]; "fp8": float8_e4m3fn
    largest         the code of a token's largest |x|: 127 in bitsandbytes, 127.5 in
                    compressed-tensors' integers, 448 in float8_e4m3fn
    outlier_index   int64 [k], ascending, or None: columns that are not rounded (LLM.int8,
                    arXiv:2208.07339).  They count neither for s[t] nor in the product of codes
    outlier_weight  [out, k] in a float dtype: the weights that these columns are multiplied with
    threshold       elements outside `outlier_index` with |x| at or above it are not rounded either:
                    they are multiplied with the de-quantized weight.  None: there are none

    A token has room for MOST_FOUND such elements, those of the lowest columns; any more are
    surplus: they are rounded with the others, and counted.  What is found in one token says
    nothing of the others, so a row of y does not depend on its batch.  bitsandbytes leaves a column
    in 16 bits for all tokens once one of them exceeds the threshold there, which is the same
    wherever a token is asked for alone.
    """

    kind: Literal["int8", "fp8"]
    largest: float
    outlier_index: Tensor | None = None
    outlier_weight: Tensor | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class LinearWeight:
    """Weight [out, in] of a linear layer, and its bias.  Either `dense` or `codes` is there.

    dense       [out, in], any float dtype
    codes       int8 [out, in], signed, in [-2^(bits-1), 2^(bits-1) - 1]; or float8_e4m3fn, if
                inputs are rounded to that
    scale       float32 [out, in / group_size]; may be negative
    shift       float32 [out, in / group_size], or None where it is zero everywhere
    group_size  input columns that share a scale; divides `in` (`in` itself when dense)
    bits        of a code; of an element when dense
    bias        float32 [out], or None
    inputs      how inputs are rounded, or None: they are not.  With it there is one scale a row,
                and no shift
    """

    dense: Tensor | None
    codes: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    group_size: int
    bits: int
    bias: Tensor | None = None
    inputs: InputRounding | None = None

    @classmethod
    def of_dense(cls, weight: Tensor, bias: Tensor | None = None) -> "LinearWeight":
        """A weight [out, in] in a float dtype, without copying it."""
        bits = 8 * weight.element_size()
        return cls(weight, None, None, None, weight.shape[1], bits, bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        stored = self.codes if self.dense is None else self.dense
        assert stored is not None
        return stored.shape[0], stored.shape[1]

    def with_rows(self, order: Tensor, factor: Tensor | None = None) -> "LinearWeight":
        """The rows of this weight that `order` names, in its order.

        order   int64 [out'], rows of this weight
        factor  float32 [out'], powers of two that they are multiplied with; None for 1
        """

        def taken(tensor: Tensor | None, scaled: bool = True) -> Tensor | None:
            if tensor is None:
                return None
            part = tensor[order]
            if factor is None or not scaled:
                return part
            return part * factor.to(part.dtype).view(-1, *[1] * (part.dim() - 1))

        inputs = self.inputs
        if inputs is not None:
            inputs = replace(inputs, outlier_weight=taken(inputs.outlier_weight))
        return replace(
            self,
            dense=taken(self.dense),
            codes=taken(self.codes, scaled=False),
            scale=taken(self.scale),
            shift=taken(self.shift),
            bias=taken(self.bias),
            inputs=inputs,
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`: computed in float32, rounded once.

        A dense weight that is in `dtype` already is returned itself.  Outlier columns of `inputs`
        are those of `outlier_weight`.
        """
        if self.dense is not None:
            return self.dense.to(dtype)
        assert self.codes is not None
        assert self.scale is not None
        rows, columns = self.shape
        weight = torch.empty(rows, columns, dtype=dtype, device=self.codes.device)
        step = max(1, CHUNK_ELEMENTS // columns)
        for start in range(0, rows, step):
            run = slice(start, start + step)
            part = self.codes[run].float().view(-1, columns // self.group_size, self.group_size)
            part *= self.scale[run].unsqueeze(-1)
            if self.shift is not None:
                part += self.shift[run].unsqueeze(-1)
            weight[run] = part.view(-1, columns)
        if self.inputs is not None and self.inputs.outlier_index is not None:
            assert self.inputs.outlier_weight is not None
            weight[:, self.inputs.outlier_index] = self.inputs.outlier_weight.to(dtype)
        return weight


def least_exact(tensors: list[Tensor]) -> torch.dtype:
    """The first of SCALE_DTYPES that holds all numbers of some float32 tensors."""
    return next(
        dtype
        for dtype in SCALE_DTYPES
        if all(torch.equal(tensor.to(dtype).float(), tensor.float()) for tensor in tensors)
    )
