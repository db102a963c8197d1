"""GGUF's plain block types: Q4_0, Q4_1 and Q8_0.

A row of a weight [out, in] is in / 32 blocks, one after the other; 16-bit floats are little-endian:

    Q4_0  18 bytes: float16 d, 16 bytes of nibbles q       w = (q - 8) * d
    Q4_1  20 bytes: float16 d, float16 m, 16 bytes of q    w = q * d + m
    Q8_0  34 bytes: float16 d, 32 int8 q                   w = q * d

Byte j of the nibbles holds weight j in its low half and weight j + 16 in its high half.  Scales and
offsets are kept in float32, which is what ggml de-quantizes in.

Definition: ggml, src/ggml-common.h (block_q4_0, block_q4_1, block_q8_0), and gguf-py,
gguf/quants.py, https://github.com/ggml-org/llama.cpp.
"""

import torch
from torch import Tensor

from compress.quant.weight import QuantizedWeight

GROUP = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def unpack_blocks(data: Tensor, kind: str) -> QuantizedWeight:
    """Read a weight from uint8 [out, in / 32 * block bytes]; `kind` is a key of BLOCK_BYTES."""
    rows = data.shape[0]
    blocks = data.view(rows, -1, BLOCK_BYTES[kind])  # [out, groups, bytes]
    scale, rest = _float16(blocks[..., :2]), blocks[..., 2:]
    if kind == "Q8_0":
        codes = rest.contiguous().view(torch.int8).reshape(rows, -1)
        return QuantizedWeight(codes, scale, None, 8, GROUP)
    offset = zero_point = None
    if kind == "Q4_1":
        offset, rest = _float16(rest[..., :2]), rest[..., 2:]
        zero_point = torch.full(scale.shape, -8, dtype=torch.int8)
    nibbles = torch.cat([rest & 15, rest >> 4], dim=-1)  # [out, groups, 32], 0 to 15
    codes = (nibbles.to(torch.int8) - 8).reshape(rows, -1)
    return QuantizedWeight(codes, scale, zero_point, 4, GROUP, offset)


def pack_blocks(weight: QuantizedWeight, kind: str) -> Tensor:
    """The inverse of `unpack_blocks`."""
    rows = weight.shape[0]
    codes = weight.codes.view(rows, -1, GROUP)
    parts = [_bytes(weight.scale)]
    if kind == "Q8_0":
        parts.append(codes.view(torch.uint8))
    else:
        if weight.offset is not None:
            parts.append(_bytes(weight.offset))
        nibbles = (codes + 8).to(torch.uint8)
        parts.append(nibbles[..., :16] | nibbles[..., 16:] << 4)
    return torch.cat(parts, dim=-1).view(rows, -1)


def _float16(pairs: Tensor) -> Tensor:
    """Bytes [out, groups, 2] -> float32 [out, groups]."""
    return pairs.contiguous().view(torch.float16).squeeze(-1).float()


def _bytes(values: Tensor) -> Tensor:
    """float32 [out, groups] that hold float16 values -> bytes [out, groups, 2]."""
    return values.to(torch.float16).unsqueeze(-1).view(torch.uint8)
