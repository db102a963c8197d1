"""Statistics of what enters the linears of a block, one set per distinct input tensor.

For an input x of width K seen over N tokens:

    second_moment H = 1/N sum x xᵀ     [K, K]
    cross_moment  C = 1/N sum x₀ xᵀ    [K, K], where x₀ is the original model's input for the same
                                       token, if both were run
    mean_abs        = 1/N sum |x|      [K]
    share_above     = 1/N count of |x| >= a bound    [K], if a method asks for it
    max_abs         = max |x|          [K]

q, k and v share one input, gate and up another, so a Llama block has 7 linears and 4 sets.  For a
linear with weight W and a changed weight W + dW the mean squared output error per token is

    E ‖dW x‖² = tr(dW H dWᵀ),

exactly and on all tokens, so methods search over their parameters by arithmetic on W and H, and
no forward pass is repeated.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.core.blocks import linears_of
from compress.core.processes import Processes
from compress.core.shards import all_finite

TILE = 256  # columns of H computed at once; only tiles on and above the diagonal are


@dataclass
class InputStatistics:
    """Statistics of one input tensor: sums while it is collected, means once one is asked for.

    `linears` names the linears of the block that read it, `width` is K, `bound` is for share_above.
    Tensors are float32, and the statistics' own: whoever asks for one does not change it.
    """

    linears: tuple[str, ...]
    width: int
    device: torch.device
    bound: float | None = None
    tokens: int = 0
    max_abs: Tensor = field(init=False)
    _outer: Tensor = field(init=False)
    _cross: Tensor | None = field(init=False, default=None)
    _sum_abs: Tensor = field(init=False)
    _above: Tensor = field(init=False)
    _finished: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._outer = torch.zeros(self.width, self.width, device=self.device)
        self._sum_abs = torch.zeros(self.width, device=self.device)
        self.max_abs = torch.zeros(self.width, device=self.device)
        self._above = torch.zeros(self.width, dtype=torch.int64, device=self.device)

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Take in a batch of inputs, and the original model's for the same tokens, [..., K]."""
        assert not self._finished, "a statistic was already read"
        flat = x.detach().reshape(-1, self.width)
        if original is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self._outer)
            with _products_for(flat):
                self._cross += original.reshape(-1, self.width).float().T @ flat.float()
        magnitude = flat.abs()
        self._sum_abs += magnitude.sum(dim=0, dtype=torch.float32)
        torch.maximum(self.max_abs, magnitude.amax(dim=0).float(), out=self.max_abs)
        if self.bound is not None:
            self._above += (magnitude >= self.bound).sum(dim=0)
        self.tokens += flat.shape[0]
        _add_outer_product(self._outer, flat)

    @property
    def what(self) -> str:
        """The linears, in a message."""
        return ", ".join(self.linears)

    def is_finite(self) -> bool:
        """Whether no input was NaN or infinite."""
        return all_finite(self.max_abs)

    def pool(self, processes: Processes) -> None:
        """Take in what the other processes saw; all of them call this, and end up equal."""
        count = torch.tensor(self.tokens, device=self.device)
        crosses = [] if self._cross is None else [self._cross]
        processes.add(count, self._outer, self._sum_abs, self._above, *crosses)
        processes.largest(self.max_abs)
        self.tokens = int(count)

    def rescale(self, spread: Tensor) -> None:
        """Make these the statistics of x / spread, where spread > 0 is [K], in place."""
        self._finish()
        moments = [self._outer] if self._cross is None else [self._outer, self._cross]
        for moment in moments:
            moment /= spread
            moment /= spread.unsqueeze(1)
        self._sum_abs /= spread
        self.max_abs /= spread

    @property
    def share_above(self) -> Tensor:
        """The share of tokens in which a channel's |x| is `bound` or more, float32 [K]."""
        assert self.bound is not None, "not counted"
        return self._above / max(self.tokens, 1)

    @property
    def cross_moment(self) -> Tensor | None:
        """C = E[x₀ xᵀ], float32 [K, K]; None when originals were not given."""
        self._finish()
        return self._cross

    @property
    def mean_abs(self) -> Tensor:
        """Mean |x| per channel, float32 [K]."""
        self._finish()
        return self._sum_abs

    @property
    def second_moment(self) -> Tensor:
        """H = E[x xᵀ], float32 [K, K], symmetric."""
        self._finish()
        return self._outer

    def _finish(self) -> None:
        """Turn sums into means, in place, and fill in the tiles below the diagonal."""
        if self._finished:
            return
        self._finished = True
        for total in (self._outer, self._sum_abs, *([] if self._cross is None else [self._cross])):
            total /= max(self.tokens, 1)
        for start in range(0, self.width, TILE):
            stop = min(start + TILE, self.width)
            self._outer[stop:, start:stop] = self._outer[start:stop, stop:].T


def _add_outer_product(total: Tensor, x: Tensor) -> None:
    """Add xᵀx to `total` [K, K], on and above the tile diagonal only.

    Inputs in bfloat16 are exact in float32, and their products may be formed by the processor's
    bfloat16 units with float32 accumulation: same products, several times the speed.  Other inputs
    are multiplied in float32.
    """
    with _products_for(x):
        x = x.float()
        for start in range(0, x.shape[1], TILE):
            stop = min(start + TILE, x.shape[1])
            total[start:stop, start:] += x[:, start:stop].T @ x[:, start:]


def _products_for(x: Tensor) -> AbstractContextManager[None]:
    """How products of inputs are formed (see `_add_outer_product`)."""
    return bfloat16_products() if x.dtype == torch.bfloat16 else nullcontext()


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Inside, float32 matrix products may round their inputs to bfloat16; sums stay float32."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


@contextmanager
def collecting(
    block: nn.Module,
    with_originals: bool = False,
    outputs: bool = True,
    bound: float | None = None,
) -> Iterator[list[InputStatistics]]:
    """Collect statistics of every linear's input while the block runs inside this context.

    `with_originals`: calls come in pairs, the first of each on the original model's hidden states,
    the second on those that statistics are of.  `outputs=False`: what the block returns is not
    used, so the linears that come last are not multiplied by (from the second call on).  `bound`:
    for `share_above`.

    Yields a list that fills during the first run: one InputStatistics per distinct input tensor,
    in the order of the forward pass.  Linears count as sharing an input when they are handed the
    same tensor (same memory, shape and strides) in one call of the block.
    """
    groups: list[InputStatistics] = []
    leader_of: dict[str, InputStatistics] = {}
    seen: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
    alive: list[Tensor] = []  # keeps inputs alive during a call, so that no memory is reused
    originals: dict[str, Tensor] = {}  # the inputs in the first call of a pair
    first_call = True
    original_call = with_originals

    def before_linear(name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if first_call:
                key = (x.data_ptr(), x.shape, x.stride())
                alive.append(x)
                if key in seen:
                    seen[key].append(name)
                    return
                seen[key] = [name]
                leader_of[name] = InputStatistics((name,), x.shape[-1], x.device, bound)
                groups.append(leader_of[name])
            if name not in leader_of:
                return
            if original_call:
                originals[name] = x
            else:
                leader_of[name].add(x, originals.pop(name, None))

        return hook

    def after_block(_module: nn.Module, _args: tuple, _output: object) -> None:
        nonlocal first_call, original_call
        original_call = with_originals and not original_call
        if first_call:
            for group, names in zip(groups, seen.values(), strict=True):
                group.linears = tuple(names)
            first_call = False
            alive.clear()
            if not outputs and not with_originals:
                for name in groups[-1].linears if groups else ():
                    skip(linears[name])

    def skip(linear: nn.Linear) -> None:
        linear.forward = lambda input: input.new_zeros(*input.shape[:-1], linear.out_features)

    linears = linears_of(block)
    handles = [
        linear.register_forward_pre_hook(before_linear(name)) for name, linear in linears.items()
    ]
    handles.append(block.register_forward_hook(after_block))
    try:
        yield groups
    finally:
        for handle in handles:
            handle.remove()
        for linear in linears.values():
            linear.__dict__.pop("forward", None)
