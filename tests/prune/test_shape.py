"""What can be asked of a shape, and the stock class that holds the answer."""

import pytest
from transformers import LlamaConfig, Qwen2Config

from compress.core.errors import InputError
from compress.prune.config import PruneConfig
from compress.prune.shape import Shape, pruned_shape
from compress.prune.stock import config_entries

SMOLLM2 = Shape(depth=30, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64)
MHA = Shape(depth=4, hidden=64, ffn=96, heads=8, kv_heads=8, head_dim=8)


@pytest.mark.parametrize(
    ("shape", "asked", "expected"),
    [
        (SMOLLM2, {"depth": 24}, (24, 576, 1536, 9, 3)),
        (SMOLLM2, {"layers_out": 6}, (24, 576, 1536, 9, 3)),
        (SMOLLM2, {"heads": 6}, (30, 576, 1536, 6, 3)),
        (SMOLLM2, {"heads": 6, "kv_heads": 2}, (30, 576, 1536, 6, 2)),
        (SMOLLM2, {"hidden": 512, "ffn": 1152}, (30, 512, 1152, 9, 3)),
        (MHA, {"heads": 6}, (4, 64, 96, 6, 6)),  # a KV head goes with its head
    ],
)
def test_shape_asked_for(shape, asked, expected):
    found = pruned_shape(shape, PruneConfig(**asked))
    assert (found.depth, found.hidden, found.ffn, found.heads, found.kv_heads) == expected
    assert found.head_dim == shape.head_dim


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"depth": 0}, "depth = 0 is not possible: the model has 30; give 1 to 30"),
        ({"layers_out": 30}, "layers_out = 30 is not possible.*give 1 to 29"),
        ({"layers_out": -1}, "layers_out = -1"),
        ({"depth": 24, "layers_out": 6}, "both given"),
        ({"ffn": 2000}, "ffn = 2000 is not possible: the model has 1536"),
        ({"heads": 7}, "heads = 7 is not possible on 3 KV heads.*possible are 3, 6, 9"),
        ({"heads": 9, "kv_heads": 1}, "heads = 9.*possible are 1, 2, 3"),
        ({}, "nothing would be pruned"),
        ({"hidden": 576}, "nothing would be pruned"),
    ],
)
def test_what_is_not_possible_is_refused(asked, message):
    with pytest.raises(InputError, match=message):
        pruned_shape(SMOLLM2, PruneConfig(**asked))


def test_llama_becomes_mistral_only_where_it_must():
    raw = LlamaConfig()
    odd = Shape(30, 512, 1536, 9, 3, 64)  # 512 is no multiple of 9
    entries = config_entries(raw, odd, range(30))
    assert entries["model_type"] == "mistral"
    assert entries["sliding_window"] is None
    even = Shape(30, 512, 1536, 8, 2, 64)
    assert "model_type" not in config_entries(raw, even, range(30))
    with pytest.raises(InputError, match="choose a multiple"):
        config_entries(LlamaConfig(mlp_bias=True), odd, range(30))


def test_layers_keep_their_windows():
    """Those from max_window_layers on have one, by numbers that pruning changes."""
    config = Qwen2Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=2)
    entries = config_entries(config, Shape(3, 64, 96, 8, 8, 8), [0, 2, 3])
    assert entries["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
