"""Folding leaves the model's function unchanged, and finds what it should in every family."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.core.blocks import BlockModel, linears_of
from compress.core.source import resolve_model
from compress.core.statistics import collecting
from compress.quant.folds import find_fold
from compress.walk import probe_of

FOLDABLE = {
    "q_proj": "input_layernorm",
    "o_proj": "v_proj",
    "gate_proj": "post_attention_layernorm",
    "down_proj": "up_proj",
}
GEMMA2_FOLDABLE = FOLDABLE | {"gate_proj": "pre_feedforward_layernorm"}


def folds_of(model: BlockModel, index: int, tokens):
    """(block, [(fold, stats)], probe) of one block, on the embeddings as its input."""
    ((hidden, kwargs),) = model.capture_inputs([tokens])
    block = model.load_block(index)
    with collecting(block) as groups:
        model.run_block(block, hidden, kwargs[index])
    probe = probe_of(hidden, kwargs[index], torch.device("cpu"))
    return block, [(find_fold(block, g.linears, probe), g) for g in groups], probe


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_folds_are_found_and_the_folded_model_gives_the_original_logits(family, model_folder):
    folder = model_folder(family)
    tokens = torch.randint(3, 120, (2, 40), generator=torch.Generator().manual_seed(0))
    model = BlockModel(resolve_model(str(folder)), torch.device("cpu"), torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    folded = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(5)
    for index in range(model.num_blocks):
        block, folds, _ = folds_of(model, index, tokens)
        for fold, stats in folds:
            leaf = stats.linears[0].rpartition(".")[2]
            expected = (GEMMA2_FOLDABLE if family == "gemma2" else FOLDABLE)[leaf]
            assert fold is not None, f"{family}: no fold for {stats.linears}"
            assert fold.producer.endswith(expected), (leaf, fold)
            # Any positive scales, not only powers of two, over two orders of magnitude.
            channels = fold.heads * fold.head_dim
            scale = torch.exp(torch.randn(channels, generator=generator) * 1.2)
            fold.apply(block, scale, torch.float32)
        folded.get_submodule(model.block_name(index)).load_state_dict(block.state_dict())
    with torch.no_grad():
        before, after = reference(tokens).logits, folded(tokens).logits
    assert not torch.equal(before, after)  # something was folded
    # float32 rounding through two blocks: about 1e-6 of the logits' size, with room for sums.
    assert (before - after).abs().max() < 2e-5 * before.abs().max()


def test_gain_rounded_for_storage_keeps_the_fold_exact(model_folder):
    """A bfloat16 gain carries 8 bits; the consumers must get the ratio it really has."""
    model = BlockModel(
        resolve_model(str(model_folder("llama"))), torch.device("cpu"), torch.float32
    )
    tokens = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(0))
    block, folds, probe = folds_of(model, 0, tokens)
    fold = folds[0][0]
    before = probe(block)
    fold.apply(block, torch.linspace(0.3, 3, 48), torch.bfloat16)
    gain = block.get_submodule(fold.producer).weight
    assert torch.equal(gain, gain.bfloat16().float())
    assert (probe(block) - before).abs().max() < 1e-5 * before.abs().max()


def test_no_fold_where_a_nonlinearity_or_another_reader_is_in_the_way(model_folder):
    model = BlockModel(
        resolve_model(str(model_folder("llama"))), torch.device("cpu"), torch.float32
    )
    tokens = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(0))
    block, _, probe = folds_of(model, 0, tokens)
    # q and k alone: v reads the same norm, so dividing its gain would change v.
    assert find_fold(block, ("self_attn.q_proj", "self_attn.k_proj"), probe) is None
    # without up_proj in the tree's candidates only gate is left, behind the SiLU
    assert "mlp.up_proj" in linears_of(block)
    fold = find_fold(block, ("mlp.down_proj",), probe)
    assert fold is not None
    assert fold.producer == "mlp.up_proj"
