"""What a pass will hold, by shapes alone, beside what PyTorch's allocator says that it held."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from compress.distill.config import TrainConfig
from compress.distill.lora import LoraConfig, add_lora
from compress.distill.memory import activation_bytes
from compress.distill.model_parts import last_hidden
from compress.distill.preparation import prepare_student

SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 512}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2}
FAMILIES = {
    "llama, tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
}
SEQUENCES = 4


def student(family, lora, device):
    """A model; its weights are frozen and in bfloat16 where it gets adapters."""
    model_class, config_class, more = FAMILIES[family]
    with torch.device(device):
        model = model_class(config_class(**SIZES, **more))
    if not lora:
        return model.float().requires_grad_(True)
    return add_lora(model.bfloat16(), LoraConfig(rank=4))


def held(model, config, lowered):
    """The most that a real pass had at once, by the profiler's record of the allocator."""
    prepare_student(model, config)
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    ids = torch.zeros(SEQUENCES, config.seq_len, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            states = last_hidden(model, ids, ids)
        states.sum().backward()
        del states
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("lora", "lowered", "checkpointing"),
    [(False, False, False), (False, True, False), (False, False, True), (True, True, False)],
    ids=["float32", "bfloat16", "checkpointing", "lora"],
)
def test_activations_of_a_pass(family, lora, lowered, checkpointing):
    config = TrainConfig(seq_len=64, activation_checkpointing=checkpointing)
    real = held(student(family, lora, "cpu"), config, lowered)
    planned = activation_bytes(student(family, lora, "meta"), config, SEQUENCES, lowered)
    # An allocator rounds up, and a kernel's own scratch is not made by an operation.
    assert planned == pytest.approx(real, rel=0.03)


def test_planning_leaves_nothing_behind():
    """Neither the mode of tensors without data nor the counting is on afterwards."""
    config = TrainConfig(seq_len=8)
    activation_bytes(student("qwen3", False, "meta"), config, 1, False)
    assert torch.ones(2).sum().item() == 2
