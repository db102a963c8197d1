"""Losses on logits, without the logits: the product with the head, chunk by chunk.

Of hidden states h [T, D] and a head W [V, D], z = W h, a loss wants [T, V] numbers several times
over: logits, their softmax, their gradient, and the same of the teacher.  Here a chunk of tokens at
a time goes all the way, product, losses, dL/dz, and from it

    dL/dh = dL/dz W,    dL/dW = Σ over chunks (dL/dz)ᵀ h

already in the forward, as in Liger-Kernel's fused linear cross entropy (Hsu et al., arXiv
2410.10989, section 3.3); the backward only multiplies by the gradient that comes in.

In memory at once, beside h, W and their gradients:

- one chunk of the student's logits and one of the teacher's, in the dtype of the products
  (bfloat16 under autocast), together at most CHUNK_BYTES.  dL/dz overwrites the student's;
- the losses of a block of rows in float32, some ROUNDS_OF_LOSSES times BLOCK_BYTES.  Blocks are
  small enough for a processor's cache, where these passes run four times as fast;
- W in the dtype of the products, if that differs, and one product [V, D] in it on its way into
  dL/dW, which is summed in float32.

Rows whose label is IGNORED are left out before anything is computed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compress.distill.model_parts import Head, check_whole

IGNORED = -100  # the label of a position from which nothing is predicted
CHUNK_BYTES = 128 << 20
BLOCK_BYTES = 4 << 20  # of one float32 matrix, on a CPU
BLOCK_BYTES_ON_DEVICE = 64 << 20  # elsewhere, where each operation costs a launch
ROUNDS_OF_LOSSES = 10  # float32 matrices of a block at once, about


@dataclass(frozen=True)
class TeacherStates:
    """What the teacher's logits are made of: its last hidden states [T, D'], and its head."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class TopK:
    """The teacher's k likeliest tokens: log p [T, k] in float32, indices [T, k] in int64."""

    log_probs: Tensor
    indices: Tensor

    def __getitem__(self, rows: Any) -> "TopK":
        return TopK(self.log_probs[rows], self.indices[rows])


# logits [R, V], the teacher's logits [R, V] or TopK or None, labels [R] -> the loss of a row [R]
LogitLoss = Callable[[Tensor, Any, Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """A loss on logits and its weight in the total."""

    weight: float
    loss: LogitLoss


def head_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: TeacherStates | TopK | None,
    terms: Mapping[str, Term],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of losses over all tokens, and each loss's own sum, in float32.

    hidden [T, D] gets gradients, as do the head's parameters; labels int64 [T], IGNORED where
    nothing is predicted; the teacher's part has the same T.  Products run in autocast's dtype if
    that is on, else in hidden's; losses in float32, or in float64 where hidden is.

    Raises InputError for a head whose weight is in shards.
    """
    kept = (labels != IGNORED).nonzero().squeeze(1)
    hidden, labels = hidden.index_select(0, kept), labels[kept]
    if isinstance(teacher, TopK):
        teacher = teacher[kept]
    elif teacher is not None:
        teacher = TeacherStates(teacher.hidden[kept], teacher.head)
    inputs = _scaled(hidden, head)
    work = _Work(head, labels, teacher, terms, product_dtype(hidden), torch.is_grad_enabled())
    total, sums = _HeadLoss.apply(*inputs, work)  # type: ignore
    return total, dict(zip(terms, sums.unbind(), strict=True))


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of products with the head: autocast's, if that is on, else that of `hidden`."""
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    # dL/dz of a token that is not likely underflows in float16
    return torch.float32 if dtype == torch.float16 else dtype


def working_bytes(
    tokens: int, linear: nn.Linear, dtype: torch.dtype, live: bool, device: torch.device
) -> int:
    """What the losses of `tokens` take at once, at most, as the top of this file lists it.

    linear  the head, perhaps on the meta device; a trained one requires a gradient
    dtype   of products
    live    whether the teacher's logits are computed beside the student's
    """
    weight, matrices = linear.weight, 2 if live else 1
    chunks = min(CHUNK_BYTES, tokens * len(weight) * dtype.itemsize * matrices)
    states = linear.in_features * tokens * (torch.float32.itemsize + dtype.itemsize)
    total = chunks + states + ROUNDS_OF_LOSSES * _block_bytes(device)
    if dtype != weight.dtype:
        total += weight.numel() * dtype.itemsize
    if weight.requires_grad:
        total += weight.numel() * torch.float32.itemsize
        total += weight.numel() * dtype.itemsize if dtype != torch.float32 else 0
    return total


class ChunkedLogits:
    """Logits of hidden states before the soft cap, a chunk of tokens at a time, in one buffer."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        """hidden [T, D], weight [V, D] and bias [V], scaled; chunks of at most `rows` tokens."""
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self._buffer = hidden.new_empty(rows, len(weight))

    @classmethod
    def of_teacher(cls, teacher: TeacherStates, dtype: torch.dtype, rows: int) -> "ChunkedLogits":
        """Those of a teacher, computed in `dtype`."""
        hidden, weight, bias = _scaled(teacher.hidden, teacher.head)
        return cls(hidden.to(dtype), weight.detach().to(dtype), bias, rows)

    def __getitem__(self, chunk: slice) -> Tensor:
        """[C, V], until the next chunk is asked for."""
        hidden = self.hidden[chunk]
        logits = torch.mm(hidden, self.weight.T, out=self._buffer[: len(hidden)])
        return logits if self.bias is None else logits.add_(self.bias.detach())


def chunks_of(tokens: int, vocabulary: int, dtype: torch.dtype, matrices: int = 1) -> list[slice]:
    """Chunks of nearly equal size, `matrices` of which fit in CHUNK_BYTES."""
    most = max(1, CHUNK_BYTES // (vocabulary * dtype.itemsize * matrices))
    count = -(-tokens // most)
    bounds = [tokens * i // max(1, count) for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def blocks_of_rows(logits: Tensor) -> list[slice]:
    """The rows of a chunk [C, V] in blocks that are small in float32."""
    step = max(1, _block_bytes(logits.device) // (4 * logits.shape[1]))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def _block_bytes(device: torch.device) -> int:
    return BLOCK_BYTES if device.type == "cpu" else BLOCK_BYTES_ON_DEVICE


def _scaled(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias whose product are the logits before the soft cap."""
    weight, bias = check_whole(head.linear.weight), head.linear.bias
    if head.scale == 1:
        return hidden, weight, bias
    return hidden * head.scale, weight, None if bias is None else bias * head.scale


@dataclass(frozen=True)
class _Work:
    """All that the losses are made of, besides what gets gradients."""

    head: Head
    labels: Tensor
    teacher: TeacherStates | TopK | None
    terms: Mapping[str, Term]
    dtype: torch.dtype  # of products
    with_gradients: bool

    @property
    def exact(self) -> torch.dtype:
        """The dtype of losses and sums."""
        return torch.promote_types(self.dtype, torch.float32)


class _HeadLoss(torch.autograd.Function):
    """hidden [T, D], weight [V, D], bias [V] or None -> the total, and each term's sum [terms]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work
    ) -> tuple[Tensor, Tensor]:
        wanted = [work.with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            sums, gradients = _forward((hidden, weight, bias), work, wanted)
        weights = sums.new_tensor([term.weight for term in work.terms.values()])
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(sums)
        return (weights * sums).sum(), sums  # autocast would round the product of vectors

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, gradient: Tensor, _: Any
    ) -> tuple[Tensor | None, ...]:
        # In place, since [V, D] is large; autograd refuses a second backward because of it.
        return *(None if g is None else g.mul_(gradient) for g in ctx.saved_tensors), None


def _forward(
    inputs: tuple[Tensor, Tensor, Tensor | None], work: _Work, wanted: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum of each term [terms], and the total's gradients of those inputs that want one."""
    hidden, weight, bias = inputs
    live = isinstance(work.teacher, TeacherStates)
    chunks = chunks_of(len(hidden), len(weight), work.dtype, 2 if live else 1)
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    logits_of = ChunkedLogits(hidden.to(work.dtype), weight.to(work.dtype), bias, rows)
    target_of: Any = work.teacher
    if isinstance(work.teacher, TeacherStates):
        target_of = ChunkedLogits.of_teacher(work.teacher, work.dtype, rows)
    gradients = _Gradients(inputs, wanted, logits_of, work.exact)
    sums = hidden.new_zeros(len(work.terms), dtype=work.exact)
    for chunk in chunks:
        logits = logits_of[chunk]
        target = None if target_of is None else target_of[chunk]
        sums += _losses_of_chunk(logits, target, work.labels[chunk], work, any(wanted))
        gradients.add(chunk, logits)
    return sums, gradients.in_dtypes_of(inputs)


def _losses_of_chunk(
    logits: Tensor, target: Any, labels: Tensor, work: _Work, with_gradient: bool
) -> Tensor:
    """The sum of each term over a chunk; its logits [C, V] become the total's gradient."""
    terms, head = work.terms.values(), work.head
    sums = torch.zeros(len(terms), dtype=work.exact, device=logits.device)
    for rows in blocks_of_rows(logits):
        given = None if target is None else target[rows]
        if isinstance(work.teacher, TeacherStates):
            given = work.teacher.head.cap(given.to(work.exact))  # type: ignore
        with torch.set_grad_enabled(with_gradient):
            z = logits[rows].to(work.exact, copy=True).requires_grad_(with_gradient)
            capped = head.cap(z)
            losses = torch.stack([term.loss(capped, given, labels[rows]).sum() for term in terms])
            total = losses @ losses.new_tensor([term.weight for term in terms])
        sums += losses.detach()
        if with_gradient:
            logits[rows] = torch.autograd.grad(total, z)[0]
    return sums


class _Gradients:
    """dL/dh [T, D], dL/dW [V, D] and dL/db [V], of those that are wanted, as chunks add to them."""

    def __init__(
        self,
        inputs: tuple[Tensor, Tensor, Tensor | None],
        wanted: list[bool],
        logits: ChunkedLogits,
        exact: torch.dtype,
    ) -> None:
        self.of_hidden, self.of_weight, self.of_bias = (
            torch.zeros_like(given, dtype=exact) if want and given is not None else None
            for given, want in zip(inputs, wanted, strict=True)
        )
        self.logits = logits
        self._summand = None
        if self.of_weight is not None and logits.weight.dtype != exact:
            self._summand = torch.empty_like(logits.weight)

    def add(self, chunk: slice, slope: Tensor) -> None:
        """Add what a chunk contributes, by the gradient of its logits, slope [C, V]."""
        states = self.logits.hidden[chunk]
        if self.of_hidden is not None:
            self.of_hidden[chunk] = slope @ self.logits.weight
        if self.of_weight is not None and self._summand is None:
            self.of_weight.addmm_(slope.T, states)
        elif self.of_weight is not None:
            self.of_weight += torch.mm(slope.T, states, out=self._summand)
        if self.of_bias is not None:
            self.of_bias += slope.sum(0, dtype=self.of_bias.dtype)

    def in_dtypes_of(self, inputs: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor | None]:
        """The gradients, each in the dtype of its input."""
        gradients = (self.of_hidden, self.of_weight, self.of_bias)
        return [
            None if gradient is None or given is None else gradient.to(given.dtype)
            for gradient, given in zip(gradients, inputs, strict=True)
        ]
