"""The refitted weight against least squares on the samples themselves."""

import pytest
import torch

from compress.prune.refit import refit


@pytest.fixture
def samples():
    """Correlated channels: x float64 [N, K], a weight [out, K]."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    x = torch.randn(500, 24, generator=generator, dtype=torch.float64) @ mix
    return x, torch.randn(10, 24, generator=generator, dtype=torch.float64)


def test_is_ridge_regression_towards_the_cut_weight(samples):
    x, weight = samples
    kept = torch.tensor([0, 3, 4, 7, 8, 9, 15, 16, 20, 21, 22, 23])
    moment = x.T @ x / len(x)
    found = refit(weight, kept, moment, damping=0.05)
    # the same as least squares on samples with rows added that say "stay with V"
    strength = (0.05 * moment[kept, kept].mean() * len(x)).sqrt()
    rows = torch.cat([x[:, kept], strength * torch.eye(len(kept), dtype=torch.float64)])
    targets = torch.cat([x @ weight.T, strength * weight[:, kept].T])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-8)
    power = (x @ weight.T).square().sum()
    for left, error in ((found.weight, found.error), (weight[:, kept], found.cut_error)):
        measured = (x @ weight.T - x[:, kept] @ left.T).square().sum() / power
        assert error == pytest.approx(measured.item(), rel=1e-9)
    assert found.error < found.cut_error / 2


def test_uncorrelated_channels_keep_the_weight(samples):
    _, weight = samples
    found = refit(weight, torch.arange(12), torch.eye(24, dtype=torch.float64), damping=0.01)
    torch.testing.assert_close(found.weight, weight[:, :12])
    assert found.error == found.cut_error


def test_a_singular_moment_raises_the_damping(samples):
    """Float32, and a channel that repeats another one exactly: H[c, c] has no inverse."""
    x, weight = (tensor.float() for tensor in samples)
    x[:, 1] = x[:, 0]
    x *= 1e3
    moment = x.T @ x / len(x)
    found = refit(weight, torch.arange(20), moment, damping=1e-12)
    assert found.damping > 1e-12
    assert torch.isfinite(found.weight).all()
    assert found.error <= found.cut_error


def test_an_input_that_is_always_zero_changes_nothing(samples):
    _, weight = samples
    found = refit(weight, torch.arange(5), torch.zeros(24, 24, dtype=torch.float64), damping=0.01)
    torch.testing.assert_close(found.weight, weight[:, :5])
    assert found.error == 0
