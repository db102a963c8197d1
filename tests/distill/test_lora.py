"""Adapters merged into weights, beside peft's own merging."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.distill.lora import LoraConfig, add_lora, merge_lora


@pytest.fixture
def adapted():
    """A model in bfloat16 with adapters that have learnt something."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True}
    torch.manual_seed(0)
    model = add_lora(LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16(), LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_merged_weights_are_rounded_once(adapted, dtype):
    expected = copy.deepcopy(adapted).float().merge_and_unload().to(dtype).state_dict()
    merged = {
        name: tensor.to(dtype) for name, tensor in merge_lora(adapted, dtype).state_dict().items()
    }
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_merging_takes_no_second_model(adapted):
    """What has no adapter is the tensor that it was, and nothing is wider than it has to be."""
    head = adapted.get_base_model().lm_head.weight
    merged = merge_lora(adapted, torch.bfloat16)
    assert merged.lm_head.weight is head
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
