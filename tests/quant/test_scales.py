"""The search for scales, on a matrix in pieces."""

import pytest
import torch

from compress.quant import scales
from compress.quant.scales import ScaleSearch, steps_of
from compress.quant.weight import minmax_grid


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pieces", [1 << 12, 1 << 10])
def test_pieces_of_a_matrix_give_what_it_gives_whole(pieces, symmetric, monkeypatch):
    """Runs of groups, and where a group is larger than a piece, runs of its rows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 96, generator=generator)
    x = torch.randn(400, 96, generator=generator)
    moment = x.T @ x / len(x)
    metric = torch.stack([moment[i : i + 16, i : i + 16] for i in range(0, 96, 16)])
    scale, zero = minmax_grid(weight, 4, 16, symmetric)
    zero = None if zero is None else zero.T.float()
    grouped = weight.T.reshape(6, 16, 200).contiguous()
    search = ScaleSearch(8, 0.5)

    def loss(found: torch.Tensor) -> torch.Tensor:
        change = steps_of(grouped, found, zero, 4) * found.unsqueeze(1) - grouped
        return ((metric @ change) * change).sum(dim=1)

    whole = search.best(grouped, metric, scale.T, zero, 4)
    monkeypatch.setattr(scales, "AT_ONCE", pieces)
    in_pieces = search.best(grouped, metric, scale.T, zero, 4)
    assert in_pieces.shape == whole.shape
    # A tie may fall to the other side where a product's last bits differ: the losses are the same.
    torch.testing.assert_close(loss(in_pieces), loss(whole), rtol=1e-4, atol=1e-6)
