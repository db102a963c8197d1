"""What a target of bits may choose from."""

import pytest

from compress.core.errors import InputError
from compress.quant.choices import choices_of
from compress.quant.config import Grid
from compress.quant.gptq import GptqConfig

SHAPES = {
    f"model.layers.{block}.{name}": shape
    for block in range(2)
    for name, shape in {
        "self_attn.q_proj": (128, 128),
        "self_attn.k_proj": (64, 128),
        "self_attn.v_proj": (64, 128),
        "self_attn.o_proj": (128, 128),
        "mlp.gate_proj": (192, 128),
        "mlp.up_proj": (192, 128),
        "mlp.down_proj": (128, 192),
    }.items()
}


def stored(grid: Grid, shape: tuple[int, int]) -> int:
    """Bytes with 16-bit scales, and zero points of as many bits as codes."""
    rows, columns = shape
    groups = columns // (grid.group_size or columns)
    per_group = 16 + (0 if grid.symmetric else grid.bits)
    return rows * (columns * grid.bits + groups * per_group) // 8


def choices(**settings):
    return choices_of(GptqConfig(**{"target_bits": 4.75} | settings), SHAPES, stored)


def test_what_loaders_join_is_one_group():
    found = choices()
    short = [[name.rpartition(".")[2] for name in group.linears] for group in found.groups]
    kinds = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert short == kinds * 2
    assert found.groups[0].linears[0] == "model.layers.0.self_attn.q_proj"
    assert found.parameters == sum(rows * columns for rows, columns in SHAPES.values())
    for group in found.groups:
        for option, size in zip(group.options, group.bytes, strict=True):
            assert len(set(option.values())) == 1
            assert size == sum(stored(grid, SHAPES[name]) for name, grid in option.items())


def test_group_sizes_that_come_to_the_same_count_once():
    """128 divides no width of 192 and becomes 64 for all, as in a recipe that asks for it."""
    found = choices()
    sizes = {
        (g.bits, g.group_size) for group in found.groups for o in group.options for g in o.values()
    }
    assert sizes == {(bits, size) for bits in (2, 3, 4, 8) for size in (32, 64)}
    assert all(len(group.options) == 8 for group in found.groups)
    assert found.uniform == tuple((number,) * 8 for number in range(8))
    assert found.grids(found.uniform[2])["model.layers.1.mlp.up_proj"] == Grid(3, 32)


def test_budget_is_in_bytes_of_all_groups():
    found = choices(target_bits=4.25)
    uniform = next(n for n in found.uniform if found.grids(n)[next(iter(SHAPES))] == Grid(4, 64))
    taken = sum(group.bytes[number] for group, number in zip(found.groups, uniform, strict=True))
    assert taken == found.budget  # 4 bits and 16 for each 64


def test_ignored_linears_are_no_choice_and_overridden_ones_are_fixed():
    found = choices(ignore=("down_proj",), overrides={"v_proj": {"bits": 8}})
    names = {name for group in found.groups for name in group.linears}
    assert names == {name for name in SHAPES if "down" not in name}
    for option in found.groups[0].options:
        by_leaf = {name.rpartition(".")[2]: grid for name, grid in option.items()}
        assert by_leaf["v_proj"].bits == 8
        assert by_leaf["q_proj"] == by_leaf["k_proj"]
    assert {o["model.layers.0.self_attn.q_proj"].bits for o in found.groups[0].options} == {
        2,
        3,
        4,
        8,
    }
    assert found.parameters == sum(SHAPES[name][0] * SHAPES[name][1] for name in names)


def test_narrower_choices():
    found = choices(choose_bits=(4, 8), choose_group_sizes=(None, 64), symmetric=False)
    grids = {grid for group in found.groups for o in group.options for grid in o.values()}
    assert grids == {Grid(bits, size, False) for bits in (4, 8) for size in (None, 64)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_bits": 2.2}, "target_bits 2.2 is out of reach: the choices take 2.250 to 8.500"),
        ({"target_bits": 9.0}, "out of reach: the choices take 2.250 to 8.500 bits a weight"),
        ({"choose_bits": (4,), "target_bits": 4.2}, "choices take 4.250 to 4.500.*choose_bits"),
        ({"format": "awq"}, "target_bits mixes grids, and format awq cannot hold .*group size is"),
        ({"format": "awq", "choose_bits": (3,)}, "format awq cannot hold .*has 4 bits, not 3"),
        ({"ignore": ("re:.*",)}, "no linear is left to quantize"),
        ({"overrides": {"q_porj": {"bits": 8}}}, "did you mean 'q_proj'"),
    ],
)
def test_what_cannot_be_met_is_refused_in_one_line(settings, message):
    with pytest.raises(InputError, match=message) as refused:
        choices(**settings)
    assert "\n" not in str(refused.value)


def test_a_format_leaves_out_what_it_cannot_hold():
    """GPTQ packs 3 bits in words of 32 rows: 80 inputs are no whole words."""
    shapes = {"layers.0.down_proj": (64, 80), "layers.0.o_proj": (64, 64)}
    config = GptqConfig(target_bits=5, format="gptq", choose_group_sizes=(16,))
    found = choices_of(config, shapes, stored)
    bits = [{o[n].bits for o in group.options for n in group.linears} for group in found.groups]
    assert bits == [{2, 4, 8}, {2, 3, 4, 8}]
    assert len(found.uniform) == 3
