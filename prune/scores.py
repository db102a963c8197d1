"""How much the parts of a block matter: by activations, by weights, by chance.

Over B sequences of S tokens, N tokens in all:

    activation     Minitron's score (Muralidharan et al., "Compact Language Models via Pruning and
                   Knowledge Distillation", arXiv 2407.14679, section 2.2):
                   sqrt( sum_b ( mean_s |a[b, s]| )² ) of what enters down (a neuron), of the norm
                   of what enters o (a head's H channels), and of what the norms give, added up
                   over norms (a hidden channel)
    contribution   what goes into the hidden states, and what is read of them: of a head
                   sqrt( 1/N sum ‖W_h a_h‖² ) with its columns W_h of o; of a channel
                   sqrt( 1/N sum x_c² / mean_c x_c² ) of what enters the norms, added up over them;
                   of a neuron as above (its column's norm made it worse; benchmarks/LOG.md)
    magnitude      the norm of the weights that would go
    random         chance

A block's influence is 1 - cos(x, y) of the hidden states before and after it, averaged over tokens
(Men et al., "ShortGPT", arXiv 2403.03853, equation 1).  Its removal loss is by how much the model's
cross-entropy grows when that block alone is passed over (removal.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.core.blocks import linears_of
from compress.prune.parts import ATTENTION, MLP, Parts
from compress.prune.sums import Sums

Score = Literal["contribution", "activation", "magnitude", "random"]


class Activations(Sums):
    """Sums over what runs through a block, float64, by name.

    tokens, influence []    1 - cos, summed
    ffn [F]                 squares of Minitron's means
    heads [N]               the same
    contributions [N]       squares of ‖W_h a_h‖
    hidden.NORM [D]         squares of Minitron's means, of what a norm gives
    share.NORM [D]          x_c² / mean x², of what enters it
    share. [D]              the same of what the block gives
    """

    def __init__(self) -> None:
        super().__init__("a linear or a norm")


@contextmanager
def watching(block: nn.Module, parts: Parts | None, head_dim: int) -> Iterator[list[Activations]]:
    """Sum over all that runs through a block inside this context; without parts, its influence."""
    seen = Activations()
    handles = [block.register_forward_hook(partial(_after_block, seen))]
    if parts is not None:
        handles += _watch_parts(seen, block, parts, head_dim)
    try:
        yield [seen]
    finally:
        for handle in handles:
            handle.remove()


def _after_block(
    seen: Activations, _module: nn.Module, args: tuple[Tensor, ...], output: Any
) -> None:
    before = args[0].float()
    after = (output[0] if isinstance(output, tuple) else output).float()
    cosine = torch.cosine_similarity(before, after, dim=-1)
    seen.add("tokens", torch.tensor(cosine.numel(), device=cosine.device))
    seen.add("influence", (1 - cosine).sum())
    seen.add("share.", _shares(after))


def _watch_parts(
    seen: Activations, block: nn.Module, parts: Parts, head_dim: int
) -> list[RemovableHandle]:
    weight = block.get_parameter(f"{parts.linear('o_proj')}.weight").detach().float()
    weight = weight.unflatten(1, (-1, head_dim))  # [D, N, H]
    gram = torch.einsum("dnh,dni->nhi", weight, weight)

    def before_output(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        heads = args[0].float().unflatten(-1, (-1, head_dim))  # [B, S, N, H]
        seen.add("heads", _minitron(heads.norm(dim=-1)))
        given = torch.einsum("bsnh,nhi->bsni", heads, gram)
        seen.add("contributions", (given * heads).sum(dim=(0, 1, 3)))

    def before_down(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.add("ffn", _minitron(args[0].float()))

    def after_norm(name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.add(f"hidden.{name}", _minitron(output.float()))
            seen.add(f"share.{name}", _shares(args[0].float()))

        return hook

    down = block.get_submodule(parts.linear("down_proj"))
    handles = [
        block.get_submodule(parts.linear("o_proj")).register_forward_pre_hook(before_output),
        down.register_forward_pre_hook(before_down),
    ]
    for name in parts.norms:
        handles.append(block.get_submodule(name).register_forward_hook(after_norm(name)))
    return handles


def _minitron(activation: Tensor) -> Tensor:
    """Squares of means over a sequence, summed over sequences; [B, S, units] gives [units]."""
    return activation.abs().mean(dim=1).square().sum(dim=0)


def _shares(states: Tensor) -> Tensor:
    """x_c² / mean x², summed over tokens; [B, S, D] gives [D]."""
    squares = states.square()
    mean = squares.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)
    return (squares / mean).sum(dim=(0, 1))


def weight_norms(block: nn.Module, parts: Parts | None, head_dim: int) -> dict[str, Tensor]:
    """Norms of the weights of each head, neuron and hidden channel, and of all linears (`block`).

    Of a head its rows of q and columns of o; of a neuron its rows of gate and up and its column of
    down; of a channel its columns and rows of all seven.  Without parts, of all linears alone.
    """
    whole = [linear.weight.detach().double().norm() for linear in linears_of(block).values()]
    found = {"block": torch.stack(whole).norm().cpu()}
    if parts is None:
        return found
    squares = {
        leaf: block.get_parameter(f"{parts.linear(leaf)}.weight").detach().double().square()
        for leaf in (*ATTENTION, *MLP)
    }
    writers = ("o_proj", "down_proj")
    of_units = {
        "heads": (squares["q_proj"].sum(1) + squares["o_proj"].sum(0))
        .unflatten(0, (-1, head_dim))
        .sum(1),
        "ffn": squares["gate_proj"].sum(1)
        + squares["up_proj"].sum(1)
        + squares["down_proj"].sum(0),
        "hidden": sum(
            (square.sum(1 if leaf in writers else 0) for leaf, square in squares.items()),
            start=torch.zeros((), dtype=torch.float64),
        ),
    }
    return found | {name: square.sqrt().cpu() for name, square in of_units.items()}


def unit_scores(
    score: Score, sums: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Scores of a block's `heads` [N], `ffn` [F] and `hidden` channels [D].

    sums, weights  what `watching` and `weight_norms` found
    seed           of `random`
    """
    if score == "magnitude":
        return {name: weights[name] for name in ("heads", "ffn", "hidden")}
    if score == "random":
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.rand(weights[name].shape, generator=generator, dtype=torch.float64)
            for name in ("heads", "ffn", "hidden")
        }
    heads, hidden = {
        "activation": ("heads", "hidden."),
        "contribution": ("contributions", "share."),
    }[score]
    norms = [key for key in sums if key.startswith(hidden) and key != hidden]
    return {
        "heads": sums[heads].sqrt(),
        "ffn": sums["ffn"].sqrt(),
        "hidden": torch.stack([sums[key].sqrt() for key in norms]).sum(0),
    }


def block_score(
    score: str, sums: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int
) -> float:
    """How much a block matters: its `influence`, `removal` loss, `magnitude`, or at `random`."""
    if score == "influence":
        return float(sums["influence"] / sums["tokens"])
    if score == "removal":
        return float(sums["removal"])
    if score == "magnitude":
        return float(weights["block"])
    return float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
