"""A block's attention and a converted one, run on the same hidden states.

Of a, what enters the output projection W of the original, and b, what enters the converted one's,
three sums over tokens are kept.  From them come the output projection V that gives most nearly what
the original gave (refit.py), and the errors  E ‖W a - V b‖² / E ‖W a‖²  with any V.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.prune.parts import Parts
from compress.prune.refit import solve_near
from compress.prune.sums import Sums

# A share of the output's energy: what sums in float32 cannot tell from nothing, and a refit would
# take for something.
ROUNDING = 1e-6

# From the arguments that a block hands its attention to those that the converted one takes.
Adapt = Callable[[dict[str, Any]], dict[str, Any]]


def attention_like(
    stock: nn.Module, block: nn.Module, parts: Parts, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The attention of a stock block without weights, with weights like the block's.

    tensors  by name in the block, those that change; the block's own are taken for the others
    """
    converted = copy.deepcopy(stock).get_submodule(parts.attention)
    sample = block.get_parameter(f"{parts.linear('o_proj')}.weight")
    converted = converted.to_empty(device=sample.device).to(sample.dtype)
    own = block.get_submodule(parts.attention).state_dict()
    inside = f"{parts.attention}."
    own |= {name.removeprefix(inside): tensor for name, tensor in tensors.items()}
    converted.load_state_dict({name: own[name] for name in converted.state_dict()})
    return converted


@contextmanager
def attended(
    block: nn.Module, parts: Parts, converted: nn.Module, adapt: Adapt = dict
) -> Iterator[list[Sums]]:
    """Sum over tokens, of a and b (see the module):

    own E a aᵀ, beside E a bᵀ, converted E b bᵀ.
    """
    seen = Sums("attention")
    entered: list[Tensor] = []

    def before_output(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        entered.append(args[0].detach().flatten(0, -2).float())

    def after_attention(_module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        converted(*args, **adapt(kwargs))
        own, other = entered
        entered.clear()
        seen.add("tokens", torch.tensor(len(own), device=own.device))
        seen.add("own", own.T @ own)
        seen.add("beside", own.T @ other)
        seen.add("converted", other.T @ other)

    leaf = parts.linear("o_proj").removeprefix(f"{parts.attention}.")
    attention = block.get_submodule(parts.attention)
    handles = [
        attention.get_submodule(leaf).register_forward_pre_hook(before_output),
        converted.get_submodule(leaf).register_forward_pre_hook(before_output),
        attention.register_forward_hook(after_attention, with_kwargs=True),
    ]
    try:
        yield [seen]
    finally:
        for handle in handles:
            handle.remove()


def refit_output(
    original: Tensor, start: Tensor, sums: Mapping[str, Tensor], damping: float
) -> tuple[Tensor, float, float]:
    """Solve for the output projection; returns it, and the errors of `start` and of itself.

    original  W, float64 [D, a]
    start     V that it is drawn to, float64 [D, b]
    """
    power = float(((original @ sums["own"]) * original).sum())
    cross, moment = original @ sums["beside"], sums["converted"]

    def error(weight: Tensor) -> float:
        lost = power - 2 * (weight * cross).sum() + (weight @ moment * weight).sum()
        return max(float(lost), 0.0) / power if power > 0 else 0.0

    found = start
    if error(start) > ROUNDING:
        found, _ = solve_near(start, cross, moment, damping)
    return found, error(start), error(found)
