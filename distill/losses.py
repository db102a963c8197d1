"""Losses of tokens: pure functions of logits [T, V] or hidden states [T, D] that give [T].

With z the student's logits, q = softmax(z / τ), p = the teacher's softmax(t / τ):

    forward_kl     τ² Σ p (log p - log q)
    reverse_kl     τ² Σ q (log q - log p)
    jsd            τ² (β KL(p ‖ m) + (1 - β) KL(q ‖ m)),   m = β p + (1 - β) q
    topk_kl        forward_kl over k + 1 cells: the teacher's k likeliest tokens, and the rest
    cross_entropy  -log softmax(z)[label]
    hidden_mse     mean over D of (x - y)²
    hidden_error   Σ (x - y)² / Σ y²
    hidden_cosine  1 - cos(x, y)

τ² keeps the size of the gradients as the temperature τ grows (Hinton et al., arXiv 1503.02531,
section 2).  jsd is the generalized Jensen-Shannon divergence of Agarwal et al., "GKD", arXiv
2306.13649, equation 1.  All compute in the dtype that they are given: float32 or float64.
Gradients flow into the first argument, and into the teacher's where that asks for them.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def forward_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of each token: [T, V], [T, V] -> [T]."""
    log_q = _log_softmax(logits, temperature)
    log_p = _log_softmax(teacher_logits, temperature)
    return temperature**2 * _kl(log_p, log_q)


def reverse_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student ‖ teacher) of each token: [T, V], [T, V] -> [T]."""
    log_q = _log_softmax(logits, temperature)
    log_p = _log_softmax(teacher_logits, temperature)
    return temperature**2 * _kl(log_q, log_p)


def jsd(
    logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Generalized Jensen-Shannon divergence of each token, 0 < beta < 1: [T, V], [T, V] -> [T]."""
    log_q = _log_softmax(logits, temperature)
    log_p = _log_softmax(teacher_logits, temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def topk_kl(
    logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher ‖ student) of each token, with all but the teacher's k likeliest as one cell.

    logits [T, V]; teacher_log_probs [T, k], log p at the same temperature; teacher_indices [T, k]
    int64, k < V.  Never above `forward_kl`, since lumping cells loses what differs inside them, and
    equal to it where the student spreads the rest as the teacher does.
    """
    z = _divided(logits, temperature)
    top = z.gather(-1, teacher_indices)
    # the rest by its own logits, since 1 - Σ q is all rounding where the k cover nearly all
    rest = z.scatter(-1, teacher_indices, -math.inf).logsumexp(-1)
    whole = torch.logaddexp(top.logsumexp(-1), rest)
    p_rest = (1 - teacher_log_probs.exp().sum(-1)).clamp_min(0)
    of_rest = torch.xlogy(p_rest, p_rest) - p_rest * (rest - whole)
    return temperature**2 * (_kl(teacher_log_probs, top - whole.unsqueeze(-1)) + of_rest)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-probability of each label: [T, V], int64 [T] -> [T]."""
    return F.cross_entropy(logits, labels, reduction="none")


def hidden_mse(states: Tensor, teacher_states: Tensor) -> Tensor:
    """Squared difference of each token's states, mean over D: [T, D], [T, D] -> [T]."""
    return (states - teacher_states).square().mean(-1)


def hidden_error(states: Tensor, teacher_states: Tensor) -> Tensor:
    """`hidden_mse` as a share of the teacher's mean square: [T, D], [T, D] -> [T].

    0 where the teacher's states are, which are no measure of anything.
    """
    squares = teacher_states.square().sum(-1)
    known = squares > 0
    return known * (states - teacher_states).square().sum(-1) / squares.where(known, 1)


def hidden_cosine(states: Tensor, teacher_states: Tensor) -> Tensor:
    """1 - cosine of the angle between each token's states: [T, D], [T, D] -> [T]."""
    return 1 - F.cosine_similarity(states, teacher_states, dim=-1)


def _divided(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(_divided(logits, temperature), -1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p - log q) over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)  # autocast would round a product of vectors
