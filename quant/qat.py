"""Quantization-aware training (QAT): what post-training quantization lost, won back by training.

It starts from another method's result and has two phases, each of which may be left out
(Chen et al., "EfficientQAT", arXiv 2407.11062, section 3).  The first wins back more, for each
token and for each second (benchmarks/LOG.md):

1. block by block: each block learns to give what the original's gave, on the calibration sequences
   as the compressed blocks before it hand them on (block_training.py);
2. end to end: the whole model learns the original's predictions (distill/qat.py, compress/qat.py).

What learns are the latents of the linears' weights and the gains of their scales (fake_quant.py),
and the vectors beside them: gains of norms, and biases.  EfficientQAT trains scales alone in its
second phase; `trains: scales` is that.

Every rate is a length of Adam's step in the unit that fits: for latents a step of the grid, for
gains and vectors a share of their size (a vector's is its root mean square at the start).  Codes
are a unit apart, noise moves a latent by about r sqrt(steps) at rate r, and a gradient that keeps
its sign by about r steps.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from compress.core.counts import parse_count
from compress.core.stage import Block, BlockOutcome
from compress.quant.awq import AwqConfig
from compress.quant.awq_gptq import AwqGptqConfig
from compress.quant.block_training import train_block
from compress.quant.config import Grid, WeightOnlyConfig
from compress.quant.fake_quant import place_in_cell
from compress.quant.gptq import GptqConfig
from compress.quant.rtn import RtnConfig
from compress.quant.stage import QuantizationStage, QuantizedLinear, relative_output_error
from compress.quant.training import Rates, Trained

INITS: Mapping[str, type[WeightOnlyConfig]] = {
    "gptq": GptqConfig,
    "awq+gptq": AwqGptqConfig,
    "awq": AwqConfig,
    "rtn": RtnConfig,
}

PLACES = "weight_place"
Rate = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QatConfig(WeightOnlyConfig):
    """Settings of quantization-aware training beside the grid.

    init                 the method that it starts from, with its defaults
    trains               `weights+scales`, or `scales` for codes that stay those of the start
    block_epochs         passes over the calibration sequences for each block; 0 for no such phase.
                         That phase takes one process
    block_rate           Adam's step of weights in that phase, in steps of the grid
    block_scale_rate     of scales, norms and biases, as a share of their size
    tokens               that the whole model is trained on: a number such as 200_000, 200k or 2M;
                         0 for no such phase
    batch_tokens         tokens of one step of the optimizer
    rate, scale_rate     as in the first phase
    """

    init: Literal["gptq", "awq+gptq", "awq", "rtn"] = "gptq"
    trains: Trained = "weights+scales"
    block_epochs: int = Field(default=2, ge=0, le=1000)
    block_rate: Rate = 0.01
    block_scale_rate: Rate = 0.003
    tokens: Annotated[int, BeforeValidator(parse_count), Field(ge=0)] = 200_000
    batch_tokens: Annotated[int, BeforeValidator(parse_count), Field(ge=1)] = 1024
    rate: Rate = 0.003
    scale_rate: Rate = 0.001

    def stage(self, grids: Mapping[str, Grid]) -> "QatStage":
        return QatStage(self, grids)

    def initial(self) -> WeightOnlyConfig:
        """The configuration of the method that training starts from."""
        shared = ("bits", "group_size", "symmetric", "format", "ignore", "overrides")
        return INITS[self.init](**{name: getattr(self, name) for name in shared})


class QatStage(QuantizationStage):
    """Another method's stage, and the first phase after it.

    For the second phase it writes beside each linear PLACES, int8 [out, in]: where in the cell of
    its code each weight was (`place_in_cell`), in 254ths of a step.
    """

    method: ClassVar[str] = "qat"

    def __init__(self, config: QatConfig, grids: Mapping[str, Grid]) -> None:
        super().__init__(config, grids)
        self.config: QatConfig = config
        self.initial = config.initial().stage(grids)
        self.trains_blocks = config.block_epochs > 0
        self.trains_model = config.tokens > 0
        self.needs_statistics = self.initial.needs_statistics or self.trains_blocks
        self.workspace = self.initial.workspace  # type: ignore[misc]
        self._places: dict[str, Tensor] = {}

    def state(self) -> Any:
        """What the other method carries."""
        return self.initial.state()

    def restore(self, state: Any) -> None:
        """Take over what the other method carries."""
        self.initial.restore(state)

    def apply(self, block: Block, plan: None) -> BlockOutcome:
        """Quantize, train and pack the block (see Stage.apply)."""
        outcome = super().apply(block, plan)
        if self.trains_model:
            for name, place in self._places.items():
                outcome.tensors[f"{name}.{PLACES}"] = (254 * place).round().to(torch.int8)
        return outcome

    def quantize_linears(
        self, block: Block, linears: Mapping[str, nn.Linear]
    ) -> dict[str, QuantizedLinear]:
        """Quantize by the other method, then train (see QuantizationStage.quantize_linears)."""
        results = self.initial.quantize_linears(block, linears)
        self._places = {
            name: place_in_cell(result.weight, linears[name].weight.data)
            for name, result in results.items()
        }
        if not self.trains_blocks or not results:
            return results
        assert block.samples is not None
        start = {name: result.weight for name, result in results.items()}
        rates = Rates(self.config.block_rate, self.config.block_scale_rate, self.config.trains)
        learned = train_block(
            block.module, block.samples, start, rates, self.config.block_epochs, seed=block.index
        )
        self._places |= learned.places
        moments = {name: stats.second_moment for stats in block.inputs for name in stats.linears}
        for name, result in results.items():
            note = ", ".join(part for part in (result.note, learned.note) if part)
            results[name] = replace(result, weight=learned.weights[name], note=note)
            if result.output_error is not None:
                error = relative_output_error(
                    linears[name].weight.data,
                    learned.weights[name].dequantize().float(),
                    moments[name],
                )
                results[name] = replace(results[name], output_error=error)
        return results
