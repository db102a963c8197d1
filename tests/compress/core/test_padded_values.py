"""Attention with padded values against transformers' own, which pads none."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV32Config

from compress.core.padded_values import NAME, pad_values
from compress.loading import load_model
from tests.conftest import LATENT, SIZES


@pytest.mark.parametrize("family", ["deepseek_v3", "youtu"])
def test_logits_and_gradients_are_those_of_transformers(model_folder, family):
    """Two documents in one sequence, then a batch with a cache; sums are of another order alone."""
    folder = model_folder(family)
    ours = load_model(folder, "float32").requires_grad_(True)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert ours.config._attn_implementation == NAME
    tokens = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))
    packed = {"position_ids": torch.arange(24).remainder(15)[None].expand(2, -1)}
    for inputs in (packed, {}):
        logits = [m(input_ids=tokens, use_cache=False, **inputs).logits for m in (ours, theirs)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        for model, result in zip((ours, theirs), logits, strict=True):
            model.zero_grad()
            result.square().mean().backward()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None, name
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max())
    settings = {"max_new_tokens": 6, "do_sample": False}
    generated = [m.generate(tokens, **settings) for m in (ours, theirs)]
    assert torch.equal(*generated)


def test_a_saved_config_says_nothing_of_it(model_folder, tmp_path):
    """A name that only we know would keep transformers from loading the folder."""
    load_model(model_folder("deepseek_v3"), "float32").save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_models_that_choose_tokens_are_left_alone():
    """Their mask of chosen tokens is made for functions that transformers knows by name."""
    config = DeepseekV32Config(**SIZES | LATENT, q_lora_rank=28, first_k_dense_replace=99)
    model = AutoModelForCausalLM.from_config(config)
    pad_values(model)
    assert model.config._attn_implementation == "sdpa"


def test_models_with_equal_widths_are_left_alone(model_folder):
    assert load_model(model_folder("llama"), "float32").config._attn_implementation == "sdpa"
