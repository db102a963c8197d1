"""Scores against their formulas, computed another way from what runs through a block."""

import pytest
import torch

from compress.core.blocks import BlockModel
from compress.core.errors import InputError
from compress.core.source import resolve_model
from compress.prune.parts import check_norms, parts_of
from compress.prune.scores import block_score, unit_scores, watching, weight_norms


@pytest.fixture(params=["llama", "qwen3"])
def block(request, model_folder):
    """A block, what it is called with on two batches of three sequences, and its head_dim."""
    source = resolve_model(str(model_folder(request.param)))
    model = BlockModel(source, torch.device("cpu"), torch.float32)
    tokens = torch.randint(3, 120, (6, 32), generator=torch.Generator().manual_seed(0))
    inputs = [(states, kwargs[0]) for states, kwargs in model.capture_inputs(tokens.split(3))]
    return model.load_block(0), inputs, model.config.head_dim


def seen_of(block, inputs, names):
    """What enters the modules `names`, and what they give, [6, 32, K] each."""
    seen = {name: ([], []) for name in names}

    def hook(name):
        def record(_module, args, output):
            seen[name][0].append(args[0].detach().double())
            seen[name][1].append(output.detach().double())

        return record

    handles = [block.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    for states, kwargs in inputs:
        block(states, **kwargs)
    for handle in handles:
        handle.remove()
    return {name: tuple(map(torch.cat, both)) for name, both in seen.items()}


@torch.no_grad()
def test_scores_are_their_formulas(block):
    module, inputs, head_dim = block
    parts = parts_of(module, "m")
    names = ["self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm", ""]
    seen = seen_of(module, inputs, names)
    with watching(module, parts, head_dim) as (found,):
        for states, kwargs in inputs:
            module(states, **kwargs)
    weights = weight_norms(module, parts, head_dim)
    by_activation = unit_scores("activation", found.sums, weights, seed=0)
    by_contribution = unit_scores("contribution", found.sums, weights, seed=0)

    def minitron(activation):
        """[B, S, units] to [units]."""
        return activation.abs().mean(1).square().sum(0).sqrt()

    close = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums of some hundred products
    heads = seen["self_attn.o_proj"][0].unflatten(-1, (-1, head_dim))
    ffn = minitron(seen["mlp.down_proj"][0])
    norms = [seen[name] for name in parts.norms]
    torch.testing.assert_close(by_activation["heads"], minitron(heads.norm(dim=-1)), **close)
    torch.testing.assert_close(by_activation["ffn"], ffn, **close)
    torch.testing.assert_close(
        by_activation["hidden"], sum(minitron(given) for _, given in norms), **close
    )

    weight = module.get_parameter("self_attn.o_proj.weight").double()
    given = [
        heads[:, :, n] @ weight[:, n * head_dim : (n + 1) * head_dim].T
        for n in range(heads.shape[2])
    ]
    expected = torch.stack([output.square().sum().sqrt() for output in given])
    torch.testing.assert_close(by_contribution["heads"], expected, **close)
    torch.testing.assert_close(by_contribution["ffn"], ffn, **close)
    shares = [x.square() / x.square().mean(-1, keepdim=True) for x, _ in norms]
    expected = sum(share.sum((0, 1)).sqrt() for share in shares)
    torch.testing.assert_close(by_contribution["hidden"], expected, **close)

    before, after = seen[""]
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    score = block_score("influence", found.sums, weights, seed=0)
    assert score == pytest.approx((1 - cosine).mean().item(), rel=1e-4)


def test_weight_norms_are_of_what_goes(block):
    """What they say goes when the weights of one unit are zero."""
    module, _, head_dim = block
    parts = parts_of(module, "m")
    before = weight_norms(module, parts, head_dim)
    with torch.no_grad():
        module.get_parameter("self_attn.q_proj.weight")[2 * head_dim : 3 * head_dim] = 0
        module.get_parameter("self_attn.o_proj.weight")[:, 2 * head_dim : 3 * head_dim] = 0
        for name in ("gate", "up"):
            module.get_parameter(f"mlp.{name}_proj.weight")[5] = 0
        module.get_parameter("mlp.down_proj.weight")[:, 5] = 0
    after = weight_norms(module, parts, head_dim)
    assert after["heads"][2] == 0
    assert after["ffn"][5] == 0
    others = torch.arange(len(before["heads"])) != 2
    assert torch.equal(after["heads"][others], before["heads"][others])
    assert after["block"] < before["block"]


def test_chance_depends_on_the_seed_alone(block):
    module, _, head_dim = block
    weights = weight_norms(module, parts_of(module, "m"), head_dim)
    first, again, other = (unit_scores("random", {}, weights, seed) for seed in (1, 1, 2))
    assert torch.equal(first["ffn"], again["ffn"])
    assert not torch.equal(first["ffn"], other["ffn"])


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_other_norms_are_refused(family, model_folder):
    source = resolve_model(str(model_folder(family)))
    model = BlockModel(source, torch.device("cpu"), torch.float32)
    module = model.load_block(0)
    with pytest.raises(InputError, match="is not gain"):
        check_norms(module, parts_of(module, "m"), "m")


def test_fused_projections_are_refused(model_folder):
    source = resolve_model(str(model_folder("phi3")))
    model = BlockModel(source, torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match="qkv_proj"):
        parts_of(model.meta_block(0), "m")
