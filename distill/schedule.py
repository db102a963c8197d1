"""The learning rate at each step, relative to its peak.

With n steps, w = warmup * n, d = decay * n, m = min_ratio, at step s = 0, 1, ..., n - 1:

    warm-up    (s + 1) / w                                   while s < w
    cosine     m + (1 - m) (1 + cos(pi t)) / 2,   t = (s - w) / (n - w)              [1]
    wsd        1, and in the last d steps  1 - (1 - m) (s - (n - d)) / d             [2]
    constant   1

[1] Loshchilov and Hutter, SGDR, 2017, arXiv:1608.03983, equation 5, without restarts.
[2] Hu et al., MiniCPM, 2024, arXiv:2404.06395, section 4; the decay is linear, as in Haegele et
    al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, 2024,
    arXiv:2405.18392, section 3.
"""

import math

from compress.distill.config import TrainConfig


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """What the peak learning rate is multiplied by at a step, counted from 0; above 0."""
    steps, lowest = config.steps, config.min_ratio
    warmup = config.warmup * steps
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    if config.schedule == "cosine":
        way = (step - warmup) / (steps - warmup)
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * way)) / 2
    decay = config.decay * steps
    if config.schedule == "wsd" and step > steps - decay:
        return 1 - (1 - lowest) * (step - (steps - decay)) / decay
    return 1.0
