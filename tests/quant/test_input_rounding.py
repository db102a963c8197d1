"""Rounded inputs, against the formula written out element by element."""

import pytest
import torch
from torch import nn

from compress.kernels.lowbit_matmul.weight import MOST_FOUND, InputRounding
from compress.quant.config import RoundedGrid
from compress.quant.input_rounding import round_inputs, round_inputs_of, rounding_of


def inputs(tokens=7, width=40, strong=()):
    x = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(0))
    for token, column, value in strong:
        x[:, token, column] = value
    return x


def by_hand(x, rounding):
    """One element after another; fp8 by the table of all its codes, even codes first in a tie."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.cat([codes[::2], codes[1::2]])
    table = codes.view(torch.float8_e4m3fn).float()
    table = table[table.isfinite()]
    index = [] if rounding.outlier_index is None else rounding.outlier_index.tolist()
    result = x.clone()
    for row in result.view(-1, x.shape[-1]):
        found = [
            i
            for i, value in enumerate(row.tolist())
            if i not in index and rounding.threshold and abs(value) >= rounding.threshold
        ]
        exact = {*index, *found[:MOST_FOUND]}
        others = [i for i in range(len(row)) if i not in exact]
        step = row[others].abs().max() / rounding.largest
        step = step if step else torch.tensor(1.0)
        for i in others:
            code = row[i] / step
            if rounding.kind == "int8":
                row[i] = step * min(127, max(-128, round(code.item())))
            else:
                row[i] = step * table[(table - code).abs().argmin()]
    return result


@pytest.mark.parametrize(
    "rounding",
    [
        InputRounding("int8", 127.0),
        InputRounding("int8", 127.5),
        InputRounding("fp8", 448.0),
        InputRounding("int8", 127.0, threshold=2.0),
        InputRounding("int8", 127.0, torch.tensor([3, 30]), torch.zeros(1, 2), threshold=2.0),
        InputRounding("int8", 127.0, torch.tensor([3, 30]), torch.zeros(1, 2)),
    ],
    ids=str,
)
def test_against_the_formula(rounding):
    x = inputs(strong=[(1, 3, 50.0), (2, 8, -9.0), (4, 30, 7.0)])
    x[:, 5] = 0
    rounded = round_inputs(x, rounding)
    # The same float32 operations in the same order, so the same bits: 127.5 is a tie, which any
    # other order would round to either side.
    assert torch.equal(rounded, by_hand(x, rounding))
    assert rounded.dtype == x.dtype


def test_what_is_over_the_capacity_is_rounded_with_the_rest():
    """The first are exact; the others count for the token's scale, and no other token changes."""
    rounding = InputRounding("int8", 127.0, threshold=6.0)
    x = inputs(tokens=3, width=80)
    x[0, 1, 10 : 10 + MOST_FOUND + 4] = 100.5 + torch.arange(MOST_FOUND + 4)
    rounded = round_inputs(x, rounding)
    last = 10 + MOST_FOUND
    assert torch.equal(rounded[0, 1, 10:last], x[0, 1, 10:last])
    step = x[0, 1].max() / 127
    assert not torch.equal(rounded[0, 1, last : last + 3], x[0, 1, last : last + 3])
    assert (rounded[0, 1] - x[0, 1]).abs().max() <= step / 2 * 1.001
    assert (rounded[0, 1, 50:] - x[0, 1, 50:]).abs().max() > 0.1 * step
    alone = round_inputs(x[0, 0], rounding)
    assert torch.equal(rounded[0, 0], alone)


def test_a_tokens_rounding_does_not_depend_on_the_batch():
    rounding = InputRounding("int8", 127.0, threshold=2.0)
    x = inputs(strong=[(0, 5, 30.0)])
    together = round_inputs(x, rounding)
    for index in range(x.shape[1]):
        assert torch.equal(
            together[:, index], round_inputs(x[:, index : index + 1], rounding)[:, 0]
        )


def test_largest_codes_are_those_of_the_formats():
    assert rounding_of(RoundedGrid(inputs="int8")).largest == 127.5
    assert rounding_of(RoundedGrid(inputs="fp8")).largest == 448
    vectorwise = rounding_of(RoundedGrid(inputs="int8", outlier_threshold=6.0))
    assert (vectorwise.largest, vectorwise.threshold) == (127, 6.0)
    assert rounding_of(RoundedGrid(inputs="int8", outlier_threshold=0.0)).threshold is None


def test_linears_round_before_they_multiply():
    model = nn.Sequential(nn.Linear(40, 5), nn.Linear(5, 3))
    x = inputs()
    rounding = InputRounding("int8", 127.0)
    expected = model[1](model[0](round_inputs(x, rounding)))
    round_inputs_of(model, {"0": rounding})
    assert torch.equal(model(x), expected)
