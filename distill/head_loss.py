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
- the losses of a block of rows in float32, some ten times `block_bytes`.  Blocks are small enough
  for a processor's cache, where these passes run four times as fast;
- W in the dtype of the products, if that differs, and one product [V, D] in it on its way into
  dL/dW, which is summed in float32.

Rows whose label is IGNORED are left out before anything is computed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.distill.model_parts import Head, check_whole

IGNORED = -100  # the label of a position from which nothing is predicted
CHUNK_BYTES = 128 << 20
BLOCK_BYTES = 2 << 20  # of one float32 matrix, on a CPU
BLOCK_BYTES_ON_DEVICE = 64 << 20  # elsewhere, where each operation costs a launch


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


# logits [R, V], the teacher's logits [R, V] or TopK or None, labels [R] -> a loss a row [R]
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

    hidden [T, D] has gradients, as has the head; labels int64 [T], IGNORED where nothing is
    predicted; the teacher's part has the same T.  Products run in autocast's dtype, if that is on,
    else in hidden's; losses in float32, or float64 where hidden is.

    Raises InputError for a head whose weight is sharded.
    """
    kept = (labels != IGNORED).nonzero().squeeze(1)
    hidden, labels = hidden.index_select(0, kept), labels[kept]
    if isinstance(teacher, TopK):
        teacher = teacher[kept]
    elif teacher is not None:
        teacher = TeacherStates(teacher.hidden[kept], teacher.head)
    if head.scale != 1:
        hidden = hidden * head.scale
    bias = head.linear.bias
    if bias is not None and head.scale != 1:
        bias = bias * head.scale
    work = _Work(head, labels, teacher, terms, _product_dtype(hidden), torch.is_grad_enabled())
    total, sums = _HeadLoss.apply(hidden, check_whole(head.linear.weight), bias, work)  # type: ignore
    return total, dict(zip(terms, sums.unbind(), strict=True))


def chunk_rows(vocabulary: int, dtype: torch.dtype, matrices: int, tokens: int) -> int:
    """How many tokens a chunk has: as many as fit in CHUNK_BYTES, in chunks of nearly equal size."""
    most = max(1, CHUNK_BYTES // (vocabulary * dtype.itemsize * matrices))
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def block_rows(vocabulary: int, device: torch.device) -> int:
    """How many rows of logits are dealt with at once in float32."""
    size = BLOCK_BYTES if device.type == "cpu" else BLOCK_BYTES_ON_DEVICE
    return max(1, size // (4 * vocabulary))


def teacher_product(teacher: TeacherStates, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """Hidden states [T, D'], W [V, D'] and the bias, scaled and in the dtype of the products."""
    linear, scale = teacher.head.linear, teacher.head.scale
    bias = None if linear.bias is None else linear.bias.detach() * scale
    weight = check_whole(linear.weight).detach()
    return (teacher.hidden * scale).to(dtype), weight.to(dtype), bias


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden Wᵀ + b [C, V], written over the first rows of `out`."""
    logits = torch.mm(hidden, weight.T, out=out[: len(hidden)])
    return logits if bias is None else logits.add_(bias)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


@dataclass(frozen=True)
class _Work:
    """All that the losses are made of besides what has gradients."""

    head: Head
    labels: Tensor
    teacher: TeacherStates | TopK | None
    terms: Mapping[str, Term]
    dtype: torch.dtype
    with_gradients: bool


class _HeadLoss(torch.autograd.Function):
    """hidden [T, D], weight [V, D], bias [V] or None -> the total, and each term's sum [terms]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work
    ) -> tuple[Tensor, Tensor]:
        wanted = [work.with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            total, sums, gradients = _forward(hidden, weight, bias, work, wanted)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # In place, since [V, D] is large; a second backward through the graph is then refused.
        return (
            *(None if saved is None else saved.mul_(gradient) for saved in ctx.saved_tensors),
            None,
        )


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work, wanted: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The total, the sums, and the gradients of those of hidden, weight and bias that want one."""
    dtype, tokens, vocabulary = work.dtype, len(hidden), len(weight)
    exact = torch.promote_types(dtype, torch.float32)
    sums = hidden.new_zeros(len(work.terms), dtype=exact)
    to_hidden, to_weight, to_bias = (
        torch.zeros_like(given, dtype=exact) if want and given is not None else None
        for given, want in zip((hidden, weight, bias), wanted, strict=True)
    )
    states, matrix = hidden.to(dtype), weight.to(dtype)
    live = isinstance(work.teacher, TeacherStates)
    rows = chunk_rows(vocabulary, dtype, 2 if live else 1, tokens)
    logits_buffer = states.new_empty(rows, vocabulary)
    teacher_buffer = torch.empty_like(logits_buffer) if live else None
    weight_buffer = None if to_weight is None or dtype == exact else torch.empty_like(matrix)
    from_teacher = teacher_product(work.teacher, dtype) if live else None  # type: ignore
    for start in range(0, tokens, rows):
        chunk = slice(start, min(start + rows, tokens))
        logits = product(states[chunk], matrix, bias, logits_buffer)
        target: Any = work.teacher
        if from_teacher is not None:
            teacher_states, *parts = from_teacher
            target = product(teacher_states[chunk], *parts, teacher_buffer)
        elif target is not None:
            target = target[chunk]
        sums += _losses_of_chunk(logits, target, work.labels[chunk], work, exact, any(wanted))
        if to_hidden is not None:
            to_hidden[chunk] = logits @ matrix
        if to_weight is not None and weight_buffer is not None:
            to_weight += torch.mm(logits.T, states[chunk], out=weight_buffer)
        elif to_weight is not None:
            to_weight.addmm_(logits.T, states[chunk])
        if to_bias is not None:
            to_bias += logits.sum(0, dtype=exact)
    weights = sums.new_tensor([term.weight for term in work.terms.values()])
    gradients = [
        None if gradient is None else gradient.to(given.dtype)
        for gradient, given in zip((to_hidden, to_weight, to_bias), (hidden, weight, bias))
    ]
    return weights @ sums, sums, gradients


def _losses_of_chunk(
    logits: Tensor, target: Any, labels: Tensor, work: _Work, exact: torch.dtype, gradient: bool
) -> Tensor:
    """The sum of each loss over a chunk; its logits [C, V] become the total's gradient."""
    sums = torch.zeros(len(work.terms), dtype=exact, device=logits.device)
    step = block_rows(logits.shape[1], logits.device)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        given = None if target is None else target[rows]
        if isinstance(given, Tensor):
            given = work.teacher.head.cap(given.to(exact))  # type: ignore
        with torch.set_grad_enabled(gradient):
            leaf = logits[rows].to(exact, copy=True).requires_grad_(gradient)
            capped = work.head.cap(leaf)
            losses = [t.loss(capped, given, labels[rows]).sum() for t in work.terms.values()]
            total = sum(t.weight * loss for t, loss in zip(work.terms.values(), losses))
        sums += torch.stack(losses).detach()
        if gradient:
            logits[rows] = torch.autograd.grad(total, leaf)[0]  # type: ignore
    return sums
