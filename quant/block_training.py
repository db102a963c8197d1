"""Training one block until it gives what the original block gave.

The loss of a token is the squared error of the block's output y by the power of the original's y₀,

    ‖y - y₀‖² / ‖y₀‖²,

since a norm follows, and since the first token of a text is often a thousand times larger than the
others.  The original's output is for the original's hidden states, so that a block also makes up
for errors of those before it (Chen et al., "EfficientQAT", arXiv 2407.11062, section 3.2).

An eighth of the sequences are not trained on.  Where their loss does not fall the block stays as it
was: with few sequences a block has more weights than the data can say something about.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.blocks import call_block
from compress.core.stage import BlockSamples
from compress.quant.fake_quant import put_on_grid
from compress.quant.training import Rates, parameter_groups
from compress.quant.weight import QuantizedWeight

STEP_TOKENS = 512  # of one step, in whole sequences; more steps do more than smoother gradients
HELD_OUT = 8  # one sequence in so many
BETAS = (0.9, 0.95)  # there are too few steps for an average over 1,000


@dataclass(frozen=True)
class LearnedBlock:
    """What came of a block's linears, by name within it.

    weights  quantized
    places   where in its code's cell each weight is, in steps [out, in]; none if nothing changed
    note     for the report
    """

    weights: Mapping[str, QuantizedWeight]
    places: Mapping[str, Tensor]
    note: str


@torch.enable_grad()
def train_block(
    module: nn.Module,
    samples: BlockSamples,
    start: Mapping[str, QuantizedWeight],
    rates: Rates,
    epochs: int,
    seed: int,
) -> LearnedBlock:
    """Train a block's linears from these quantized weights, and its vectors, which change in place.

    module  the block in float32; its linears in `start` are as they were before rounding
    seed    of the order of sequences

    The result is a function of the arguments and the number of threads.
    """
    trained = copy.deepcopy(module)
    linears = put_on_grid(trained, start)
    groups = parameter_groups(trained, rates)
    device = next(module.parameters()).device
    held_out, taught = _split(samples)
    order = torch.Generator().manual_seed(seed)
    steps = epochs * sum(1 for _ in _steps(samples, taught, None))
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    before = _error(trained, samples, held_out, device)
    for _ in range(epochs):
        for states, kwargs, target in _steps(samples, taught, order):
            optimizer.zero_grad()
            _loss(trained, states, kwargs, target, device).mean().backward()
            optimizer.step()
            scheduler.step()
    after = _error(trained, samples, held_out, device)
    if not after < before:
        return LearnedBlock(start, {}, "training did not help: as it began")
    learned = dict(trained.named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in learned and parameter.dim() == 1:
                parameter.copy_(learned[name])
    weights = {name: linear.quantized() for name, linear in linears.items()}
    places = {name: linear.place() for name, linear in linears.items()}
    return LearnedBlock(weights, places, f"block's error {before:.2e} to {after:.2e} by training")


Rows = Mapping[int, list[int]]  # sequences, by their batch


def _split(samples: BlockSamples) -> tuple[Rows, Rows]:
    """Which sequences are held out, and which are trained on."""
    places = [(b, row) for b in range(len(samples.inputs)) for row in range(len(samples.inputs[b]))]
    held_out: dict[int, list[int]] = {}
    taught: dict[int, list[int]] = {}
    for number, (batch, row) in enumerate(reversed(places)):
        rows = taught if number % HELD_OUT else held_out
        rows.setdefault(batch, []).insert(0, row)
    return held_out, taught


def _steps(
    samples: BlockSamples, chosen: Rows, order: torch.Generator | None
) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
    """Inputs [b, S, D], other arguments and targets of step after step.

    With `order` batches come in a random order, and so do the sequences of each: a batch on the
    disk is read once.
    """
    batches = list(chosen)
    if order is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=order)]
    for batch in batches:
        states, target = samples.inputs[batch], samples.targets[batch]
        rows = torch.tensor(chosen[batch])
        if order is not None:
            rows = rows[torch.randperm(len(rows), generator=order)]
        for some in rows.split(max(1, STEP_TOKENS // states.shape[1])):
            kwargs = {
                name: _rows_of(value, some, len(states))
                for name, value in samples.kwargs[batch].items()
            }
            yield states[some], kwargs, target[some]


def _rows_of(value: Any, rows: Tensor, count: int) -> Any:
    """Some sequences of an argument of a block, which may hold tensors for all `count` of them."""
    if isinstance(value, Tensor):
        if value.dim() < 2 or len(value) != count:
            return value
        return value[rows.to(value.device)]
    if isinstance(value, dict):
        return {name: _rows_of(item, rows, count) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rows_of(item, rows, count) for item in value)
    return value


def _loss(
    block: nn.Module, states: Tensor, kwargs: dict[str, Any], target: Tensor, device: torch.device
) -> Tensor:
    """The loss of each token, float32 [b, S]."""
    low = states.dtype == torch.bfloat16  # else in float32: float16 has too small a range
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        output = call_block(block, states.to(device).float(), _in_float(kwargs))
    expected = target.to(device).float()
    power = expected.square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (output.float() - expected).square().sum(dim=-1) / power


def _in_float(value: Any) -> Any:
    """Arguments with their floating-point tensors in float32, as the block's weights are."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _in_float(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_in_float(item) for item in value)
    return value


@torch.no_grad()
def _error(block: nn.Module, samples: BlockSamples, chosen: Rows, device: torch.device) -> float:
    """The mean loss over the tokens of these sequences."""
    total, count = 0.0, 0
    for states, kwargs, target in _steps(samples, chosen, None):
        losses = _loss(block, states, kwargs, target, device)
        total, count = total + float(losses.sum()), count + losses.numel()
    return total / max(count, 1)
