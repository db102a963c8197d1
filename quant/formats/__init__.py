"""Checkpoint formats for quantized weights, one module each.

A module packs and unpacks a `QuantizedWeight`, writes its `quantization_config`, and says which
grids it cannot hold.  Its docstring is the contract: tensors, shapes, dtypes, bit order.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.quant.config import Grid
from compress.quant.formats import compressed_tensors
from compress.quant.weight import QuantizedWeight


class Format(Protocol):
    """What a format module provides (see its docstrings)."""

    def refusal(self, grid: Grid, shape: tuple[int, int]) -> str | None: ...

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype: ...

    def pack_weight(self, weight: QuantizedWeight) -> dict[str, Tensor]: ...

    def quantization_config(
        self, grids: Mapping[str, Grid], unquantized: Sequence[str]
    ) -> dict[str, Any]: ...


FORMATS: Mapping[str, Format] = {
    "compressed-tensors": compressed_tensors,
}
