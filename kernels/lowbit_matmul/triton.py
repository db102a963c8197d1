"""Linear layers on packed codes by Triton kernels: y = x Wᵀ + bias.

Few rows of x: one kernel reads the codes and multiplies (product.py; layout.py has the layouts).
Many rows: W is de-quantized a run of rows at a time, into memory small enough to stay in the cache,
and multiplied by the vendor's library.  configs.py says where the one ends and the other begins.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from compress.kernels.entry import INTERPRETED, Entry
from compress.kernels.lowbit_matmul.configs import (
    FLOAT32_TOKENS,
    Config,
    choose,
    most_tokens,
    splits,
)
from compress.kernels.lowbit_matmul.layout import Layout, PackedWeight, fits, layout_of, pack
from compress.kernels.lowbit_matmul.product import dequantize, product
from compress.kernels.lowbit_matmul.weight import LinearWeight
from compress.kernels.silu_mul.triton import silu_mul as silu_mul_of
from compress.kernels.workspace import Workspace

__all__ = ["TritonLinear", "entries", "fits"]

CHUNK_BYTES = 32 << 20  # de-quantized at a time: stays in the second-level cache until it is read
DEQUANTIZE_ROWS = 64  # of W, of a program
DEQUANTIZE: dict[str, Any] = {"num_warps": 4, "num_stages": 1}


class TritonLinear:
    """A linear layer whose codes stay codes.  The weight must fit (`fits`).

    With `silu_mul` the weight is gate over up, and y = silu(x gateᵀ) * (x upᵀ) has half its rows.
    """

    def __init__(
        self,
        weight: LinearWeight,
        dtype: torch.dtype,
        device: torch.device,
        workspace: Workspace,
        silu_mul: bool = False,
    ) -> None:
        self.packed: PackedWeight = pack(weight, device, silu_mul)
        self.kind = f"int{self.packed.layout.bits} (triton)"
        self.bytes = self.packed.bytes
        self._dtype = dtype
        self._workspace = workspace
        self._capability, self._sm_count = device_of(device)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [T, in] in the dtype it was packed for -> [T, out] in that dtype, or in `out_dtype`.

        With another `out_dtype` y is rounded once, to that: W is never de-quantized then.
        """
        bits, tokens = self.packed.layout.bits, len(x)
        if out_dtype not in (None, self._dtype):
            tokens = min(tokens, most_tokens(bits, self._capability))
        if self._dtype == torch.float32 and tokens > FLOAT32_TOKENS:
            return self.run(x, None)
        return self.run(x, choose(tokens, bits, self._capability), out_dtype)

    def run(self, x: Tensor, config: Config | None, out_dtype: torch.dtype | None = None) -> Tensor:
        """As a call, with a given Config; None de-quantizes."""
        packed = self.packed
        assert x.dtype == self._dtype
        assert x.shape[1] == packed.layout.columns
        out = packed.rows // 2 if packed.silu_mul else packed.rows
        y = torch.empty(len(x), out, dtype=out_dtype or x.dtype, device=x.device)
        if not len(x):
            return y
        if x.stride(1) != 1:
            x = x.contiguous()
        if config is None:
            self._by_dequantizing(x, y)
        else:
            self._by_product(x, y, config)
        return y

    def _by_product(self, x: Tensor, y: Tensor, config: Config) -> None:
        packed, layout = self.packed, self.packed.layout
        token_blocks = -(-len(x) // config.block_tokens)
        row_blocks = -(-packed.rows // config.block_rows)
        blocks = token_blocks * row_blocks
        parts, tiles_per_split = splits(config, blocks, layout.tiles, self._sm_count)
        count = blocks * parts * config.block_tokens * config.block_rows if parts > 1 else 1
        product[token_blocks, row_blocks, parts](
            x,
            packed.words,
            packed.scale,
            packed.shift,
            packed.bias,
            y,
            self._workspace.floats(count),
            self._workspace.counters(blocks),
            len(x),
            packed.rows,
            layout.columns,
            x.stride(0),
            layout.tiles,
            tiles_per_split,
            **_of_product(layout, packed.silu_mul, config),
            **_options(config),
        )

    def _by_dequantizing(self, x: Tensor, y: Tensor) -> None:
        packed, layout = self.packed, self.packed.layout
        fitting = CHUNK_BYTES // (layout.columns * x.element_size())
        step = max(DEQUANTIZE_ROWS, fitting - fitting % DEQUANTIZE_ROWS)
        for start in range(0, packed.rows, step):
            end = min(start + step, packed.rows)
            count = (end - start) * layout.columns
            dense = self._workspace.scratch(min(step, packed.rows) * layout.columns, x.dtype)
            dense = dense[:count].view(end - start, layout.columns)
            dequantize[layout.tiles, -(-(end - start) // DEQUANTIZE_ROWS)](
                packed.words,
                packed.scale,
                packed.shift,
                dense,
                packed.rows,
                layout.columns,
                start,
                end,
                **_of_dequantize(layout, packed.silu_mul),
                **DEQUANTIZE,
            )
            if packed.silu_mul:
                part = torch.mm(x, dense.mT)
                if packed.bias is not None:
                    part += packed.bias[start:end].view(-1, 2).mT.flatten().to(x.dtype)
                y[:, start // 2 : end // 2] = silu_mul_of(part)
            elif packed.bias is None:
                torch.mm(x, dense.mT, out=y[:, start:end])
            else:
                bias = packed.bias[start:end].to(x.dtype)
                torch.addmm(bias, x, dense.mT, out=y[:, start:end])


def _of_product(layout: Layout, silu_mul: bool, config: Config) -> dict[str, Any]:
    """Compile-time constants of a product."""
    return {
        "BITS": layout.bits,
        "WORDS": layout.words,
        "GROUP": layout.group,
        "WHOLE": layout.whole,
        "SILU_MUL": silu_mul,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_TOKENS": config.block_tokens,
    }


def _options(config: Config) -> dict[str, Any]:
    """What the compiler is told besides."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _of_dequantize(layout: Layout, silu_mul: bool) -> dict[str, Any]:
    return {
        "BITS": layout.bits,
        "WORDS": layout.words,
        "GROUP": layout.group,
        "SILU_MUL": silu_mul,
        "BLOCK_ROWS": DEQUANTIZE_ROWS,
    }


@lru_cache
def device_of(device: torch.device) -> tuple[int, int]:
    """Compute capability, such as 90, and multiprocessors."""
    if INTERPRETED:
        return 80, 1
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


# (dtype, bits, group size or 0 for a row's, what else it has, tokens): common checkpoints
_COMMON = [
    *((dtype, bits, 128, "", 1) for dtype in ("fp16", "bf16") for bits in (2, 3, 4)),
    *((dtype, 8, 0, "", 1) for dtype in ("fp16", "bf16")),
    *(("bf16", 4, 128, extra, 1) for extra in ("shift", "bias", "silu_mul")),
    ("bf16", 4, 32, "", 1),
    ("fp16", 4, 128, "shift", 1),
    *((dtype, 4, 128, "", tokens) for dtype in ("fp16", "bf16") for tokens in (16, 32)),
    *(("bf16", 4, 128, "", tokens) for tokens in (64, 128)),
]
_DEQUANTIZED = [("fp16", 4, 128), *(("bf16", bits, 128) for bits in (2, 3, 4)), ("bf16", 8, 0)]
_COLUMNS = 4096  # whole tiles, as widths of 128 columns or more mostly are


def entries(capability: int) -> list[Entry]:
    """The specialisations for checkpoints as they are common, on a device of this capability."""
    found: dict[tuple[Any, ...], Entry] = {}
    for dtype, bits, group, extra, tokens in _COMMON:
        config = choose(tokens, bits, capability)
        if config is None:
            continue
        layout = layout_of(bits, _COLUMNS, group or _COLUMNS)
        constants = _of_product(layout, extra == "silu_mul", config)
        constants |= {name: None for name in ("shift", "bias") if name != extra}
        name = f"lowbit_matmul w{bits} g{group or 'row'} {dtype} {extra or 'plain'} tokens{tokens}"
        entry = _entry(name, product, dtype, constants, **_options(config))
        found.setdefault((dtype, config, *constants.values()), entry)
    for dtype, bits, group in _DEQUANTIZED:
        layout = layout_of(bits, _COLUMNS, group or _COLUMNS)
        constants = _of_dequantize(layout, False) | {"shift": None}
        name = f"lowbit_matmul w{bits} g{group or 'row'} {dtype} dequantize"
        found[name,] = _entry(name, dequantize, dtype, constants, **DEQUANTIZE)
    return list(found.values())


def _entry(
    name: str, kernel: Any, dtype: str, constants: dict[str, Any], num_warps: int, num_stages: int
) -> Entry:
    """An entry with scales in float16 and widths that are multiples of 16."""
    pointers = {"words": "*i16", "scale": "*fp16", "shift": "*fp16", "bias": "*fp32"}
    pointers |= {"partials": "*fp32", "counters": "*i32"}
    pointers |= dict.fromkeys(("x", "y", "out"), f"*{dtype}")
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names if name not in constants}
    aligned = {*pointers, "rows", "columns", "stride"} & set(types)
    return Entry(name, kernel, types, constants, num_warps, num_stages, frozenset(aligned))
