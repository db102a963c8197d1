"""What the methods of quantization share: linears go in, packed tensors and a report come out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.core.blocks import linears_of
from compress.core.stage import Block, BlockOutcome, LayerReport
from compress.quant.config import Grid, QuantizationConfig
from compress.quant.formats import FORMATS
from compress.quant.weight import QuantizedWeight

UNREACHED = "never reached by the calibration data"


@dataclass(frozen=True)
class QuantizedLinear:
    """A method's result for one linear: its weight, its error (see LayerReport) and a remark."""

    weight: QuantizedWeight
    output_error: float | None = None
    note: str = ""


class QuantizationStage:
    """Base of the methods that put each linear of a block on a grid.

    A method implements `quantize_linears`; this class decides which linears, replaces their
    weights by the de-quantized ones, packs, and reports.  `grids` holds the grid of every linear
    that is to be quantized, by full name (`QuantizationConfig.grids`).
    """

    method: ClassVar[str]
    needs_statistics: bool
    needs_reference: bool = False
    counts_above: float | None = None
    trains_blocks: bool = False
    trains_model: bool = False
    decides_globally: ClassVar[bool] = False
    workspace: ClassVar[int] = 1

    def __init__(self, config: QuantizationConfig, grids: Mapping[str, Grid]) -> None:
        self.config = config
        self.grids = grids
        self.format = FORMATS[config.format]

    def quantize_linears(
        self, block: Block, linears: Mapping[str, nn.Linear]
    ) -> dict[str, QuantizedLinear]:
        """Quantize these linears (by name within the block).

        May first fold scales into the block's module, in place.
        """
        raise NotImplementedError

    def collect(self, block: Block) -> None:
        """Nothing: decisions are local."""

    def decide(self, summaries: Sequence[None]) -> None:
        """Nothing: decisions are local."""

    def state(self) -> Any:
        """Nothing, unless a method carries something from block to block (see Stage.state)."""

    def restore(self, state: Any) -> None:
        """Nothing to take over."""

    @torch.no_grad()
    def apply(self, block: Block, plan: None) -> BlockOutcome:
        """Quantize the block's linears and pack them (see Stage.apply)."""
        outcome = BlockOutcome()
        chosen: dict[str, nn.Linear] = {}
        for name, linear in linears_of(block.module).items():
            if block.full_name(name) not in self.grids:
                shape = (linear.out_features, linear.in_features)
                note = "left in float: named by ignore"
                outcome.layers.append(LayerReport(block.full_name(name), None, shape, note=note))
            else:
                chosen[name] = linear
        if self.format.BESIDE:
            outcome.beside = {}
        for name, result in self.quantize_linears(block, chosen).items():
            linear, dense = chosen[name], result.weight.dequantize().float()
            inputs = result.weight.inputs
            outcome.layers.append(
                LayerReport(
                    name=block.full_name(name),
                    method=self.method,
                    shape=result.weight.shape,
                    bits=result.weight.bits,
                    group_size=None if inputs else result.weight.group_size,
                    inputs=None if inputs is None else inputs.kind,
                    weight_error=_share((dense - linear.weight).square(), linear.weight.square()),
                    output_error=result.output_error,
                    note=result.note,
                )
            )
            linear.weight.data.copy_(dense)
            outcome.replaces.add(f"{name}.weight")
            for suffix, tensor in self.format.pack_weight(result.weight).items():
                tensors = outcome.beside if suffix in self.format.BESIDE else outcome.tensors
                assert tensors is not None
                tensors[f"{name}.{suffix}"] = tensor
        return outcome

    def checkpoint_config(self, unquantized: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` entry for config.json."""
        left = set(unquantized)
        grids = {name: grid for name, grid in self.grids.items() if name not in left}
        return {"quantization_config": self.format.quantization_config(grids, unquantized)}


def output_error(change: Tensor, second_moment: Tensor) -> Tensor:
    """tr(dW H dWᵀ) = E‖dW x‖²; change [out, in], second_moment [in, in], both float32."""
    return ((change @ second_moment) * change).sum()


def relative_output_error(weight: Tensor, dense: Tensor, second_moment: Tensor) -> float:
    """tr(dW H dWᵀ) / tr(W H Wᵀ) for a weight and its de-quantized form, [out, in] each."""
    error, power = output_error(dense - weight, second_moment), output_error(weight, second_moment)
    return _share(error, power)


def _share(part: Tensor, whole: Tensor) -> float:
    total = whole.sum().item()
    return part.sum().item() / total if total > 0 else 0.0
