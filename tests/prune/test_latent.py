"""The mathematics of MLA's conversion, against what it says written out."""

import pytest
import torch

from compress.prune.attention import Pairs
from compress.prune.latent import (
    BALANCE,
    LatentMoments,
    concentrate,
    fewer_queries,
    latent,
    shared_pairs,
    unturned,
)
from compress.prune.mla_sums import _turning, _without_rotation

HEADS, KV_HEADS, DIM = 6, 3, 8
PAIRS = Pairs(torch.arange(4), torch.arange(4, 8))


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def get(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return get


def moment_of(rows):
    return rows.T @ rows / len(rows)


@pytest.fixture
def moments(draw):
    """Of random keys, queries and values, with losses that differ by head and pair."""
    k, v, q = draw(500, KV_HEADS, DIM), draw(500, KV_HEADS, DIM), draw(500, HEADS, DIM)
    k = k @ draw(DIM, DIM)
    pairs = torch.complex(k[..., PAIRS.real], k[..., PAIRS.imaginary])
    joint = torch.cat([k.flatten(1), v.flatten(1)], 1) @ draw(48, 48)
    out = draw(KV_HEADS, DIM, DIM)
    return LatentMoments(
        keys=torch.einsum("tjp,tlp->pjl", pairs, pairs.conj()) / 500,
        loss=draw(HEADS, 4).square(),
        constant=torch.complex(draw(HEADS, 4), draw(HEADS, 4)),
        joint=moment_of(joint),
        queries=torch.einsum("tna,tnb->nab", q, q) / 500,
        spread=draw(HEADS).square(),
        metric=out @ out.mT,
        all_queries=moment_of(q.flatten(1) @ draw(48, 48)),
    )


def test_all_components_are_all_of_the_keys(moments):
    """They lose as much as the keys, and leave nothing over; without any, all is left."""
    found = concentrate(moments)
    assert torch.allclose(found.lost.sum(1), (moments.spread[:, None] * moments.loss).sum(0))
    assert (found.lost[:, :-1] >= found.lost[:, 1:]).all()
    # float64; a product with an inverse
    assert unturned(found, [KV_HEADS] * 4).abs().max() < 1e-12
    everything = torch.eye(KV_HEADS, dtype=torch.complex128).expand(4, -1, -1)
    assert torch.equal(unturned(found, [0] * 4), everything)


def test_no_other_component_holds_more(moments, draw):
    """Of what is lost without rotation; against random ones, in the same weights."""
    found = concentrate(moments)
    own = moments.keys.diagonal(dim1=1, dim2=2).real
    loss = moments.spread[:, None] * moments.loss
    weight = loss.view(KV_HEADS, -1, 4).sum(1).T / own

    def lost(key_in, key_out):  # E sum_j w_j |k_j - b_j z|²
        beside = torch.einsum("pjl,pl->pj", moments.keys, key_in.conj())
        size = torch.einsum("pj,pjl,pl->p", key_in, moments.keys, key_in.conj()).real
        error = own - 2 * (key_out.conj() * beside).real + key_out.abs().square() * size[:, None]
        return (weight * error).sum()

    best = lost(found.key_in[:, 0], found.key_out[:, 0])
    assert torch.allclose(best, (weight * own).sum() - found.lost[:, 0].sum())
    for _ in range(200):
        change = 0.1 * torch.complex(draw(4, KV_HEADS), draw(4, KV_HEADS))
        assert lost(found.key_in[:, 0] + change, found.key_out[:, 0]) > best
        assert lost(found.key_in[:, 0], found.key_out[:, 0] + change) > best


def test_pairs_are_shared_by_all_layers():
    first = torch.tensor([[8.0, 1], [4, 3], [9, 0]])
    second = torch.tensor([[1.0, 0], [9, 6], [0, 0]])
    assert shared_pairs([first, second], 3, turned=3) == [1, 2, 0]
    assert shared_pairs([first, second], 3, turned=1) == [2, 1, 0]


def test_the_latent_loses_least(moments, draw):
    """Against latents of changed maps, in the metric of keys and values written out."""
    rest = unturned(concentrate(moments), [2, 1, 0, 1])
    rank = 10
    made = latent(moments, rest, PAIRS, rank)
    keys = PAIRS.to_complex(torch.eye(24, dtype=torch.float64).view(3, 8, 24))
    onto = PAIRS.to_real(torch.einsum("pjl,lpx->jpx", rest, keys)).reshape(24, 24)
    target = torch.block_diag(onto, torch.eye(24, dtype=torch.float64))
    key_metric = torch.zeros(3, 8, 8, dtype=torch.float64)
    for head in range(HEADS):
        factor = moments.constant[head].conj()
        turn = torch.zeros(8, 8, dtype=torch.float64)  # q as a complex number, times the factor
        for p in range(4):
            a, b = factor[p].real, factor[p].imag
            turn[p, p], turn[p, p + 4], turn[p + 4, p], turn[p + 4, p + 4] = a, -b, b, a
        met = turn @ moments.queries[head] @ turn.T
        key_metric[head // 2] += BALANCE * moments.spread[head] * met
    metric = torch.block_diag(*key_metric, *moments.metric)

    def lost(onto, back):
        error = target - back @ onto
        return torch.einsum("ab,ax,xy,by->", metric, error, moments.joint, error)

    back = torch.cat([made.keys, made.values]).reshape(48, rank)
    best = lost(made.of_x, back)
    assert best > 0
    for _ in range(100):
        assert lost(made.of_x + 0.01 * draw(rank, 48), back) > best
        assert lost(made.of_x, back + 0.01 * draw(48, rank)) > best
    size = torch.einsum("rx,xy,ry->", made.of_x, moments.joint, made.of_x) / rank
    assert size == pytest.approx(1)


def test_as_many_numbers_as_there_are_lose_nothing(moments):
    rest = unturned(concentrate(moments), [0] * 4)
    made = latent(moments, rest, PAIRS, 48)
    both = torch.cat([made.keys, made.values]).reshape(48, 48) @ made.of_x
    eye = torch.eye(48, dtype=torch.float64)
    assert torch.allclose(both, eye, atol=1e-8)  # float64, with roots of metrics and back
    fewer, back = fewer_queries(moments, 48)
    assert torch.allclose(back @ fewer, eye, atol=1e-8)


def test_what_is_lost_without_turning(draw):
    """The covariances, the best factor and its loss, against sums written out query by query."""
    places, length, group = torch.tensor([3, 6, 9]), 10, 2
    still = torch.complex(draw(length, 4), draw(length, 4))
    before = torch.complex(draw(group, 3, 4), draw(group, 3, 4))
    angle = torch.outer(torch.arange(length), torch.tensor([1.0, 0.3, 0.1, 0.01])).double()
    phase = torch.polar(torch.ones_like(angle), angle)
    turned, after = still * phase, before * phase[places]
    covariance = _turning(
        before.transpose(0, 1), after.transpose(0, 1), still[:, None], turned[:, None], places, 0.5
    )
    constant, loss = _without_rotation(covariance)

    def lost(head, pair, factor):
        total = 0.0
        for index, at in enumerate(places.tolist()):
            logits = torch.stack(
                [(after[head, index].conj() * turned[s]).sum().real for s in range(at + 1)]
            )
            weights = (0.5 * logits).softmax(0)
            change = torch.stack(
                [
                    (
                        before[head, index, pair].conj()
                        * still[s, pair]
                        * (torch.exp(1j * (angle[s, pair] - angle[at, pair])) - factor)
                    ).real
                    for s in range(at + 1)
                ]
            )
            variance = (weights * change.square()).sum() - (weights * change).sum() ** 2
            total += variance
        return float(total)

    for head in range(group):
        for pair in range(4):
            factor = complex(constant[head, pair])
            least = lost(head, pair, factor)
            assert least == pytest.approx(float(loss[head, pair]), rel=1e-5)
            for step in (0.01, -0.01, 0.01j, -0.01j):
                assert lost(head, pair, factor + step) > least
