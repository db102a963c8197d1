"""Model classes and settings that the runtime would not compute as transformers does."""

import json

import pytest

from compress.core.errors import InputError
from compress.core.source import ModelSource
from compress.runtime.weights import load_weights


def source_of(folder):
    return ModelSource(str(folder), folder)


def changed(folder, out, changes):
    """The same weights with other entries in config.json."""
    out.mkdir()
    (out / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("family", ["gemma2", "phi3", "mixtral", "granite"])
def test_other_classes_are_refused(family, model_folder):
    message = (
        "ForCausalLM; the runtime serves classes CwmForCausalLM, LlamaForCausalLM, "
        "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaClaForCausalLM, "
        "MistralClaForCausalLM, Qwen2ClaForCausalLM, Qwen3ClaForCausalLM, DeepseekV3ForCausalLM, "
        "YoutuForCausalLM; for others use compress eval --engine transformers"
    )
    with pytest.raises(InputError, match=message):
        load_weights(source_of(model_folder(family)))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "has hidden_act = 'gelu'; the runtime serves silu"),
        ("llama", {"num_key_value_heads": 4}, "has 6 heads on 4 KV heads"),
        (
            "qwen2_cla",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "share keys and values .kv_share = 2., and windows that differ",
        ),
        ("llama_cla", {"kv_share": 0}, "kv_share = 0 is no number of layers"),
        ("llama_cla", {"kv_share": "two"}, "kv_share"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "has rope_type = 'dynamic'; the runtime serves default, linear, llama3, yarn",
        ),
        (
            "mistral",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 64,
                }
            },
            "has rope_type = 'longrope'",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "rotates 4 of 8 dimensions of a head; the runtime serves all of them",
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": False},
            "attention of another kind, or with a window of no size",
        ),
        ("mistral", {"sliding_window": 0}, "with a window of no size"),
    ],
)
def test_what_would_be_wrong_is_refused(family, changes, message, model_folder, tmp_path):
    folder = changed(model_folder(family), tmp_path / "changed", changes)
    with pytest.raises(InputError, match=message):
        load_weights(source_of(folder))
