"""Norm, gate and rotary embedding against transformers' own, bit for bit."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from compress.kernels.rms_norm import rms_norm
from compress.kernels.rope import apply_rope, rope_table
from compress.kernels.silu_mul import silu_mul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 576])
def test_rms_norm(dtype, width):
    norm = LlamaRMSNorm(width, eps=1e-5)
    norm.weight.data = random(width, seed=1)
    x, residual = random(5, width).to(dtype), random(5, width, seed=2).to(dtype)
    total, normed = rms_norm(x, norm.weight.data, 1e-5, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm.to(dtype)(x + residual))
    same, normed = rms_norm(x.view(5, 1, width), norm.weight.data, 1e-5)
    assert torch.equal(same, x.view(5, 1, width))
    assert torch.equal(normed[:, 0], norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype):
    mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=48))
    gate, up = random(3, 48).mul(4).to(dtype), random(3, 48, seed=1).to(dtype)
    assert torch.equal(silu_mul(torch.cat([gate, up], dim=1)), mlp.act_fn(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_rope(dtype, head_dim):
    config = LlamaConfig(hidden_size=9 * head_dim, num_attention_heads=9, num_key_value_heads=3)
    rotary = LlamaRotaryEmbedding(config)
    positions = torch.tensor([0, 1, 7, 2047, 31])
    q, k = random(5, 9, head_dim).to(dtype), random(5, 3, head_dim, seed=1).to(dtype)
    cos, sin = rotary(q, positions[None])
    expected = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    table = rope_table(positions, rotary.inv_freq, rotary.attention_scaling, dtype)
    for found, whole in zip(apply_rope(q, k, *table), expected, strict=True):
        assert torch.equal(found, whole[0])


def test_partial_rope_leaves_the_rest_alone():
    q, k = random(5, 4, 48), random(5, 2, 48, seed=1)
    table = rope_table(torch.arange(5), random(8).abs(), 1.25, torch.float32)
    whole = apply_rope(q[..., :16], k[..., :16], *table)
    for x, found, part in zip((q, k), apply_rope(q, k, *table), whole, strict=True):
        assert torch.equal(found[..., 16:], x[..., 16:])
        assert torch.equal(found[..., :16], part)
