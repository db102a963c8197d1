"""Which grid each linear gets."""

import pytest

from compress.core.errors import InputError
from compress.quant.config import Grid, matches, settle_grids
from compress.quant.rtn import RtnConfig

WIDTHS = {
    "layers.0.q_proj": 576,
    "layers.0.down_proj": 1536,
    "layers.1.q_proj": 576,
    "layers.1.down_proj": 1536,
}


def test_one_grid_for_all():
    grids, remarks = settle_grids(RtnConfig(bits=3, group_size=64), WIDTHS)
    assert grids == dict.fromkeys(WIDTHS, Grid(3, 64))
    assert not remarks


def test_group_size_is_halved_until_it_divides_all_widths():
    grids, remarks = settle_grids(RtnConfig(), WIDTHS)
    assert {grid.group_size for grid in grids.values()} == {64}
    assert remarks == [
        "Group size 128 does not divide all widths: using 64 for width 576, 64 for width 1536"
    ]


def test_where_halving_leaves_too_little_each_width_gets_its_largest_divisor():
    """stories260K: widths 64 and 172 = 4 x 43."""
    grids, remarks = settle_grids(RtnConfig(group_size=64), {"a.up": 64, "a.down": 172})
    assert grids == {"a.up": Grid(4, 64), "a.down": Grid(4, 43)}
    assert len(remarks) == 1


def test_an_odd_group_size_that_does_not_divide_gives_way_too():
    grids, remarks = settle_grids(RtnConfig(group_size=5), {"a": 48, "b": 80})
    assert [grid.group_size for grid in grids.values()] == [4, 5]
    assert len(remarks) == 1


def test_group_sizes_and_channels_that_divide_stay():
    assert settle_grids(RtnConfig(group_size=96), WIDTHS)[0]["layers.0.q_proj"].group_size == 96
    assert settle_grids(RtnConfig(group_size=8), WIDTHS)[0]["layers.0.q_proj"].group_size == 8
    grids, remarks = settle_grids(RtnConfig(group_size="channel"), {"a": 7})
    assert grids == {"a": Grid(4, None)}
    assert not remarks


def test_overrides_and_ignore():
    config = RtnConfig(
        group_size=64,
        ignore=("re:layers\\.1\\.q.*",),
        overrides={"down_proj": {"bits": 8}, "layers.1.down_proj": {"group_size": 32}},
    )
    grids, _ = settle_grids(config, WIDTHS)
    assert grids == {
        "layers.0.q_proj": Grid(4, 64),
        "layers.0.down_proj": Grid(8, 64),
        "layers.1.down_proj": Grid(8, 32),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ignore": ("dwn_proj",)}, "'dwn_proj' names no linear.*did you mean 'down_proj'"),
        ({"overrides": {"head": {"bits": 8}}}, "'head' names no linear"),
        ({"overrides": {"q_proj": {"bit": 8}}}, "unknown key 'bit'.*did you mean 'bits'"),
        ({"overrides": {"q_proj": {"bits": 5}}}, "bits"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        settle_grids(RtnConfig(**settings), WIDTHS)


def test_patterns():
    name = "model.layers.1.mlp.down_proj"
    assert matches(name, "down_proj")
    assert matches(name, "mlp.down_proj")
    assert matches(name, "re:.*layers\\.1\\..*")
    assert matches(name, name)
    assert not any(matches(name, pattern) for pattern in ("own_proj", "up_proj", "re:down"))
