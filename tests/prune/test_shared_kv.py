"""Shared keys and values against reduced-rank regression on the samples themselves."""

import pytest
import torch

from compress.prune.attention import AttentionWeights, Pairs
from compress.prune.shared_kv import Run, add_layer, shared

D, H, HEADS, TOKENS = 10, 4, 3, 3000
PAIRS = Pairs(torch.arange(2), torch.arange(2) + 2)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(kv_heads, seed):
    q, k, v = (
        torch.cat([randn(heads, H, D, seed=seed + n), torch.zeros(heads, H, 1)], dim=2)
        for n, heads in enumerate((HEADS * kv_heads, kv_heads, kv_heads))
    )
    out = randn(HEADS * kv_heads, D, H, seed=seed + 3)
    return AttentionWeights(
        q, k, v, out, None, dict.fromkeys(("q_proj", "k_proj", "v_proj"), False)
    )


def inputs(layers):
    """What enters each layer: the first one's input, bent, and something of its own."""
    x = randn(TOKENS, D, seed=1) @ randn(D, D, seed=2)
    return [x, *(x + 0.3 * x.tanh() + randn(TOKENS, D, seed=3 + n) for n in range(layers - 1))]


def run_of(weights, xs):
    """A run of layers whose keys lose nothing by a mean, and whose values are not averaged."""
    first = torch.cat([xs[0], torch.ones(TOKENS, 1)], dim=1).double()
    run = Run(first.T @ first / TOKENS, torch.zeros(D + 1, D + 1).double(), torch.ones(2).double())
    for one, x in zip(weights, xs, strict=True):
        q, k, v = (x @ part[..., :D].flatten(0, 1).T for part in (one.q, one.k, one.v))
        spread = v.square().mean(0) - v.mean(0).square()
        means = {
            "queries": q.square().mean(0),
            "keys": k.square().mean(0),
            "value": v.mean(0),
            "values": v.T @ v / TOKENS,
            "attended": torch.zeros(q.shape[1]).double(),
            "attended squares": spread.unflatten(0, (-1, 1, H)).expand(-1, HEADS, -1).flatten(),
            "cross k": k.T @ first / TOKENS,
            "cross v": v.T @ first / TOKENS,
        }
        add_layer(run, one, means, PAIRS, damping=1e-12)
    return run


def test_what_the_first_input_foretells_is_least_squares():
    weights, xs = [weights_of(2, seed) for seed in (10, 20)], inputs(2)
    run = run_of(weights, xs)
    assert torch.equal(run.k[0], weights[0].k)
    for found, own in ((run.k[1], weights[1].k), (run.v[1], weights[1].v)):
        target = xs[1] @ own[..., :D].flatten(0, 1).T
        expected = torch.linalg.lstsq(xs[0], target).solution.T
        torch.testing.assert_close(found.flatten(0, 1)[:, :D], expected, rtol=1e-6, atol=1e-8)
        assert not found[..., D].any()


@pytest.mark.parametrize("layers", [2, 3])
def test_shared_values_and_keys_are_the_best_of_their_rank(layers):
    """One KV head.  Of what any key and value of its size would lose, found on the samples, this
    loses no more: values in the metric of what reaches the hidden states, keys by their weights."""
    weights, xs = [weights_of(1, 10 * n + 10) for n in range(layers)], inputs(layers)
    run = run_of(weights, xs)
    plans = shared(run, PAIRS)
    first = torch.cat([xs[0], torch.ones(TOKENS, 1)], dim=1).double()
    value, key = (
        first @ plans[0]["v"][0].T,
        PAIRS.to_complex((first @ plans[0]["k"][0].T)[..., None]),
    )

    lost, targets = 0.0, []
    for one, x, plan in zip(weights, xs, plans, strict=True):
        metric = torch.einsum("ndb,ndc->bc", one.o, one.o)
        own, (merged,) = x @ one.v[0, :, :D].T, plan["merged"]
        rest = own - value @ merged["value_out"][0].T
        lost += float((rest @ metric * rest).sum() / TOKENS)
        assert plan["values_lost"] == pytest.approx(float(rest.square().sum() / own.square().sum()))
        targets.append(own @ torch.linalg.cholesky(metric))
    target = torch.cat(targets, dim=1)
    foretold = xs[0] @ torch.linalg.lstsq(xs[0], target).solution
    top = torch.linalg.svdvals(foretold)[:H].square().sum()
    assert lost == pytest.approx(float((target.square().sum() - top) / TOKENS), rel=1e-6)

    for pair in range(2):
        lost, targets = 0.0, []
        for number, (one, x, plan) in enumerate(zip(weights, xs, plans, strict=True)):
            own = PAIRS.to_complex((x @ one.k[0, :, :D].T)[..., None])[:, pair]
            (merged,) = plan["merged"]
            rest = own - merged["key_out"][pair, 0] * key[:, pair]
            weight = run.queries[number][pair, 0]
            lost += float(weight * rest.abs().square().sum())
            targets.append(own * weight.sqrt())
        target = torch.cat(targets, dim=1)
        real = torch.cat([target.real, target.imag], dim=1)
        foretold = (xs[0] @ torch.linalg.lstsq(xs[0], real).solution).chunk(2, dim=1)
        top = torch.linalg.svdvals(torch.complex(*foretold))[0].square()
        assert lost == pytest.approx(float(target.abs().square().sum() - top), rel=1e-6)


def test_heads_that_belong_together_find_each_other():
    """Of four KV heads the second layer has the first one's, in another order, mixed and turned."""
    one, two = weights_of(4, 10), weights_of(4, 20)
    order = torch.tensor([2, 0, 3, 1])
    mix = torch.linalg.qr(randn(H, H, seed=5))[0]
    factor = torch.polar(torch.tensor([2.0, 0.5]).double(), torch.tensor([1.0, -2.0]).double())
    two.v = mix @ one.v[order]
    two.k = PAIRS.to_real(PAIRS.to_complex(one.k[order]) * factor[:, None])
    x = inputs(1)[0]
    plans = shared(run_of([one, two], [x, x]), PAIRS)
    found = [head for (head,) in plans[1]["group"]]
    assert [int(order[head]) for head in found] == [0, 1, 2, 3]
    for plan in plans:
        assert max(plan["keys_lost"], plan["values_lost"]) < 1e-9
