"""Batches as the loop makes them, and students that differ from their teachers."""

from typing import Any

import torch
from torch import Tensor, nn


def batch_of(rows: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens; the first sequence holds two documents, whose last tokens predict nothing."""
    tokens = torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length).repeat(rows, 1)
    positions[0, 5:] -= 5
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, 4] = -100
    index = torch.arange(rows)
    return {"input_ids": tokens, "position_ids": positions, "labels": labels, "index": index}


def split(batch: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """A batch in smaller ones."""
    parts = {name: tensor.split(rows) for name, tensor in batch.items()}
    return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]


def noisy(model: Any, seed: int = 1, amount: float = 0.05) -> Any:
    """The model itself, its parameters moved at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)
    return model


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """The gradients there are, by name."""
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
