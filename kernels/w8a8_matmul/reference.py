"""A linear layer that rounds its inputs too, token by token in plain PyTorch: what is right.

    s[t]       = max over i in P(t) of |x[t, i]| / largest,  and 1 where that is 0
    code[t, i] = round(x[t, i] / s[t]) for i in P(t), 0 elsewhere
    y[t, o]    = s[t] * scale[o] * sum over i in P(t) of code[t, i] * codes[o, i]
               + sum over i in F(t) of x[t, i] * scale[o] * codes[o, i]
               + sum over stored outlier columns i of x[t, i] * outlier_weight[o, i]  +  bias[o]

F(t) are the elements that exceed the threshold in this token, P(t) all columns but those and the
stored ones (InputRounding says which, and what largest is).  s and x / s are float32, since the
halves between two codes must fall to the same side everywhere; rounding is to even, in int8 to
[-128, 127], in fp8 to float8_e4m3fn within +-448.  All sums are in float64: those of codes are
exact.

Source: Dettmers et al., LLM.int8(), arXiv:2208.07339, sections 2.1 and 3; OCP 8-bit Floating Point
Specification, table 1 (E4M3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.lowbit_matmul.weight import MOST_FOUND, InputRounding, LinearWeight

INT8 = (-128, 127)
FP8_LARGEST = 448.0


@dataclass(frozen=True)
class RoundedToken:
    """One token's input after rounding.

    codes    float64 [in], whole numbers or those of float8_e4m3fn
    scale    float32, of a code
    found    the columns F(t), ascending
    surplus  elements that exceed the threshold and found no room
    """

    codes: Tensor
    scale: Tensor
    found: list[int]
    surplus: int


def round_token(x: Tensor, inputs: InputRounding) -> RoundedToken:
    """x [in], any float dtype."""
    x = x.float()
    rounded = torch.ones(len(x), dtype=torch.bool)
    if inputs.outlier_index is not None:
        rounded[inputs.outlier_index] = False
    exceeding: list[int] = []
    if inputs.threshold is not None:
        exceeding = (rounded & (x.abs() >= inputs.threshold)).nonzero().flatten().tolist()
    found = exceeding[:MOST_FOUND]
    rounded[found] = False
    values = x[rounded]
    largest = values.abs().max() if len(values) else torch.tensor(0.0)
    scale = largest / inputs.largest
    if scale == 0:
        scale = torch.tensor(1.0)
    codes = torch.zeros(len(x), dtype=torch.float64)
    if inputs.kind == "int8":
        codes[rounded] = (values / scale).round().clamp(*INT8).double()
    else:
        within = (values / scale).clamp(-FP8_LARGEST, FP8_LARGEST)
        codes[rounded] = within.to(torch.float8_e4m3fn).double()
    return RoundedToken(codes, scale, found, len(exceeding) - len(found))


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x [T, in], any float dtype -> float64 [T, out]."""
    inputs, scale = weight.inputs, weight.scale
    assert inputs is not None
    assert scale is not None
    assert weight.codes is not None
    codes = weight.codes.double()
    rows = []
    for token in x:
        rounded = round_token(token, inputs)
        exact = token.double()
        row = rounded.scale.double() * (codes @ rounded.codes)
        row += codes[:, rounded.found] @ exact[rounded.found]
        row *= scale.double().squeeze(1)
        if inputs.outlier_index is not None:
            assert inputs.outlier_weight is not None
            row += inputs.outlier_weight.double() @ exact[inputs.outlier_index]
        rows.append(row if weight.bias is None else row + weight.bias.double())
    return torch.stack(rows) if rows else torch.zeros(0, weight.shape[0], dtype=torch.float64)
