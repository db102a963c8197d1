"""Merging KV heads: what is exact, what is best, and which heads come together."""

import pytest
import torch

from compress.prune.kv_heads import Moments, groups_of, merge

P, K, H, T = 4, 4, 8, 400


def draw(seed, *shape, complex_numbers=False):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if complex_numbers else torch.float64
    return torch.randn(*shape, generator=generator, dtype=dtype)


def moments_of(keys, queries, values, metric):
    """From keys [T, K, P], mean squares of queries [P, K], values [T, K, H], metric [K, H, H]."""
    tokens = len(keys)
    return Moments(
        torch.einsum("tjp,tlp->pjl", keys, keys.conj()) / tokens,
        queries,
        torch.einsum("tja,tlb->jalb", values, values) / tokens,
        metric,
    )


@pytest.fixture
def data():
    out = draw(4, K, 3, H, H)
    return {
        "keys": draw(0, T, K, P, complex_numbers=True),
        "queries": draw(1, P, K).square() + 0.1,
        "values": draw(2, T, K, H) @ draw(3, H, H),
        "metric": torch.einsum("jnab,jnac->jbc", out, out),
    }


def energy(data, merged, group):
    """Shares of keys' and values' energy that is lost, sample by sample."""
    keys, values = data["keys"][:, group], data["values"][:, group]
    weight = data["queries"][:, group].T
    z = torch.einsum("pj,tjp->tp", merged.key_in, keys)
    back = torch.einsum("pj,tp->tjp", merged.key_out, z)
    lost = ((keys - back).abs().square() * weight).sum() / (keys.abs().square() * weight).sum()
    z = torch.einsum("hja,tja->th", merged.value_in, values)
    error = values - torch.einsum("jah,th->tja", merged.value_out, z)
    metric = data["metric"][group]

    def size(x):
        return torch.einsum("tja,jab,tjb->", x, metric, x)

    return float(lost), float(size(error) / size(values))


@pytest.mark.parametrize("how", ["pca", "mean"])
@pytest.mark.parametrize("group", [[0, 1, 2, 3], [1, 3], [2]])
def test_what_is_lost_is_what_samples_lose(data, how, group):
    merged = merge(moments_of(**data), group, how, how)
    assert merged.lost == pytest.approx(energy(data, merged, group), rel=1e-9, abs=1e-12)
    if len(group) == 1:
        assert merged.lost == pytest.approx((0, 0), abs=1e-12)


def test_pca_loses_what_the_singular_values_beyond_the_kept_hold(data):
    """By decompositions of the samples themselves, weighted."""
    merged = merge(moments_of(**data), range(K), "pca", "pca")
    lost = power = 0.0
    for p in range(P):
        weighted = data["keys"][:, :, p] * data["queries"][p].sqrt()
        squares = torch.linalg.svdvals(weighted).square()
        lost, power = lost + float(squares[1:].sum()), power + float(squares.sum())
    assert merged.lost[0] == pytest.approx(lost / power, rel=1e-9)
    root = torch.linalg.cholesky(data["metric"])
    weighted = torch.einsum("tja,jab->tjb", data["values"], root).flatten(1)
    squares = torch.linalg.svdvals(weighted).square()
    assert merged.lost[1] == pytest.approx(float(squares[H:].sum() / squares.sum()), rel=1e-9)


def test_heads_that_differ_by_what_may_be_undone_lose_nothing(data):
    factors = draw(5, K, P, complex_numbers=True)
    mixes = draw(6, K, H, H)
    data["keys"] = data["keys"][:, :1] * factors
    data["values"] = torch.einsum("ta,jab->tjb", data["values"][:, 0], mixes)
    moments = moments_of(**data)
    assert merge(moments, range(K), "pca", "pca").lost == pytest.approx((0, 0), abs=1e-9)
    assert min(merge(moments, range(K), "mean", "mean").lost) > 0.1


def test_the_mean_is_the_mean(data):
    merged = merge(moments_of(**data), [0, 2, 3], "mean", "mean")
    keys, values = data["keys"][:, [0, 2, 3]], data["values"][:, [0, 2, 3]]
    found = torch.einsum("pj,tjp->tp", merged.key_in, keys)
    assert torch.allclose(found, keys.mean(1))
    assert torch.allclose(torch.einsum("hja,tja->th", merged.value_in, values), values.mean(1))
    assert torch.equal(merged.key_out, torch.ones_like(merged.key_out))
    assert torch.equal(merged.value_out, torch.eye(H, dtype=torch.float64).expand(3, H, H))


def test_nothing_reads_a_head(data):
    """Queries, or output projections, of zeros: no division by them."""
    data["queries"][:, 1] = 0
    data["queries"][2] = 0
    data["metric"][3] = 0
    merged = merge(moments_of(**data), range(K), "pca", "pca")
    for tensor in (merged.key_in, merged.key_out, merged.value_in, merged.value_out):
        assert torch.isfinite(torch.view_as_real(tensor) if tensor.is_complex() else tensor).all()


def test_alike_heads_come_together(data):
    """Heads 0 and 3, 1 and 2 are the same up to what merging undoes."""
    factors, mixes = draw(5, 2, P, complex_numbers=True), draw(6, 2, H, H)
    for place, (one, other) in enumerate([(0, 3), (1, 2)]):
        data["keys"][:, other] = data["keys"][:, one] * factors[place]
        data["values"][:, other] = data["values"][:, one] @ mixes[place]
    moments = moments_of(**data)
    assert groups_of(moments, 2, "pca", "pca") == [[0, 3], [1, 2]]
    assert groups_of(moments, 4, "pca", "pca") == [[0], [1], [2], [3]]
    assert groups_of(moments, 1, "pca", "pca") == [[0, 1, 2, 3]]


@pytest.mark.parametrize("seed", range(4))
def test_no_change_of_two_heads_makes_groups_better(seed):
    data = {
        "keys": draw(seed, T, 6, P, complex_numbers=True)
        @ draw(seed + 9, P, P).to(torch.complex128),
        "queries": draw(seed + 1, P, 6).square(),
        "values": draw(seed + 2, T, 6, H),
        "metric": torch.eye(H, dtype=torch.float64).expand(6, H, H),
    }
    moments = moments_of(**data)

    def cost(groups):
        pairs = [(a, b) for group in groups for a in group for b in group if a < b]
        return sum(sum(merge(moments, pair, "pca", "pca").lost) for pair in pairs)

    first, second = groups_of(moments, 2, "pca", "pca")
    least = cost([first, second])
    for one in first:
        for other in second:
            changed = [[other if x == one else x for x in first]]
            changed += [[one if x == other else x for x in second]]
            assert cost(changed) >= least - 1e-9
