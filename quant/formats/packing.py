"""Dense packing of codes into 32-bit words, which all three checkpoint formats share.

Code k of a row occupies bits k*b to k*b + b - 1 of that row's bit stream, least significant first;
the stream is cut into int32 words.  A code is stored unsigned, as code + 2^(b-1).
"""

import torch
from torch import Tensor

CODES_AT_ONCE = 1 << 20  # each takes some 30 bytes while it is packed


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes, int8 [rows, n], densely along the last dimension.

    Returns int32 [rows, ceil(n * bits / 32)].  Any width from 1 to 8 bits; codes of 3, 5, 6 and
    7 bits cross word boundaries.
    """
    rows = max(1, CODES_AT_ONCE // max(1, codes.shape[1]))
    if len(codes) > rows:
        return torch.cat([pack_int32(part, bits) for part in codes.split(rows)])
    rows, n = codes.shape
    words = -(-n * bits // 32)
    start = torch.arange(n, device=codes.device) * bits
    word, shift = start // 32, start % 32
    unsigned = codes.to(torch.int64) + (1 << (bits - 1))
    shifted = unsigned << shift  # up to 40 bits: what passes bit 32 belongs to the next word
    packed = torch.zeros(rows, words + 1, dtype=torch.int64, device=codes.device)
    packed.index_add_(1, word, shifted & 0xFFFFFFFF)
    packed.index_add_(1, word + 1, shifted >> 32)
    packed = packed[:, :words]
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack_int32(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_int32`: int32 [rows, words] -> signed codes int8 [rows, n]."""
    words = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    start = torch.arange(n, device=packed.device) * bits
    word, shift = start // 32, start % 32
    pairs = words[:, word] | (words[:, word + 1] << 32)
    unsigned = (pairs >> shift) & ((1 << bits) - 1)
    return (unsigned - (1 << (bits - 1))).to(torch.int8)
