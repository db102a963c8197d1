"""Attention by head: how RoPE pairs channels, found by experiment."""

import pytest
import torch

from compress.convert_preflight import TRIED_TOKENS, preflight
from compress.core.errors import InputError
from compress.prune.attention import AttentionWeights, Pairs
from compress.recipe import build_conversion

HALVES = [(0, 4), (1, 5), (2, 6), (3, 7)]
NEIGHBOURS = [(0, 1), (2, 3), (4, 5), (6, 7)]
PAIRS = {  # of heads of 8 channels
    "llama": HALVES,
    "qwen2": HALVES,
    "cohere": NEIGHBOURS,
    "stablelm": [(0, 1), *NEIGHBOURS[1:]],  # of which a quarter is turned
}


@pytest.mark.parametrize("family", PAIRS)
def test_pairs_are_found(family, stage_values):
    stage = preflight(build_conversion(stage_values(family, to="gqa", kv_heads=1))).stage
    assert stage.turns
    found = zip(stage.pairs.real.tolist(), stage.pairs.imaginary.tolist(), strict=True)
    assert list(found) == PAIRS[family]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_norms_on_keys_allow_no_rotation(family, stage_values):
    assert not preflight(build_conversion(stage_values(family, to="gqa", kv_heads=1))).stage.turns


def test_complex_and_real():
    pairs = Pairs(torch.tensor([2, 0]), torch.tensor([1, 3]))
    heads = torch.randn(5, 4, 3, dtype=torch.float64)
    found = pairs.to_complex(heads)
    assert torch.equal(found[:, 0], torch.complex(heads[:, 2], heads[:, 1]))
    assert torch.equal(pairs.to_real(found), heads)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_weights_come_back(family, one_block):
    """With biases and without."""
    from compress.prune.parts import parts_of

    module = one_block(family)[0].module
    parts = parts_of(module, family)
    found = AttentionWeights.of(module, parts, 8).tensors(parts)
    own = {name: value for name, value in module.state_dict().items() if parts.attention in name}
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], value) for name, value in own.items())
    assert TRIED_TOKENS > 8  # so that positions differ by more than a few


def test_other_parts_are_refused(stage_values):
    with pytest.raises(InputError, match="known are attention of"):
        preflight(build_conversion(stage_values("phi3", to="gqa", kv_heads=1)))
