"""The weights that are kept, solved for anew.

A linear of weight W [out, K] read x, of which the channels c are kept.  Without more ado it would
be left with V = W[:, c].  Least squares over all calibration tokens, drawn towards V by λ:

    min E ‖W x - V' x_c‖² + λ ‖V' - V‖²
    V' = V + (W H[:, c] - V H[c, c]) (H[c, c] + λ I)^-1,     H = E[x xᵀ]

so the channels that are kept stand in for those that go, as far as they are correlated: for a set
of channels this is optimal brain surgery's update of the weights that stay (Hassibi and Stork,
1993; of heads and neurons of transformers, Kwon et al., arXiv 2204.09656, section 4.3).  It needs
no second pass: H is the statistic that every method here is computed from.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Refitted:
    """A weight V' with what it lost: E ‖W x - V' x_c‖² / E ‖W x‖², of V itself in `cut_error`."""

    weight: Tensor
    error: float
    cut_error: float
    damping: float


def refit(weight: Tensor, kept: Tensor, second_moment: Tensor, damping: float) -> Refitted:
    """Solve for the columns of a weight that are kept.

    weight         W, float32 [out, K]
    kept           c, int64 [K']
    second_moment  H, float32 [K, K]
    damping        λ as a share of the mean of H[c, c]'s diagonal; raised where it takes more
    """
    beside = second_moment.index_select(1, kept)  # [K, K']
    moment = beside.index_select(0, kept)
    start = weight.index_select(1, kept)
    found, damping = solve_near(start, weight @ beside, moment, damping)
    output = weight @ second_moment
    power = float((output * weight).sum())

    def error(left: Tensor) -> float:
        """tr(W H Wᵀ) - 2 tr(V H[c, :] Wᵀ) + tr(V H[c, c] Vᵀ), as a share of the first."""
        lost = (
            power - 2 * (left * output.index_select(1, kept)).sum() + (left @ moment * left).sum()
        )
        return max(float(lost), 0.0) / power if power > 0 else 0.0

    return Refitted(found, error(found), error(start), damping)


def solve_near(
    start: Tensor, cross: Tensor, moment: Tensor, damping: float
) -> tuple[Tensor, float]:
    """The weight V' that gives y from x by least squares, drawn towards V; and λ's share.

    start    V, float32 [out, K]
    cross    E[y xᵀ], float32 [out, K]
    moment   E[x xᵀ], float32 [K, K]
    damping  λ as a share of the mean of the moment's diagonal; raised where it takes more
    """
    mean = moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    identity = torch.eye(len(moment), device=moment.device, dtype=moment.dtype)
    factor, failed = torch.linalg.cholesky_ex(moment + damping * mean * identity)
    while failed and math.isfinite(damping):
        damping *= 10
        factor, failed = torch.linalg.cholesky_ex(moment + damping * mean * identity)
    return start + torch.cholesky_solve((cross - start @ moment).T, factor).T, damping
