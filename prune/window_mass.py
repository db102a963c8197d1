"""How much of a block's attention lies beyond a window, and what its output loses without it.

transformers hands queries, keys and values, as turned, to one function, which its classes look up
by name.  While a block is watched that name is ours: queries go through in runs, so that a run's
softmax [B, N, run, S] is small, and give what they always give.

    beyond [N]     sum over queries of the softmax's mass at j <= i - W
    queries        how many there were: those with i >= W, since the others have nothing beyond
    lost, power    of these, sums of ‖o (a - a')‖² and ‖o a‖²; a' is a without what lies beyond
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.prune.parts import Parts
from compress.prune.sums import Sums

NAME = "compress_window_mass"  # of our function, for transformers
RUN_ELEMENTS = 1 << 23  # of a softmax
WORKSPACE = 4 * 5 * RUN_ELEMENTS  # bytes: scores, softmax, what is inside, two masks


@contextmanager
def watched(block: nn.Module, parts: Parts, window: int) -> Iterator[list[Sums]]:
    """Sum over the queries of a block that runs what the module says."""
    from transformers import AttentionInterface

    attention = block.get_submodule(parts.attention)
    leaf = parts.linear("o_proj").removeprefix(f"{parts.attention}.")
    output = attention.get_submodule(leaf)
    assert isinstance(output, nn.Linear)
    seen = _Beyond(window)
    config: Any = attention.config
    before = config._attn_implementation
    AttentionInterface.register(NAME, seen.attend)
    handle = output.register_forward_hook(seen.after_output)
    config._attn_implementation = NAME
    try:
        yield [seen.sums]
    finally:
        config._attn_implementation = before
        handle.remove()


class _Beyond:
    """Computes attention with and without a window, and sums up the difference."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.sums = Sums("attention")
        # a and a' [B, S, N H] in float32: what enters the output projection, and what would
        self._pair: tuple[Tensor, Tensor] | None = None

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attention as transformers' functions give it, [B, S, N, H]; the text has no padding.

        query  [B, N, S, H]
        key, value  [B, K, S, H]
        """
        batch, heads, length, head_dim = query.shape
        scale = head_dim**-0.5 if scaling is None else scaling
        repeats = heads // key.shape[1]
        keys = key.repeat_interleave(repeats, 1).float()
        values = value.repeat_interleave(repeats, 1).float()
        run = max(1, RUN_ELEMENTS // (batch * heads * length))
        whole, inside = [], []
        for first in range(0, length, run):
            rows = query[:, :, first : first + run].float()
            found = self._run(rows * scale, keys, values, first)
            whole.append(found[0])
            inside.append(found[1])
        out, within = (torch.cat(runs, 2).transpose(1, 2).contiguous() for runs in (whole, inside))
        self._pair = out.flatten(2), within.flatten(2)
        return out.to(query.dtype), None

    def _run(
        self, queries: Tensor, keys: Tensor, values: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """Attention of queries [B, N, r, H] from position `first` on, and that of the window."""
        end = first + queries.shape[2]
        places = torch.arange(end, device=queries.device)
        own = places[first:, None]
        scores = queries @ keys[:, :, :end].transpose(-1, -2)
        weights = scores.masked_fill(places > own, -torch.inf).softmax(-1)
        whole = weights @ values[:, :, :end]
        if end <= self.window:
            return whole, whole
        weights = weights.masked_fill(places <= own - self.window, 0)
        kept = weights.sum(-1)
        judged = own[:, 0] >= self.window
        count = int(judged.sum())
        self.sums.add("queries", torch.tensor(len(queries) * count, device=queries.device))
        self.sums.add("beyond", (1 - kept[..., judged]).clamp(min=0).sum((0, 2)))
        inside = weights @ values[:, :, :end]
        return whole, inside / kept.clamp(min=torch.finfo(kept.dtype).tiny)[..., None]

    def after_output(self, module: nn.Module, _args: Any, _output: Tensor) -> None:
        """Add up what the output projection makes of the difference."""
        assert self._pair is not None
        (whole, inside), self._pair = self._pair, None
        if whole.shape[1] <= self.window:
            return
        whole, inside = whole[:, self.window :], inside[:, self.window :]
        weight = module.get_parameter("weight").float()
        self.sums.add("lost", F.linear(whole - inside, weight).square().sum())
        self.sums.add("power", F.linear(whole, weight).square().sum())
