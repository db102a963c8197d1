"""What a walk over blocks keeps for layers that share keys and values: sums, and what is handed on.

What the first layer of a run has to say to the others goes behind its hidden states, in one tensor,
as it does in the converted model (compress/core/cross_layer.py).  So it is stored with them, and a
run that is broken off between two layers goes on.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.prune.attention import Pairs
from compress.prune.beside import attended
from compress.prune.gqa import Turned
from compress.prune.parts import Parts
from compress.prune.sums import Sums


@contextmanager
def handing_on(block: nn.Module, width: int, first: bool, last: bool) -> Iterator[list[Tensor]]:
    """Let what the first block of a run puts in the list come to the others of it.

    It goes behind the hidden states [B, S, width], in one tensor, so that it is stored with them.
    """
    tail: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tail[:] = [args[0][..., width:]]
        return (args[0][..., :width], *args[1:])

    def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return torch.cat([output, tail[0]], dim=-1)

    with ExitStack() as stack:
        if not first:
            stack.callback(block.register_forward_pre_hook(before).remove)
        if not last:
            stack.callback(block.register_forward_hook(after).remove)
        yield tail


@contextmanager
def moments(
    block: nn.Module, parts: Parts, width: int, pairs: Pairs, first: bool, last: bool
) -> Iterator[list[Sums]]:
    """Sum over tokens what `add_layer` (shared_kv.py) asks for: `_Moments` says what."""
    with handing_on(block, width, first, last) as tail, ExitStack() as stack:
        seen = _Moments(width, pairs, first, tail)

        def linear(leaf: str) -> nn.Module:
            return block.get_submodule(parts.linear(leaf))

        attention = block.get_submodule(parts.attention)
        inside = dict(attention.named_children())
        handles = [
            attention.register_forward_pre_hook(seen.before_attention, with_kwargs=True),
            inside.get("q_norm", linear("q_proj")).register_forward_hook(seen.after_q),
            linear("k_proj").register_forward_hook(seen.after_k),
            linear("v_proj").register_forward_hook(seen.after_v),
            linear("o_proj").register_forward_pre_hook(seen.before_o),
        ]
        if "k_norm" in inside:
            handles.append(inside["k_norm"].register_forward_hook(seen.after_k_norm))
        for handle in handles:
            stack.callback(handle.remove)
        yield [seen.sums]


class _Moments:
    """Hooks of a block's attention, and what they sum over tokens.

    inputs, means, phasor   of a run's first layer, as `Run` has them but for 1 - |r|²
    cross k, cross v        of the others: keys, and values, by x
    queries, keys           squares, of queries after their norm
    value, values           of values [K H], and their products
    attended, attended squares   of what enters o [N H]
    joint, first size, own size  `Run.beside`

    Handed on is x [D], and with norms on keys the first layer's normed ones behind it.
    """

    def __init__(self, width: int, pairs: Pairs, first: bool, tail: list[Tensor]) -> None:
        self.width, self.first, self.tail = width, first, tail
        self.turned = Turned(2 * len(pairs.real), pairs)
        self.sums = Sums("attention")
        self.x = torch.empty(0)  # float32 [B S, D + 1], with a 1 at the end

    def before_attention(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.first:
            self.tail[:] = [args[0] if args else kwargs["hidden_states"]]
        x = self.tail[0][..., : self.width].float()
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        self.x, self.turned.angles = x.flatten(0, 1), kwargs["position_embeddings"]
        self.sums.add("tokens", torch.tensor(len(self.x), device=x.device))
        if self.first:
            mean, length = x.mean(1), x.shape[1]
            self.sums.add("inputs", self.x.T @ self.x)
            self.sums.add("means", length * (mean.T @ mean))
            phasor = _phasor(*kwargs["position_embeddings"]).expand(len(x), -1).sum(0)
            self.sums.add("phasor", length * phasor)

    def after_q(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.sums.add("queries", output.flatten(2).flatten(0, 1).float().square().sum(0))

    def after_k(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        rows = output.flatten(0, -2).float()
        self.sums.add("keys", rows.square().sum(0))
        if not self.first:
            self.sums.add("cross k", rows.T @ self.x)

    def after_v(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        rows = output.flatten(0, -2).float()
        self.sums.add("value", rows.sum(0))
        self.sums.add("values", rows.T @ rows)
        if not self.first:
            self.sums.add("cross v", rows.T @ self.x)

    def after_k_norm(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        own = output.flatten(2)  # [B, S, K H]
        if self.first:
            self.tail[:] = [torch.cat([self.tail[0], own], dim=-1)]
            return
        found = (self.turned(keys.float()) for keys in (own, self.tail[0][..., self.width :]))
        keys, given = (one - one.mean(1, keepdim=True) for one in found)  # complex [B, S, K, P]
        joint = torch.einsum("bsjp,bslp->plj", keys, given.conj())
        self.sums.add("joint", torch.view_as_real(joint))
        self.sums.add("first size", given.abs().square().sum((0, 1)).T)
        self.sums.add("own size", keys.abs().square().sum((0, 1)).T)

    def before_o(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).float()
        self.sums.add("attended", rows.sum(0))
        self.sums.add("attended squares", rows.square().sum(0))


def _phasor(cosine: Tensor, sine: Tensor) -> Tensor:
    """|r|² of each frequency over a sequence, [B or 1, P], from angles [B or 1, S, 2 P]."""
    cosine, sine = cosine.float(), sine.float()
    mean = cosine.mean(1).square() + sine.mean(1).square()
    size = (cosine.square() + sine.square()).mean(1)  # 1, or a scaling
    return (mean / size)[:, : cosine.shape[-1] // 2]


@contextmanager
def beside(
    block: nn.Module, parts: Parts, converted: nn.Module, width: int, first: bool, last: bool
) -> Iterator[list[Sums]]:
    """`attended`, with keys and values of the first layer's converted attention handed on."""
    head_dim: Any = converted.head_dim
    with handing_on(block, width, first, last) as tail:

        def keep(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            tail[:] = [torch.cat([part.transpose(1, 2).flatten(2) for part in output[1:]], dim=-1)]

        def adapt(kwargs: dict[str, Any]) -> dict[str, Any]:
            if first:
                return kwargs
            heads = (part.unflatten(-1, (-1, head_dim)) for part in tail[0].chunk(2, dim=-1))
            return kwargs | {"handed": tuple(part.transpose(1, 2) for part in heads)}

        converted.register_forward_hook(keep)
        with attended(block, parts, converted, adapt) as seen:
            yield seen
