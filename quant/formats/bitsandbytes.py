"""The int8 checkpoint format of bitsandbytes (LLM.int8), with exact outlier columns beside it.

Each quantized linear is stored as

    weight          int8 [out, in], codes round(W * 127 / SCB), ties to even
    SCB             float32 [out], max |W| of a row: a weight is codes * SCB / 127
    weight_format   read, not written: uint8, 0 for rows (what else there was, nobody reads now)

and in the folder BESIDE (compress.core.shards) of the checkpoint, which is a checkpoint of these
tensors alone, as

    outlier_index   int32 [k], columns whose inputs are not rounded, ascending; k may be 0
    outlier_weight  [out, k], these columns of W in the dtype of the model's floats

config.json says `quant_method: bitsandbytes`, `load_in_8bit`, the threshold of outliers and the
modules that are left in float.  bitsandbytes (0.50 was run) finds outlier columns at run time and
computes their weights from the codes; the stored ones are not rounded.  The loaders read
`model.safetensors` or the index beside it, and see nothing of the folder.

Definition: https://github.com/bitsandbytes-foundation/bitsandbytes (nn/modules.py, Linear8bitLt)
and transformers' quantizers/quantizer_bnb_8bit.py.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.quant.config import Grid, RoundedGrid
from compress.quant.input_rounding import VECTORWISE, rounding_of
from compress.quant.weight import QuantizedWeight

SUFFIXES = ("SCB", "weight", "weight_format")
BESIDE = ("outlier_index", "outlier_weight")
DEFAULT_THRESHOLD = 6.0  # transformers' BitsAndBytesConfig


def refusal(
    grids: Mapping[str, Grid],
    shapes: Mapping[str, tuple[int, int]],
    reordered: Collection[str] = (),
) -> str | None:
    """Why these linears cannot be packed on these grids, or None (see Format)."""
    for name, grid in grids.items():
        if not isinstance(grid, RoundedGrid) or grid.outlier_threshold is None:
            return f"{name}: it rounds inputs too; run compress quantize --method llm-int8"
    return None


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, whatever the checkpoint's floats are."""
    return torch.float32


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that stand for a linear's `weight`, by suffix."""
    inputs = weight.inputs
    assert inputs is not None
    packed = {"weight": weight.codes, "SCB": weight.scale.squeeze(1) * VECTORWISE}
    if inputs.outlier_index is not None:
        assert inputs.outlier_weight is not None
        packed["outlier_index"] = inputs.outlier_index.to(torch.int32)
        packed["outlier_weight"] = inputs.outlier_weight
    return packed


def unpack_weight(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
) -> QuantizedWeight:
    """The inverse of `pack_weight`; a scale may differ in its last bit, SCB / 127 * 127.

    No outlier columns are read as None, whether they are stored so or not at all.

    Raises RuntimeError for codes of another dtype, or outlier columns that the weight has not.
    """
    codes = tensors["weight"]
    rows, columns = codes.shape
    if codes.dtype != torch.int8:
        raise RuntimeError(f"codes are {codes.dtype}, not torch.int8")
    index, exact = tensors.get("outlier_index"), tensors.get("outlier_weight")
    if index is not None:
        index = index.to(torch.int64)
        if len(index) and not 0 <= index.min() <= index.max() < columns:
            raise RuntimeError(f"outlier_index leaves 0 to {columns - 1}")
        if exact is None or exact.shape != (rows, len(index)):
            raise RuntimeError("outlier_weight does not fit outlier_index")
        if not len(index):
            index = exact = None
    scale = tensors["SCB"].float().reshape(-1, 1) / VECTORWISE
    inputs = rounding_of(grid_of(config, name), index, exact)
    return QuantizedWeight(codes, scale, None, 8, columns, inputs=inputs)


def grid_of(config: Mapping[str, Any], name: str) -> RoundedGrid:
    """The grid of every packed linear: only the threshold is a checkpoint's own."""
    threshold = config.get("llm_int8_threshold", DEFAULT_THRESHOLD)
    return RoundedGrid(inputs="int8", outlier_threshold=float(threshold))


def quantization_config(
    grids: Mapping[str, Grid], unquantized: Sequence[str], reordered: Collection[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of config.json for linears on these grids (see Format)."""
    thresholds = {
        grid.outlier_threshold for grid in grids.values() if isinstance(grid, RoundedGrid)
    }
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": next(iter(thresholds), DEFAULT_THRESHOLD),
        "llm_int8_skip_modules": list(unquantized),
        "llm_int8_has_fp16_weight": False,
    }


def foreign(config: Mapping[str, Any]) -> str | None:
    """What makes a checkpoint of this quant_method another layout than the one above, or None."""
    if not config.get("load_in_8bit"):
        return "4 bits" if config.get("load_in_4bit") else "no int8 (load_in_8bit)"
    if config.get("llm_int8_has_fp16_weight"):
        return "float weights (llm_int8_has_fp16_weight)"
    return None
