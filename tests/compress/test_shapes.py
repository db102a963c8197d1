"""Shapes from config.json: parameters against published counts and transformers' own modules."""

import contextlib
import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from compress.core import source
from compress.core.errors import InputError
from compress.model_shape import Mla, parameters
from compress.roofline import kv_bytes, precision
from compress.shapes import FAMILIES, MOST_LAYERS, find_shape, known_models, shape_of


def counted(config):
    """Parameters of transformers' class, a tied tensor once, and by kind."""
    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    found = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for name, tensor in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            kind = "norms"
        elif "attn" in name:
            kind = "attention"
        elif "mlp" in name:
            kind = "mlp"
        else:
            kind = "head" if "lm_head" in name else "embedding"
        found[kind] += tensor.numel()
    return found


@pytest.mark.parametrize("name", known_models())
def test_parameters_of_real_models(name):
    """`source` in known_models.json says where a config and its count are published.

    A count that is published rounded is a float, and ours rounds to it.
    """
    known = known_models()[name]
    published = known["parameters"]
    ours = parameters(find_shape(name))
    if isinstance(published, int):
        assert ours.total == published
    else:
        assert float(f"{ours.total:.2e}") == published
    assert "huggingface.co/" in known["source"]
    assert vars(ours) == counted(known["config"])


def test_enough_models_and_families():
    exact = [known for known in known_models().values() if isinstance(known["parameters"], int)]
    assert len(exact) >= 14
    assert len({known["config"]["model_type"] for known in exact}) >= 10


SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "n_inner": 88,  # GPT-2's name for intermediate_size
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 4,
}


def small(kind, **more):
    config = {**SMALL, "model_type": kind}
    if FAMILIES[kind].mla:
        config |= {**LATENT, "q_lora_rank": None}
    return config | more


WIDE = {"llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "cwm", "glm4", "smollm3"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_as_transformers_builds_it(kind):
    """With biases and without, tied and not, and heads of another width than D / N."""
    switches = itertools.product((False, True), repeat=3)
    for tied, bias, wide in switches:
        config = small(kind, tie_word_embeddings=tied)
        config |= {"attention_bias": bias, "mlp_bias": bias, "use_bias": bias}
        if FAMILIES[kind].mla:
            config |= {"q_lora_rank": 20 if wide else None}
        elif (wide and kind in WIDE) or kind == "ministral":  # whose class needs it said
            config |= {"head_dim": 16}
        shape = shape_of(config, kind)
        assert vars(parameters(shape)) == counted(config)
        assert shape.tied == tied
        assert len(shape.windows) == 4


@pytest.mark.parametrize(
    ("kind", "more", "windows"),
    [
        ("llama", {}, (None,) * 4),
        ("mistral", {}, (16,) * 4),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("qwen2", {}, (None,) * 4),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 16)),
        ("gemma2", {}, (16, None, 16, None)),
        ("gemma3_text", {"sliding_window_pattern": 3}, (16, 16, None, 16)),
        ("cwm", {}, (None, 16, 16, 16)),
        ("cwm", {"layer_types": ["sliding_attention", "full_attention"] * 2}, (16, None) * 2),
    ],
)
def test_windows(kind, more, windows):
    assert shape_of(small(kind, **more), kind).windows == windows


def test_windows_bound_the_cache():
    gemma = find_shape("gemma-3-1b")
    # 4 of 26 layers see all, 22 see 512; keys and values of one head of 256 in 2 bytes
    assert kv_bytes(gemma, precision(), 32768) == (4 * 32768 + 22 * 512) * 2 * 256 * 2


def test_latent_attention():
    shape = find_shape("minicpm3-4b")
    assert shape.mla == Mla(kv_rank=256, rope_dim=32, nope_dim=64, v_dim=64, q_rank=768)
    assert shape.kv_numbers == 288


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "has 8 experts (num_local_experts)"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "has 128 experts"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "has 256 experts"),
        ({"model_type": "deepseek_v3", "num_hidden_layers": 61}, "layers with experts"),
        ({"model_type": "mamba"}, "is of type 'mamba'"),
        ({"model_type": "t5"}, "is of type 't5'"),
        ({"model_type": "gemma3", "text_config": {}}, "is of type 'gemma3'"),
        ({"model_type": "bloom"}, "is of type 'bloom'"),
        (small("phi", qk_layernorm=True), "qk_layernorm"),
        ({}, "is of type None"),
        ({"model_type": ["llama"]}, "is of type ['llama']"),
        (small("llama", num_hidden_layers=10**9), f"at most {MOST_LAYERS}"),
        (small("llama", hidden_size="wide"), "transformers cannot read config.json"),
        (small("llama", num_attention_heads=0), "transformers cannot read config.json"),
        (small("gemma", num_attention_heads=0, head_dim=8), "0 heads"),
        (small("llama", vocab_size=-1), "vocab = -1"),
        (small("gpt2", num_hidden_layers=None), "num_hidden_layers = None"),
        (small("qwen3", layer_types=["linear_attention"] * 4), "linear_attention"),
    ],
)
def test_what_is_not_modelled_is_refused(config, message):
    with pytest.raises(InputError) as refusal:
        shape_of(config, "some model")
    assert message in str(refusal.value)
    assert "'some model'" in str(refusal.value)
    assert "\n" not in str(refusal.value)


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.just(10**30),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)


@given(
    kind=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(
        st.sampled_from([*SMALL, *LATENT, "layer_types", "head_dim", "rope_parameters"]),
        odd,
        min_size=1,
        max_size=3,
    ),
)
def test_broken_files_give_a_line_or_a_shape(kind, changes):
    with contextlib.suppress(InputError):
        assert parameters(shape_of(small(kind) | changes, "x")).total > 0


# Where a shape is found


def test_from_a_folder_and_a_file(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(known_models()["llama-3-8b"]["config"]))
    for place in (folder, folder / "config.json"):
        assert parameters(find_shape(str(place))).total == 8_030_261_248
    elsewhere = tmp_path / "other.json"
    elsewhere.write_text("[1]")
    with pytest.raises(InputError, match="holds a list"):
        find_shape(str(elsewhere))
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        find_shape(str(folder))


def test_from_the_hub_takes_the_config_alone(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(ref, revision, allow_patterns):
        asked.append((ref, revision, allow_patterns))
        (tmp_path / "config.json").write_text(json.dumps(small("llama")))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_shape("someone/model", "main").hidden == 48
    assert asked == [("someone/model", "main", ["config.json"])]


@pytest.mark.real_model
def test_from_the_alias_without_weights(monkeypatch):
    monkeypatch.setattr(source, "_from_gguf", None)
    ours = parameters(find_shape("smollm2"))
    assert ours == parameters(find_shape("smollm2-135m"))


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("llama-2-13", "did you mean 'llama-2-13b'"),
        ("./nowhere", "no folder"),
        ("", "no folder"),
        ("a/b/c", "no folder"),
        ("x" * 5000, "cannot be looked up"),
        ("a\0b", "no folder"),
    ],
)
def test_what_is_not_found(ref, message):
    with pytest.raises(InputError, match=message):
        find_shape(ref)
