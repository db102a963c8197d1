"""Training of what `compress convert --to mla` made, whose latents have rows of 1e-9."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.conversion import run_conversion
from compress.core.source import ModelSource
from compress.distill.latent_scale import LatentScale
from compress.distillation import run_distillation
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.recipe import build_conversion, build_distillation

TOKENS = torch.randint(3, 120, (4, 48), generator=torch.Generator().manual_seed(0))
TRAIN = {"tokens": 16 * 4 * 32, "seq_len": 32, "batch_size": 4, "precision": "float32"}


@pytest.fixture(params=["llama", "qwen2"])
def converted(request, model_folder, stage_values, tmp_path):
    """Folders of a tiny model and of the same with latents; one of the two has a rank of queries,
    and biases."""
    stage = {"to": "mla", "kv_rank": 10, "rope_dim": 6}
    if request.param == "qwen2":
        stage["q_rank"] = 40
    original = model_folder(request.param)
    run_conversion(build_conversion(stage_values(folder=original, **stage)))
    return original, tmp_path / "out"


@torch.inference_mode()
def logits_of(model):
    return model(TOKENS).logits


def test_the_model_computes_the_same_with_larger_rows(converted):
    model = AutoModelForCausalLM.from_pretrained(converted[1], dtype=torch.float32)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, logits_of(model)
    scale = LatentScale(model)
    weights = model.state_dict()
    changed = [name for name, value in weights.items() if not torch.equal(value, before[name])]
    leaves = {name.split(".", 4)[-1] for name in changed}
    assert {"kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "kv_a_layernorm.weight"} <= leaves
    for name in changed:
        attention, _, leaf = name.rpartition("self_attn.")
        if leaf.endswith("_proj.weight") or leaf == "kv_a_proj_with_mqa.weight":
            rows = {"q_a_proj.weight": 40, "kv_a_proj_with_mqa.weight": 10}.get(leaf)
            usual = weights[f"{attention}self_attn.o_proj.weight"].square().mean().sqrt()
            size = weights[name][:rows].square().mean().sqrt()
            assert 0.7 < size / usual < 1.42, name  # to the nearest power of two
            assert rows is None or torch.equal(weights[name][rows:], before[name][rows:])
    # equal but for a mean square below the epsilon's last bit, which either sum may round
    assert (logits_of(model) - expected).abs().max() <= 1e-6 * expected.abs().max()
    restored = scale.restored(weights)
    assert all(torch.equal(restored[name], before[name]) for name in before)


def test_latents_of_the_usual_size_stay(converted):
    """As in a model that was made with latents: nothing is known of its norms."""
    model = AutoModelForCausalLM.from_pretrained(converted[1], dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_a_" in name:
                parameter.copy_(torch.randn_like(parameter) / 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = LatentScale(model).restored(model.state_dict())
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_training_brings_it_nearer_to_the_original(stage_values, model_folder, text_file, tmp_path):
    """Steps of the size of the learning rate, on rows of 1e-9, would leave nothing of them."""
    original, made = tmp_path / "original", tmp_path / "out"
    shutil.copytree(model_folder("llama"), original)
    model = AutoModelForCausalLM.from_pretrained(original)
    torch.manual_seed(0)
    with torch.no_grad():  # as initialized it predicts next to nothing
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(original)
    stage = {"to": "mla", "kv_rank": 4, "rope_dim": 4, "basis": "weights", "refit": False}
    run_conversion(build_conversion(stage_values(folder=original, **stage)))
    recipe = {
        "model": str(made),
        "out": str(tmp_path / "healed"),
        "stages": [
            {
                "method": "distill",
                "teacher": str(original),
                "data": {"source": str(text_file), "held_out": 4},
                "loss": {"forward_kl": 0.1, "attention_mse": 1.0},
                "train": TRAIN | {"learning_rate": 1e-3},
            }
        ],
    }
    run_distillation(build_distillation(recipe))
    config, teacher = TextEvalConfig(text_file, 32, 4), ModelSource("original", original)
    before, after = (
        evaluate_text(ModelSource(folder.name, folder), config, teacher)["kl_mean"]
        for folder in (made, tmp_path / "healed")
    )
    assert after < 0.8 * before
    weights = load_file(tmp_path / "healed" / "model.safetensors")
    rows = weights["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][:4]
    assert rows.abs().max() < 1e-6
