"""Which shapes meet a target, which are ranked first, and latencies fitted to a few measured."""

from dataclasses import replace
from itertools import product

import pytest

from compress.prune.search import (
    AXES,
    alone,
    candidates,
    fit_latency,
    numbers_of,
    predicted,
    smallest,
    unalike,
    with_number,
)
from compress.prune.shape import Shape

SMOLLM2 = Shape(depth=30, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64)
MHA = Shape(depth=4, hidden=64, ffn=96, heads=8, kv_heads=8, head_dim=8)


def parameters(shape):
    """Of a Llama of 49,152 tokens with tied embeddings, by hand."""
    heads = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    block = heads + 3 * shape.hidden * shape.ffn + 2 * shape.hidden
    return 49152 * shape.hidden + shape.depth * block + shape.hidden


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        (SMOLLM2, "depth", list(range(30, 14, -1))),
        (SMOLLM2, "hidden", [576, 512, 448, 384, 320]),
        (SMOLLM2, "ffn", list(range(1536, 767, -32))),
        (SMOLLM2, "heads", [9, 6]),  # whole rows of heads on three KV heads
        (MHA, "heads", [8, 7, 6, 5, 4]),
        (replace(MHA, heads=1, kv_heads=1), "heads", [1]),
    ],
)
def test_what_an_axis_may_become(shape, axis, expected):
    assert numbers_of(shape, axis) == expected


def test_a_kv_head_goes_with_its_only_head():
    assert with_number(MHA, "heads", 5) == replace(MHA, heads=5, kv_heads=5)
    assert with_number(SMOLLM2, "heads", 6) == replace(SMOLLM2, heads=6)


@pytest.mark.parametrize(
    ("axis", "expected"), [("depth", 24), ("hidden", 448), ("ffn", 1216), ("heads", 6)]
)
def test_an_axis_alone(axis, expected):
    found = alone(SMOLLM2, axis)
    assert found == replace(SMOLLM2, **{axis: expected})
    assert alone(replace(MHA, heads=1, kv_heads=1), "heads") is None


@pytest.mark.parametrize("axes", [AXES, ("hidden", "ffn"), ("depth",)])
@pytest.mark.parametrize("limit", [100e6, 120e6])
def test_candidates_are_the_shapes_that_cannot_grow(axes, limit):
    """Against looking at every shape there is."""

    def fits(shape):
        return parameters(shape) <= limit

    numbers = [numbers_of(SMOLLM2, axis) for axis in axes]
    every = [replace(SMOLLM2, **dict(zip(axes, row, strict=True))) for row in product(*numbers)]
    fitting = [shape for shape in every if fits(shape)]

    def grown(shape):
        """Shapes with one axis a step larger."""
        for axis, choices in zip(axes, numbers, strict=True):
            place = choices.index(getattr(shape, axis))
            if place:
                yield replace(shape, **{axis: choices[place - 1]})

    expected = {shape for shape in fitting if not any(fits(large) for large in grown(shape))}
    assert expected
    assert set(candidates(SMOLLM2, fits, axes)) == expected


def test_no_candidate_where_nothing_fits():
    assert candidates(SMOLLM2, lambda shape: False, AXES) == []
    assert parameters(smallest(SMOLLM2, AXES)) < parameters(smallest(SMOLLM2, ["depth"]))


def test_losses_of_axes_add_up():
    losses = {"depth": (replace(SMOLLM2, depth=24), 0.9), "ffn": (replace(SMOLLM2, ffn=1024), 0.5)}
    assert predicted(SMOLLM2, SMOLLM2, 0.1, losses) == pytest.approx(0.1)
    # what was measured is predicted as measured
    assert predicted(losses["ffn"][0], SMOLLM2, 0.1, losses) == pytest.approx(0.5)
    both = replace(SMOLLM2, depth=24, ffn=1024)
    assert predicted(both, SMOLLM2, 0.1, losses) == pytest.approx(0.1 + 0.8 + 0.4)
    twice = replace(SMOLLM2, depth=18)
    assert predicted(twice, SMOLLM2, 0.1, losses) == pytest.approx(0.1 + 0.8 * 2**1.5)


def test_shapes_much_like_an_earlier_one_are_passed_over():
    near = replace(SMOLLM2, depth=28, ffn=1408)
    far = replace(SMOLLM2, depth=26)
    assert list(unalike([SMOLLM2, near, far, SMOLLM2], SMOLLM2)) == [SMOLLM2, far]


def test_latency_is_fitted_to_blocks_and_parameters():
    """Exactly, where times are of that kind; and never so that less of a shape takes longer."""
    shapes = [SMOLLM2, replace(SMOLLM2, depth=24), replace(SMOLLM2, ffn=1024)]

    def true(shape):
        return 0.05 * shape.depth + 3e-8 * parameters(shape)

    fitted = fit_latency([(shape, parameters(shape), true(shape)) for shape in shapes])
    other = replace(SMOLLM2, depth=20, hidden=448)
    assert fitted(other, parameters(other)) == pytest.approx(true(other))

    def strange(shape):  # more blocks are faster
        return 20 - 0.1 * shape.depth + 3e-8 * parameters(shape)

    for kind in (strange, lambda shape: 2.0 * shape.depth - 1e-8 * parameters(shape)):
        fitted = fit_latency([(shape, parameters(shape), kind(shape)) for shape in shapes])
        for small in (replace(SMOLLM2, depth=15), replace(SMOLLM2, ffn=768)):
            assert fitted(small, parameters(small)) <= fitted(SMOLLM2, parameters(SMOLLM2))
