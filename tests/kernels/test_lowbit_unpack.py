"""The inline assembly that unpacks codes, run by a small evaluator of PTX on all words.

Triton's interpreter cannot run it, and without a GPU nothing else does.
"""

import re

import numpy as np
import pytest

from compress.kernels.lowbit_matmul.unpack import assembly, codes_of

HIGH_BITS = (2, 4, 6, 8, 0, 10, 12, 14, 3, 5, 7, 9, 1, 11, 13, 15)
WORDS = np.arange(1 << 16, dtype=np.uint32)
OTHERS = np.random.default_rng(0).permutation(WORDS)  # in the other halves of registers


def to_float(halves, dtype):
    """16 bits as uint32 -> float64."""
    if dtype == "fp16":
        return halves.astype(np.uint16).view(np.float16).astype(np.float64)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def from_float(values, dtype):
    """float64 -> 16 bits as uint32; only numbers that bfloat16 holds may be made one."""
    if dtype == "fp16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    bits = values.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return bits >> np.uint32(16)


def halves(register):
    return register & np.uint32(0xFFFF), register >> np.uint32(16)


def evaluate(text, inputs):
    """What a block of PTX leaves in $0, given $1, $2 ... as arrays of uint32."""
    registers = {f"${n}": value for n, value in enumerate(inputs, start=1)}
    body = re.fullmatch(r"\{ \.reg \.b32 ([a-z, ]+); (.*) \}", text)
    assert body
    names = set(body[1].split(", ")) | {"$0"}

    def value(operand):
        return registers[operand] if operand in registers else np.uint32(int(operand, 0))

    for line in body[2].rstrip(";").split(";"):
        operation, to, *operands = re.split(r"[ ,]+", line.strip())
        assert to in names
        a, *more = [value(operand) for operand in operands]
        match operation:
            case "mov.b32":
                result = a
            case "shr.u32":
                result = a >> more[0]
            case "shl.b32":
                result = a << more[0]
            case "lop3.b32":
                b, c, table = more
                result = np.zeros_like(WORDS)
                for n in range(8):  # the bits of a, b and c are an index into the table
                    if int(table) >> n & 1:
                        parts = zip((a, b, c), (n & 4, n & 2, n & 1), strict=True)
                        x, y, z = (part if chosen else ~part for part, chosen in parts)
                        result = result | (x & y & z)
            case "fma.rn.f16x2" | "fma.rn.bf16x2":
                dtype = "bf16" if "bf16" in operation else "fp16"
                low, high = (
                    from_float(x * y + z, dtype)  # exact in float64: 11 bits each
                    for x, y, z in zip(
                        *([to_float(half, dtype) for half in halves(r)] for r in (a, *more)),
                        strict=True,
                    )
                )
                result = low | high << np.uint32(16)
            case _:
                raise AssertionError(operation)
        registers[to] = result
    return registers["$0"]


def expected(bits, i, word, third):
    """The formula of unpack.py in integers."""
    if bits == 3:
        u = (word >> np.uint32(2 * (i % 8))) & 3 | (third >> np.uint32(HIGH_BITS[i]) & 1) << 2
    else:
        u = (word >> np.uint32(bits * i)) & ((1 << bits) - 1)
    return u.astype(np.int64) - (1 << (bits - 1))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("bits", "i"), [(bits, i) for bits in (2, 3, 4, 8) for i in range(codes_of(bits))]
)
def test_every_word_becomes_its_code(bits, i, dtype):
    """Both halves of a register, with every word beside another; for 3 bits every word with another
    as the third, and every third word."""
    text = assembly(bits, i, dtype)
    assert ("$2" in text) == (bits == 3)
    for first, third in ((WORDS, OTHERS[::-1]), (OTHERS, WORDS)):
        registers = [word | np.roll(word, 1) << np.uint32(16) for word in (first, third)]
        found = evaluate(text, registers)
        for half, shift in zip(halves(found), (0, 1), strict=True):
            word, other = (np.roll(part, shift) for part in (first, third))
            assert np.array_equal(to_float(half, dtype), expected(bits, i, word, other))


def test_the_evaluator_knows_its_tables():
    """lop3 by the definition of its table: 0xEA is a & b | c, 0xAE is ~a & b | c."""
    a, b, c = WORDS, OTHERS, OTHERS[::-1]
    for table, by_hand in (("0xEA", a & b | c), ("0xAE", ~a & b | c)):
        text = f"{{ .reg .b32 t, h; lop3.b32 $0, $1, $2, $3, {table}; }}"
        assert np.array_equal(evaluate(text, [a, b, c]), by_hand)
