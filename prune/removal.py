"""What a model loses when one of its blocks is passed over."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@torch.inference_mode()
def loss_without(model: nn.Module, block: nn.Module | None, tokens: Tensor) -> float:
    """Mean cross-entropy of a causal language model with a block passed over, in nats a token.

    block   one of the model's; None for the whole model
    tokens  int64 [N, S], of which all but the first of each row are predicted
    """
    losses = []
    with passed_over(block):
        for row in tokens.to(next(model.parameters()).device).split(1):
            logits = model(input_ids=row, use_cache=False).logits[0, :-1]  # [S - 1, V]
            losses.append(cross_entropy(logits.float(), row[0, 1:]))
    return float(torch.stack(losses).mean())


@contextmanager
def passed_over(block: nn.Module | None) -> Iterator[None]:
    """Let a block give the hidden states that it gets; the others keep their numbers, by which
    some classes choose masks."""
    if block is None:
        yield
        return

    def give_back(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    handle = block.register_forward_hook(give_back)
    try:
        yield
    finally:
        handle.remove()
