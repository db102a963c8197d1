"""Codes out of 16-bit words: where they are, and inline assembly that turns them into numbers.

A tile has `planes(bits)` words at each place and `codes_of(bits)` codes in them.  Codes are stored
unsigned, u = code + 2^(bits-1), so that 0 <= u < 2^bits.  Code i is, of words w,

    2, 4, 8 bits    u_i = (w[0] >> bits * i) & (2^bits - 1)
    3 bits          u_i = (w[i // 8] >> 2 * (i % 8)) & 3 | ((w[2] >> high_bit(i)) & 1) << 2

The assembly works on one 32-bit register of two words, of neighbouring places or any other two:
each half becomes one float of 16 bits, and neither looks at the other.  A code that is OR-ed into
the mantissa of a power of two, p bits from its end, makes the number 1024 + u * 2^p in float16 (10
bits of mantissa) and 128 + u * 2^p in bfloat16 (7 bits), and one fma takes that to
code = u - 2^(bits-1) exactly.  As long as the field lies inside the mantissa no shift is needed,
so that the fields of a word share few shifts (which the compiler finds out: equal shifts are one
instruction).  Codes of 8 bits do not fit into bfloat16's mantissa; there u = low + 128 * top, and
the code is the difference of 128 + low and (128 if top else 256).

Source of OR-ing into the mantissa: Kim et al., Who Says Elephants Can't Run: Bringing Large Scale
MoE Models into Cloud Scale Production, 2022, arXiv:2211.10017, section 3.
"""

from __future__ import annotations

from triton import constexpr_function

# All are constexpr functions and use no global values: then a kernel's cache depends on their
# source, and its launch has nothing to compare.


@constexpr_function
def planes(bits: int) -> int:
    """Words at each place of a tile."""
    return 3 if bits == 3 else 1


@constexpr_function
def codes_of(bits: int) -> int:
    """Codes in the words of one place."""
    return 16 * planes(bits) // bits


@constexpr_function
def low_bits(bits: int) -> int:
    """Bits of a code that lie together."""
    return 2 if bits == 3 else bits


@constexpr_function
def low_word(bits: int, i: int) -> int:
    """The word that holds the low bits of code i."""
    return i // 8 if bits == 3 else 0


@constexpr_function
def low_shift(bits: int, i: int) -> int:
    """Where they begin in it."""
    return low_bits(bits) * (i % (16 // low_bits(bits)))


@constexpr_function
def high_bit(i: int) -> int:
    """Bit of the third word that is the highest bit of code i, for codes of 3 bits.

    Most are where the low bits need them, or equally far from there.
    """
    return (2, 4, 6, 8, 0, 10, 12, 14, 3, 5, 7, 9, 1, 11, 13, 15)[i]


@constexpr_function
def assembly(bits: int, i: int, dtype: str) -> str:
    """PTX for code i: $0 = two floats of `dtype`, $1 = two words; $2 = two third words (3 bits).

    Uses `shr.u32`, `shl.b32`, `lop3.b32`, `fma.rn.f16x2` and `fma.rn.bf16x2` (sm_80 and newer).
    """
    bias, mantissa = (15, 10) if dtype == "fp16" else (127, 7)
    magic = _twice((bias + mantissa) << mantissa)  # 2^mantissa
    if bits > mantissa:
        return _block(
            [
                _moved("t", "$1", 8 * i),
                f"lop3.b32 h, t, {_twice(0x80)}, {magic}, 0xAE;",  # ~t & 0x80 | magic
                f"lop3.b32 t, t, {_twice(0x7F)}, {magic}, 0xEA;",
                f"mov.b32 a, {_twice(0xBF80)};",  # -1
                "fma.rn.bf16x2 $0, h, a, t;",
            ]
        )
    low = low_bits(bits)
    together = (mantissa - bits) // low + 1  # fields that one shift brings into the mantissa
    place = low_shift(bits, i) % (together * low)
    lines = [
        _moved("t", "$1", low_shift(bits, i) - place),
        f"lop3.b32 t, t, {_twice(((1 << low) - 1) << place)}, {magic}, 0xEA;",  # t & mask | magic
    ]
    if bits == 3:
        lines.append(_moved("h", "$2", high_bit(i) - place - 2))
        lines.append(f"lop3.b32 t, h, {_twice(1 << (place + 2))}, t, 0xEA;")
    factor = (bias - place) << mantissa  # 2^-place
    offset = (  # -(2^mantissa * 2^-place + 2^(bits-1))
        0x8000 | (bias + mantissa - place) << mantissa | 1 << (bits - 1 + place)
    )
    lines.append(f"mov.b32 a, {_twice(factor)};")
    lines.append(f"mov.b32 b, {_twice(offset)};")
    lines.append(f"fma.rn.{'f16x2' if dtype == 'fp16' else 'bf16x2'} $0, t, a, b;")
    return _block(lines)


@constexpr_function
def _moved(to: str, source: str, by: int) -> str:
    if by > 0:
        return f"shr.u32 {to}, {source}, {by};"
    return f"shl.b32 {to}, {source}, {-by};" if by < 0 else f"mov.b32 {to}, {source};"


@constexpr_function
def _twice(half: int) -> str:
    return f"{half | half << 16:#010x}"


@constexpr_function
def _block(lines: list[str]) -> str:
    return "{ .reg .b32 t, h, a, b; " + " ".join(lines) + " }"
