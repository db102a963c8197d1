"""Linear layers that round their inputs, by two Triton launches: y = x Wᵀ + bias.

The first rounds every token once (rounding.py), the second multiplies codes (product.py): with one
token W is nearly all that is read, with many all blocks of rows share the codes of x.  Shapes alone
decide what is launched, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.entry import INTERPRETED, Entry
from compress.kernels.lowbit_matmul.configs import Config, splits
from compress.kernels.lowbit_matmul.triton import device_of
from compress.kernels.lowbit_matmul.weight import MOST_FOUND, LinearWeight
from compress.kernels.w8a8_matmul.configs import WIDTH, choose, tile_columns
from compress.kernels.w8a8_matmul.product import product
from compress.kernels.w8a8_matmul.rounding import round_inputs
from compress.kernels.workspace import Workspace

LEAST_NATIVE = 89  # compute capability whose tensor cores multiply float8_e4m3fn
ROUND_BLOCK = 4096  # elements that a program rounds at a time
LEAST_OUTLIERS = 16  # columns of a product on tensor cores; a power of two for loads


@dataclass(frozen=True)
class _Tokens:
    """Rounded inputs as rounding.py lays them out; None where a layer has no such part."""

    codes: Tensor
    scales: Tensor
    count: Tensor | None
    index: Tensor | None
    value: Tensor | None
    outliers: Tensor | None


class TritonRoundingLinear:
    """A linear layer on 8-bit codes whose inputs are rounded.

    With `silu_mul` the weight is gate over up, and y = silu(x gateᵀ) * (x upᵀ) has half its rows.
    `surplus`, int64 [1] on the device, is added to: the elements for which a token had no room.
    """

    def __init__(
        self,
        weight: LinearWeight,
        dtype: torch.dtype,
        device: torch.device,
        workspace: Workspace,
        surplus: Tensor,
        silu_mul: bool = False,
    ) -> None:
        assert weight.inputs is not None
        assert weight.codes is not None
        assert weight.scale is not None
        inputs = weight.inputs
        self.rows, self.columns = weight.shape
        self._width = -(-self.columns // WIDTH) * WIDTH
        order = torch.arange(self.rows, device=device)
        if silu_mul:
            order = order.view(2, -1).mT.flatten()
        bits = weight.codes.to(device).view(torch.int8)[order]
        self._weight = F.pad(bits, (0, self._width - self.columns)).contiguous()
        self._scale = weight.scale.to(device).squeeze(1)[order]
        self._bias = None if weight.bias is None else weight.bias.to(device, torch.float32)[order]
        self._largest, self._threshold = inputs.largest, inputs.threshold
        self._outliers, self._rounded, self._index = 0, None, None
        self._outlier_weight = None
        if inputs.outlier_index is not None and len(inputs.outlier_index):
            assert inputs.outlier_weight is not None
            self._index, self._rounded = _places(inputs.outlier_index, self.columns, device)
            self._outliers = len(self._index)
            stored = inputs.outlier_weight.to(device, dtype)[order]
            padding = self._outliers - stored.shape[1]
            self._outlier_weight = F.pad(stored, (0, padding)).contiguous()
        self._dtype, self._silu_mul = dtype, silu_mul
        self._workspace, self._surplus = workspace, surplus
        capability, self._sm_count = device_of(device)
        self._fp8 = inputs.kind == "fp8"
        self._native = _native(self._fp8, capability)
        if self._native:
            self._weight = self._weight.view(torch.float8_e4m3fn)
        self.kind = f"w8a8 {inputs.kind} (triton)"
        parts = (self._weight, self._scale, self._bias, self._outlier_weight)
        self.bytes = sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [T, in] in the dtype it was packed for -> [T, out] in that dtype, or in `out_dtype`."""
        return self.run(x, choose(len(x)), out_dtype)

    def run(self, x: Tensor, config: Config, out_dtype: torch.dtype | None = None) -> Tensor:
        """As a call, with a given Config."""
        assert x.dtype == self._dtype
        assert x.shape[1] == self.columns
        out = self.rows // 2 if self._silu_mul else self.rows
        y = torch.empty(len(x), out, dtype=out_dtype or x.dtype, device=x.device)
        if not len(x):
            return y
        if x.stride(1) != 1:
            x = x.contiguous()
        self._multiply(self._round(x), y, config)
        return y

    def _round(self, x: Tensor) -> _Tokens:
        found = self._threshold is not None
        tokens = _room(self._workspace, len(x), self._width, found, self._outliers, x.dtype)
        round_inputs[len(x),](
            x,
            self._rounded,
            self._index,
            tokens.codes,
            tokens.scales,
            tokens.count,
            tokens.index,
            tokens.value,
            tokens.outliers,
            self._surplus if found else None,
            self.columns,
            x.stride(0),
            self._width,
            self._largest,
            math.nan if self._threshold is None else self._threshold,
            **_of_rounding(self._width, self._fp8, found, self._outliers),
        )
        return tokens

    def _multiply(self, tokens: _Tokens, y: Tensor, config: Config) -> None:
        token_blocks = -(-len(y) // config.block_tokens)
        row_blocks = -(-self.rows // config.block_rows)
        blocks = token_blocks * row_blocks
        columns = tile_columns(self._width)
        tiles = self._width // columns
        parts, tiles_per_split = splits(config, blocks, tiles, self._sm_count)
        count = blocks * parts * config.block_tokens * config.block_rows if parts > 1 else 1
        product[token_blocks, row_blocks, parts](
            tokens.codes.view(self._weight.dtype),
            tokens.scales,
            tokens.count,
            tokens.index,
            tokens.value,
            tokens.outliers,
            self._weight,
            self._scale,
            self._bias,
            self._outlier_weight,
            y,
            self._workspace.floats(count),
            self._workspace.counters(blocks),
            len(y),
            self.rows,
            self._width,
            tiles,
            tiles_per_split,
            **_of_layer(
                self._fp8, self._native, self._threshold is not None, self._outliers, self._silu_mul
            ),
            **_of_product(config, columns),
        )


def _native(fp8: bool, capability: int) -> bool:
    """Whether codes are multiplied as float8_e4m3fn."""
    return fp8 and capability >= LEAST_NATIVE and not INTERPRETED


def _places(index: Tensor, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Stored outlier columns, -1 for padding, int32; and int8 [columns], 1 for those rounded."""
    room = max(LEAST_OUTLIERS, triton.next_power_of_2(len(index)))
    padded = F.pad(index, (0, room - len(index)), value=-1).to(device, torch.int32)
    rounded = torch.ones(columns, dtype=torch.int8)
    rounded[index.cpu()] = 0
    return padded, rounded.to(device)


def _room(
    workspace: Workspace, tokens: int, width: int, found: bool, outliers: int, dtype: torch.dtype
) -> _Tokens:
    """Memory for rounded inputs: parts of one buffer, each at a multiple of 64 bytes."""
    sizes: list[tuple[int, torch.dtype]] = [(width, torch.int8), (1, torch.float32)]
    sizes += [(1, torch.int32), (MOST_FOUND, torch.int32), (MOST_FOUND, torch.float32)] * found
    sizes += [(outliers, dtype)] * bool(outliers)
    places = [0]
    for count, kind in sizes:
        places.append(places[-1] + -(-tokens * count * kind.itemsize // 64) * 64)
    buffer = workspace.scratch(places[-1], torch.uint8)
    views = [
        buffer[place : place + tokens * count * kind.itemsize].view(kind)
        for place, (count, kind) in zip(places, sizes, strict=False)
    ]
    codes, scales, *rest = views
    stored = rest.pop() if outliers else None
    count, index, value = rest or (None, None, None)
    return _Tokens(codes, scales, count, index, value, stored)


def _of_rounding(width: int, fp8: bool, threshold: bool, outliers: int) -> dict[str, Any]:
    """Compile-time constants of rounding, and what the compiler is told besides."""
    block = min(triton.next_power_of_2(width), ROUND_BLOCK)
    constants = {"FP8": fp8, "THRESHOLD": threshold, "OUTLIERS": outliers, "BLOCK": block}
    return constants | {"num_warps": min(16, max(1, block // 256)), "num_stages": 1}


def _of_layer(
    fp8: bool, native: bool, threshold: bool, outliers: int, silu_mul: bool
) -> dict[str, Any]:
    """Compile-time constants of a product that its layer gives."""
    return {
        "FP8": fp8,
        "NATIVE": native,
        "THRESHOLD": threshold,
        "OUTLIERS": outliers,
        "SILU_MUL": silu_mul,
    }


def _of_product(config: Config, columns: int) -> dict[str, Any]:
    """Those of a product that its Config gives."""
    return {
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_TOKENS": config.block_tokens,
        "BLOCK_COLUMNS": columns,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


# (dtype, kind, what else, tokens): what checkpoints of the three methods launch
_COMMON = [
    *((dtype, "int8", "llm.int8", tokens) for dtype in ("fp16", "bf16") for tokens in (1, 300)),
    *(("bf16", "int8", "", tokens) for tokens in (1, 16, 32, 64, 128, 300)),
    *(("bf16", "fp8", "", tokens) for tokens in (1, 16, 64, 300)),
    *(("fp16", kind, "", 1) for kind in ("int8", "fp8")),
    *(("bf16", "int8", extra, 1) for extra in ("bias", "silu_mul")),
    ("bf16", "int8", "llm.int8 silu_mul", 1),
]
_STORED = 16  # outlier columns of the entries
_WIDTH = 4096


def entries(capability: int) -> list[Entry]:
    """The specialisations for checkpoints as they are common, on a device of this capability."""
    found: dict[str, Entry] = {}
    for dtype, kind, extra, tokens in _COMMON:
        threshold = "llm.int8" in extra
        outliers = _STORED if threshold else 0
        name = f"w8a8_matmul {kind} {dtype} {extra or 'plain'}"
        options = _of_rounding(_WIDTH, kind == "fp8", threshold, outliers)
        absent = _absent(threshold, outliers)
        rounding = f"{name} rounding"
        found[rounding] = _entry(rounding, round_inputs, dtype, options | absent)
        native = _native(kind == "fp8", capability)
        constants = {
            **_of_layer(kind == "fp8", native, threshold, outliers, "silu_mul" in extra),
            **_of_product(choose(tokens), tile_columns(_WIDTH)),
            **_absent(threshold, outliers, bias=extra == "bias"),
        }
        name += f" tokens{tokens}"
        found[name] = _entry(name, product, dtype, constants)
    return list(found.values())


def _absent(threshold: bool, outliers: int, bias: bool = False) -> dict[str, None]:
    """Arguments that are None."""
    names = [] if threshold else ["count", "index", "value", "surplus"]
    names += [] if outliers else ["rounded", "outlier_index", "outliers", "outlier_weight"]
    return dict.fromkeys(names if bias else [*names, "bias"])


def _entry(name: str, kernel: Any, dtype: str, given: dict[str, Any]) -> Entry:
    """An entry with widths that are multiples of 16."""
    constants = {key: value for key, value in given.items() if key in kernel.arg_names}
    codes = "*fp8e4nv" if given.get("NATIVE") else "*i8"
    pointers = {"codes": "*i8", "weight": codes, "rounded": "*i8", "surplus": "*i64"}
    pointers |= dict.fromkeys(("outlier_index", "count", "index", "counters"), "*i32")
    of_fp32 = ("scales", "token_scale", "value", "scale", "bias", "partials")
    pointers |= dict.fromkeys(of_fp32, "*fp32")
    pointers |= dict.fromkeys(("outliers", "outlier_weight", "y"), f"*{dtype}")
    pointers["x"] = codes if kernel is product else f"*{dtype}"
    numbers = dict.fromkeys(("largest", "threshold"), "fp32")
    types = {
        argument: (pointers | numbers).get(argument, "i32")
        for argument in kernel.arg_names
        if argument not in constants
    }
    aligned = {*pointers, "rows", "columns", "stride", "width"} & set(types)
    options = given["num_warps"], given["num_stages"]
    return Entry(name, kernel, types, constants, *options, frozenset(aligned))
