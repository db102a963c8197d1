"""Losses between states inside the two models: outputs of blocks, and of their attention.

A loss is the sum over predicted tokens of its mean over the pairs of blocks that are compared.
Where the student's states are narrower or wider than the teacher's, a linear map [D', D] comes
between, one for each pair and kind of state, trained with the student (FitNets, arXiv 1412.6550,
section 2.2; without a nonlinearity as in TinyBERT, arXiv 1909.10351, equation 8).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.distill import losses
from compress.distill.model_parts import attention_of, blocks_of, inner_model

Layers = Literal["even"] | tuple[tuple[int, int], ...]
# name -> what it reads, and the loss of a token
KINDS = {
    "hidden_mse": ("block", losses.hidden_mse),
    "hidden_cosine": ("block", losses.hidden_cosine),
    "attention_mse": ("attention", losses.hidden_mse),
    "attention_error": ("attention", losses.hidden_error),
}


class StateLosses(nn.Module):
    """The losses in `weights` (names of KINDS), between pairs of blocks.

    Raises InputError for a pair that names a block which is not there.
    """

    def __init__(
        self, weights: Mapping[str, float], layers: Layers, model: nn.Module, teacher: nn.Module
    ) -> None:
        super().__init__()
        ours, theirs = blocks_of(model), blocks_of(teacher)
        self.weights = dict(weights)
        self.pairs = paired(layers, len(ours), len(theirs))
        kinds = sorted({KINDS[name][0] for name in weights})
        self.of_student = _modules(kinds, ours, [pair[0] for pair in self.pairs])
        self.of_teacher = _modules(kinds, theirs, [pair[1] for pair in self.pairs])
        # keys and values may go behind hidden states (compress.core.cross_layer)
        self.widths = widths = [inner_model(m).config.hidden_size for m in (model, teacher)]
        like = next(model.parameters())
        self.projections = nn.ModuleDict()
        if widths[0] != widths[1]:
            for name in self.of_student:
                self.projections[name] = _projection(*widths).to(like.device)

    def forward(
        self, states: Mapping[str, Tensor], teacher_states: Mapping[str, Tensor], kept: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and each loss's own sum.

        states and teacher_states hold [B, S, D] for each name in `of_student`, `of_teacher`; kept,
        bool [B * S], says which positions count.  Computed in float32, or float64 where states are.

        Raises InputError where the states come without gradients.
        """
        if torch.is_grad_enabled():
            _check_gradients(states)
        ours, theirs = self.widths
        picked = {
            name: self._tokens(name, states[name][..., :ours], kept) for name in self.of_student
        }
        target = {
            name: _exact(teacher_states[name][..., :theirs].flatten(0, 1)[kept]) for name in picked
        }
        sums = {}
        for name in self.weights:
            kind, loss = KINDS[name]
            each = [loss(picked[n], target[n]).sum() for n in picked if n.startswith(kind)]
            sums[name] = torch.stack(each).mean()
        total = sum(weight * sums[name] for name, weight in self.weights.items())
        return total, {name: value.detach() for name, value in sums.items()}  # type: ignore

    def _tokens(self, name: str, states: Tensor, kept: Tensor) -> Tensor:
        states = states.flatten(0, 1)[kept]
        if name in self.projections:
            projection = cast(nn.Linear, self.projections[name])
            states = projection(states.to(projection.weight.dtype))
        return _exact(states)


def paired(layers: Layers, ours: int, theirs: int) -> Sequence[tuple[int, int]]:
    """Pairs of blocks (the student's, the teacher's) of models with so many blocks.

    Raises InputError for a pair outside of them.
    """
    if layers == "even":
        return [(i, round((i + 1) * theirs / ours) - 1) for i in range(ours)]
    for pair in layers:
        if not (0 <= pair[0] < ours and 0 <= pair[1] < theirs):
            raise InputError(
                f"layers: pair {pair[0]}, {pair[1]} is not there; the student has blocks 0 to "
                f"{ours - 1}, the teacher 0 to {theirs - 1}"
            )
    return layers


def _modules(
    kinds: Sequence[str], blocks: nn.ModuleList, picked: Sequence[int]
) -> dict[str, nn.Module]:
    """The modules whose outputs are compared, by a name that a pair's two sides share."""
    module_of: dict[str, Any] = {"block": lambda block: block, "attention": attention_of}
    return {
        f"{kind}-{place}": module_of[kind](blocks[index])
        for kind in kinds
        for place, index in enumerate(picked)
    }


def _check_gradients(states: Mapping[str, Tensor]) -> None:
    kinds = {name.split("-")[0] for name in states}
    alive = {name.split("-")[0] for name, tensor in states.items() if tensor.requires_grad}
    if without := sorted(kinds - alive):
        raise InputError(
            f"the student's states ({', '.join(without)}) have no gradients; checkpoint its "
            "activations with use_reentrant=False, and train something ahead of the states"
        )


def _projection(width: int, target: int) -> nn.Linear:
    linear = nn.Linear(width, target, bias=False)
    nn.init.orthogonal_(linear.weight)
    return linear


def _exact(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
