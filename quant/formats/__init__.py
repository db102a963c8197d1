"""Checkpoint formats for quantized weights, one module each.

A module packs and unpacks a `QuantizedWeight`, reads and writes its `quantization_config`, and says
which grids it cannot hold.  Its docstring is the contract: tensors, shapes, dtypes, bit order.
GGUF (`gguf.py`) is read and packed tensor by tensor, but is no format of checkpoint folders.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.quant.config import Grid
from compress.quant.formats import awq, bitsandbytes, compressed_tensors, gptq
from compress.quant.weight import QuantizedWeight


class Format(Protocol):
    """What a format module provides.  Linears go by full name.

    SUFFIXES             names of a linear's tensors; every packed linear has the first
    BESIDE               names of those that stand in the folder BESIDE of compress.core.shards
    refusal              why linears of these shapes, (out, in), cannot be packed on these grids:
                         one line, beginning with a linear's name; None if they can.  `reordered`
                         names linears with a `group_of`
    scale_dtype          the dtype of scales in a checkpoint that stores floats in `dtype`
    pack_weight          tensors by suffix; scales stay as they are, so cast them before
    unpack_weight        the inverse; `config` is the `quantization_config`
    grid_of              the grid that the config states for a linear
    quantization_config  for config.json; `unquantized` names the linears left in float
    foreign              what makes a checkpoint with this config another layout, or None
    """

    @property
    def SUFFIXES(self) -> tuple[str, ...]: ...  # noqa: N802

    @property
    def BESIDE(self) -> tuple[str, ...]: ...  # noqa: N802

    def refusal(
        self,
        grids: Mapping[str, Grid],
        shapes: Mapping[str, tuple[int, int]],
        reordered: Collection[str] = (),
    ) -> str | None: ...

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype: ...

    def pack_weight(self, weight: QuantizedWeight) -> dict[str, Tensor]: ...

    def unpack_weight(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
    ) -> QuantizedWeight: ...

    def grid_of(self, config: Mapping[str, Any], name: str) -> Grid: ...

    def quantization_config(
        self,
        grids: Mapping[str, Grid],
        unquantized: Sequence[str],
        reordered: Collection[str] = (),
    ) -> dict[str, Any]: ...

    def foreign(self, config: Mapping[str, Any]) -> str | None: ...


FORMATS: Mapping[str, Format] = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
}
