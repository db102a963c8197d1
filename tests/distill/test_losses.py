"""Each loss against its definition in float64, and its gradient against differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from compress.distill import losses

T, V, K = 5, 11, 4
TEMPERATURES = (1.0, 2.5)


def logits(seed, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(T, V, dtype=torch.float64, generator=generator) * 2
    return made.requires_grad_(requires_grad)


def probabilities(z, temperature):
    powers = [[math.exp(x / temperature) for x in row] for row in z.tolist()]
    return [[p / sum(row) for p in row] for row in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mixed(p, q, beta):
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


DEFINITIONS = {
    "forward_kl": (losses.forward_kl, {}, kl),
    "reverse_kl": (losses.reverse_kl, {}, lambda p, q: kl(q, p)),
    "jsd": (losses.jsd, {"beta": 0.3}, lambda p, q: mixed(p, q, 0.3)),
}


def top_of(t, temperature):
    top = torch.log_softmax(t.detach() / temperature, -1).topk(K)
    return top.values, top.indices


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_divergences_are_those_of_their_definition(name, temperature):
    loss, settings, definition = DEFINITIONS[name]
    z, t = logits(0), logits(1)
    pairs = zip(probabilities(t, temperature), probabilities(z, temperature), strict=True)
    expected = [temperature**2 * definition(p, q) for p, q in pairs]
    found = loss(z, t, temperature=temperature, **settings)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_gradients_of_divergences(name, temperature):
    loss, settings, _ = DEFINITIONS[name]
    z, t = logits(0, True), logits(1)
    assert gradcheck(lambda z: loss(z, t, temperature=temperature, **settings), z)
    # at the teacher's own logits every divergence is 0, and least
    same = t.clone().requires_grad_()
    found = loss(same, t, temperature=temperature, **settings)
    (gradient,) = torch.autograd.grad(found.sum(), same)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def test_jsd_is_half_and_half_symmetric():
    z, t = logits(0), logits(1)
    torch.testing.assert_close(losses.jsd(z, t, 0.5), losses.jsd(t, z, 0.5))
    assert not torch.allclose(losses.jsd(z, t, 0.3), losses.jsd(t, z, 0.3))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_topk_kl_is_the_divergence_over_k_and_one_cells(temperature):
    z, t = logits(0), logits(1)
    top, indices = top_of(t, temperature)
    expected = []
    for p, q, cells in zip(
        probabilities(t, temperature),
        probabilities(z, temperature),
        indices.tolist(),
        strict=True,
    ):
        lumped = [[r[i] for i in cells] + [1 - sum(r[i] for i in cells)] for r in (p, q)]
        expected.append(temperature**2 * kl(*lumped))
    found = losses.topk_kl(z, top, indices, temperature)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert (found < losses.forward_kl(z, t, temperature)).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_of_topk_kl(temperature):
    top, indices = top_of(logits(1), temperature)
    z = logits(0, True)
    assert gradcheck(lambda z: losses.topk_kl(z, top, indices, temperature), z)


def test_topk_kl_of_all_but_one_token_is_forward_kl():
    z, t = logits(0), logits(1)
    top = torch.log_softmax(t, -1).topk(V - 1)
    found = losses.topk_kl(z, top.values, top.indices)
    torch.testing.assert_close(found, losses.forward_kl(z, t))


def test_topk_kl_of_a_rest_that_vanishes_is_finite():
    """In float32 a sure teacher's k tokens have all the probability there is, or a bit more."""
    t = torch.zeros(1, V)
    t[0, 3] = 60.0
    top = torch.log_softmax(t, -1).topk(K)
    z = torch.zeros(1, V, requires_grad=True)
    for log_probs in (top.values, top.values + 1e-6):
        found = losses.topk_kl(z, log_probs, top.indices)
        (gradient,) = torch.autograd.grad(found.sum(), z)
        assert gradient.isfinite().all()
        torch.testing.assert_close(found, torch.tensor([math.log(V)]), rtol=1e-5, atol=0)


def test_cross_entropy():
    z, labels = logits(0, True), torch.tensor([3, 0, 10, 7, 7])
    q = probabilities(z, 1.0)
    expected = [-math.log(row[label]) for row, label in zip(q, labels.tolist(), strict=True)]
    found = losses.cross_entropy(z, labels)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert gradcheck(lambda z: losses.cross_entropy(z, labels), z)


def test_losses_on_states():
    x, y = logits(0, True), logits(1)
    squares, errors, cosines = [], [], []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        squares.append(sum((i - j) ** 2 for i, j in zip(a, b, strict=True)) / V)
        errors.append(squares[-1] * V / sum(j**2 for j in b))
        lengths = math.hypot(*a) * math.hypot(*b)
        cosines.append(1 - sum(i * j for i, j in zip(a, b, strict=True)) / lengths)
    for loss, expected in (
        (losses.hidden_mse, squares),
        (losses.hidden_error, errors),
        (losses.hidden_cosine, cosines),
    ):
        torch.testing.assert_close(loss(x, y), torch.tensor(expected, dtype=torch.float64))
        assert gradcheck(lambda x, loss=loss: loss(x, y), x)


def test_an_error_relative_to_nothing_is_none():
    x, y = logits(0, True), logits(1)
    y[2] = 0
    found = losses.hidden_error(x, y)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert found[2] == 0
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    assert not gradient[2].any()


@pytest.mark.parametrize("name", DEFINITIONS)
def test_autocast_does_not_round_them(name):
    loss, settings, _ = DEFINITIONS[name]
    z, t = logits(0).float(), logits(1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(z, t, **settings)
    assert torch.equal(found, loss(z, t, **settings))
