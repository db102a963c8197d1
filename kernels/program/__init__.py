"""A model's step as one call: operations recorded once, then run for every batch (AVX-512 CPUs).

`Recorder` offers the operations of `compress.kernels.eager`, so the model is written once, for
both.  What goes from one operation to the next here are buffers with room for the largest batch,
which all layers share: the value of an operation lasts until the same operation comes again.
`program.cpp` says how a recorded program is run, the headers of the operations what they compute.
"""

import ctypes
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.kernels.eager import BLOCK_SIZE
from compress.kernels.latent_attention import LatentShape, LatentWeights
from compress.kernels.latent_attention.avx512 import pack_up, sizes_of
from compress.kernels.lowbit_matmul.avx512 import PackedLinear, pack
from compress.kernels.lowbit_matmul.weight import LinearWeight
from compress.kernels.paged_attention.cache import (
    FP8,
    INT8,
    Blocks,
    Codes,
    QuantizedBlocks,
    new_blocks,
    tensors_of,
)
from compress.kernels.program.build import library
from compress.kernels.w8a8_matmul import avx512 as w8a8
from compress.kernels.w8a8_matmul import check

LANES = 16  # of a vector; a cache block has as many tokens
WIDEST_HEAD = 512  # as WIDEST in rope/avx512.h
MOST_PARTS = 1 << 11  # as in paged_attention/avx512.h

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_CODES = (None, INT8, FP8)  # as HeadShape in rope/avx512.h counts them
_HEADS = dict.fromkeys(("codes", "heads", "kv_heads", "head_dim", "padded_dim", "group"), _INT)
_LATENT = dict.fromkeys(
    ("codes", "heads", "nope", "rope", "value", "rank", "padded_rank", "padded_rope"), _INT
)
# The arguments of each operation, field by field as its header has them; program.cpp knows an
# operation by its place here.
_ARGUMENTS = {
    "Embed": _struct("Embed", width=_INT, table=_POINTER, out=_POINTER),
    "Angles": _struct(
        "Angles", half=_INT, attention_scaling=_FLOAT, inverse_frequency=_POINTER, out=_POINTER
    ),
    "RmsNorm": _struct(
        "RmsNorm", width=_INT, stride=_INT, over_rows=_INT, eps=_FLOAT, delta=_POINTER,
        gain=_POINTER, residual=_POINTER, out=_POINTER,
    ),
    "Linear": _struct(
        "Linear", kind=_INT, scale_kind=_INT, n=_INT, k=_INT, chunk=_INT, silu_mul=_INT,
        over_rows=_INT, most_rows=_INT, weight=_POINTER, scale=_POINTER, shift=_POINTER,
        bias=_POINTER, x=_POINTER, y=_POINTER,
    ),
    "RopeAndWrite": _struct(
        "RopeAndWrite", **_HEADS, half=_INT, eps=_FLOAT, softmax_scale=_FLOAT, key_fixed=_FLOAT,
        value_fixed=_FLOAT, angles=_POINTER, qkv=_POINTER, q_gain=_POINTER, k_gain=_POINTER,
        queries=_POINTER, keys=_POINTER, values=_POINTER, key_scales=_POINTER,
        value_scales=_POINTER,
    ),
    "PagedAttention": _struct(
        "PagedAttention", **_HEADS, window=_INT, queries=_POINTER, keys=_POINTER, values=_POINTER,
        key_scales=_POINTER, value_scales=_POINTER, parts=_POINTER, out=_POINTER,
    ),
    "TakeRows": _struct("TakeRows", width=_INT, source=_POINTER, delta=_POINTER, out=_POINTER),
    "RoundingLinear": _struct(
        "RoundingLinear", kind=_INT, fp8=_INT, scale_kind=_INT, n=_INT, k=_INT, outliers=_INT,
        silu_mul=_INT, over_rows=_INT, in_float=_INT, largest=_FLOAT, threshold=_FLOAT,
        weight=_POINTER, scale=_POINTER, bias=_POINTER, rounded=_POINTER, outlier_index=_POINTER,
        outlier_weight=_POINTER, surplus=_POINTER, x=_POINTER, codes=_POINTER, tokens=_POINTER,
        y=_POINTER,
    ),
    "LatentWrite": _struct(
        "LatentWrite", **_LATENT, queries_width=_INT, joint_width=_INT, eps=_FLOAT,
        softmax_scale=_FLOAT, key_fixed=_FLOAT, latent_fixed=_FLOAT, angles=_POINTER,
        queries=_POINTER, joint=_POINTER, gain=_POINTER, up=_POINTER, absorbed=_POINTER,
        keys=_POINTER, latents=_POINTER, key_scales=_POINTER, latent_scales=_POINTER,
    ),
    "LatentAttention": _struct(
        "LatentAttention", **_LATENT, absorbed=_POINTER, keys=_POINTER, latents=_POINTER,
        key_scales=_POINTER, latent_scales=_POINTER, parts=_POINTER, attended=_POINTER,
    ),
    "LatentValues": _struct(
        "LatentValues", heads=_INT, rank=_INT, padded_rank=_INT, value=_INT, up=_POINTER,
        attended=_POINTER, out=_POINTER,
    ),
}  # fmt: skip
_BATCH = _struct(
    "Batch", tokens_count=ctypes.c_int64, sequences=ctypes.c_int64, rows_count=ctypes.c_int64,
    table_width=ctypes.c_int64, tokens=_POINTER, positions=_POINTER, slots=_POINTER,
    starts=_POINTER, contexts=_POINTER, block_tables=_POINTER, rows=_POINTER, logits=_POINTER,
)  # fmt: skip


AnyPacked = PackedLinear | w8a8.PackedRoundingLinear


class Recorder:
    """The operations of a decoder, recorded; `run` carries them out.

    Activations are `dtype` (bfloat16 or float32) where they enter a matrix product, float32 in
    between; so are keys and values, unless they are to be `codes`.  A batch holds at most
    `most_tokens` tokens, of which `most_rows` give logits.  `run` takes as many threads as PyTorch
    had when the recorder was made, whichever thread calls it.
    """

    description = "AVX-512 program"

    def __init__(
        self, dtype: torch.dtype, most_tokens: int, most_rows: int, codes: Codes | None = None
    ) -> None:
        self._library = library()
        self._program = ctypes.c_void_p(self._library.program_new(torch.get_num_threads()))
        self.dtype, self.codes = dtype, codes
        self._most = {False: most_tokens, True: most_rows}
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._kept: list[Any] = []  # tensors whose addresses the program holds
        self._parts: Tensor | None = None  # of attention
        self._over_rows = False
        self._vocabulary = 0
        self._surplus = torch.zeros(1, dtype=torch.int64)

    @property
    def surplus_outliers(self) -> int:
        """Elements above a threshold that were rounded, for want of room (see InputRounding)."""
        return int(self._surplus)

    def pack(self, weight: LinearWeight, silu_mul: bool = False) -> AnyPacked:
        """Lay a weight out for `linear`; with `silu_mul` it is gate over up."""
        if weight.inputs is None:
            return pack(weight, self.dtype, silu_mul)
        check(weight)
        return w8a8.pack(weight, silu_mul)

    def __del__(self) -> None:
        self._library.program_free(self._program)

    def embed(self, table: Tensor) -> Tensor:
        """Look up the tokens' embeddings: the residual stream [tokens, D] in float32."""
        out = self._buffer("hidden", table.shape[1], torch.float32)
        self._add("Embed", width=table.shape[1], table=table, out=out)
        return out

    def angles(self, inverse_frequency: Tensor, attention_scaling: float) -> Tensor:
        """Cosines and sines of the tokens' rotary angles."""
        half = inverse_frequency.numel()
        out = self._buffer("angles", 2 * half, torch.float32)
        self._add(
            "Angles", half=half, attention_scaling=attention_scaling,
            inverse_frequency=inverse_frequency.float().contiguous(), out=out,
        )  # fmt: skip
        return out

    def rms_norm(
        self, hidden: Tensor, delta: Tensor | None, gain: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Add `delta` to the residual stream in place; return it, and its norm times `gain`."""
        out = self._buffer("normed", hidden.shape[1], self.dtype)
        self._add(
            "RmsNorm", width=hidden.shape[1], stride=hidden.shape[1], over_rows=self._over_rows,
            eps=eps, delta=delta, gain=gain.float().contiguous(), residual=hidden, out=out,
        )  # fmt: skip
        return hidden, out

    def norm_part(self, joint: Tensor, width: int, gain: Tensor, eps: float) -> Tensor:
        """The norm of the first `width` columns, times `gain`."""
        out = self._buffer("normed part", width, self.dtype)
        self._add(
            "RmsNorm", width=width, stride=joint.shape[1], over_rows=False, eps=eps, delta=None,
            gain=gain.float().contiguous(), residual=joint, out=out,
        )  # fmt: skip
        return out

    def linear(self, name: str, x: Tensor, weight: AnyPacked) -> Tensor:
        """Return x Wᵀ + bias in float32; with gate and up in one weight, silu(gate) * up."""
        width, dtype = (
            (weight.rows // 2, self.dtype) if weight.silu_mul else (weight.rows, torch.float32)
        )
        out = self._buffer(name, width, dtype)
        self._linear(x, weight, out)
        return out

    def logits(self, x: Tensor, weight: AnyPacked) -> None:
        """The last operation: its product is what `run` returns."""
        self._vocabulary = weight.rows
        self._linear(x, weight, None)

    def _linear(self, x: Tensor, weight: AnyPacked, out: Tensor | None) -> None:
        if isinstance(weight, w8a8.PackedRoundingLinear):
            self._rounding_linear(x, weight, out)
            return
        self._add(
            "Linear", kind=weight.kind, scale_kind=weight.scale_kind, n=weight.rows,
            k=weight.columns, chunk=weight.chunk, silu_mul=weight.silu_mul,
            over_rows=self._over_rows, most_rows=self._most[self._over_rows], weight=weight.codes,
            scale=weight.scale, shift=weight.shift, bias=weight.bias, x=x, y=out,
        )  # fmt: skip

    def _rounding_linear(
        self, x: Tensor, weight: w8a8.PackedRoundingLinear, out: Tensor | None
    ) -> None:
        token_words = w8a8.TOKEN_WORDS + weight.outliers
        self._add(
            "RoundingLinear", kind=weight.kind, fp8=weight.fp8, scale_kind=weight.scale_kind,
            n=weight.rows, k=weight.columns, outliers=weight.outliers, silu_mul=weight.silu_mul,
            over_rows=self._over_rows, in_float=self.dtype == torch.float32,
            largest=weight.largest, threshold=weight.threshold, weight=weight.codes,
            scale=weight.scale, bias=weight.bias, rounded=weight.rounded,
            outlier_index=weight.outlier_index, outlier_weight=weight.outlier_weight,
            surplus=self._surplus, x=x,
            codes=self._buffer("codes of inputs", weight.words, torch.float32),
            tokens=self._buffer("rounded tokens", token_words, torch.float32), y=out,
        )  # fmt: skip

    def attention(
        self, qkv: Tensor, angles: Tensor, keys: Blocks, values: Blocks, *, heads: int,
        kv_heads: int, head_dim: int, q_gain: Tensor | None, k_gain: Tensor | None, eps: float,
        window: int | None, group: int = 0, owns: bool = True,
    ) -> Tensor:  # fmt: skip
        """Turn queries and keys, write keys and values into the cache, attend: [tokens, N H].

        `group` is the layer's, whose slots and block tables it has.  A layer that does not own what
        is in the cache has queries alone in `qkv`, and writes nothing.
        """
        padded = _padded(head_dim)
        if padded > WIDEST_HEAD:
            raise InputError(f"heads have {head_dim} dimensions; at most {WIDEST_HEAD} are served")
        shape = {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "padded_dim": padded,
            "codes": _CODES.index(self.codes),
            "group": group,
        }
        cache = _cache_arguments(keys, values, "values", "value_scales")
        fixed = {"key_fixed": _fixed(keys), "value_fixed": _fixed(values)}
        queries = self._buffer("queries", heads * padded, self.dtype)
        out = self._buffer("attended", heads * head_dim, self.dtype)
        if self._parts is None:
            self._parts = torch.zeros(MOST_PARTS, heads // kv_heads * (padded + 2))
        gains = {
            name: None if gain is None else gain.float().contiguous()
            for name, gain in (("q_gain", q_gain), ("k_gain", k_gain))
        }
        written = shape if owns else shape | {"kv_heads": 0}
        self._add(
            "RopeAndWrite", **written, half=angles.shape[1] // 2, eps=eps,
            softmax_scale=head_dim**-0.5, angles=angles, qkv=qkv, **gains, **fixed, queries=queries,
            **cache,
        )  # fmt: skip
        self._add(
            "PagedAttention", **shape, window=window or 0, queries=queries, **cache,
            parts=self._parts, out=out,
        )  # fmt: skip
        return out

    def pack_latent(self, weights: LatentWeights) -> LatentWeights:
        """Lay out what `latent_attention` has beside the linears."""
        return replace(weights, up=pack_up(weights.up, self.dtype))

    def latent_attention(
        self, queries: Tensor, joint: Tensor, angles: Tensor, keys: Blocks, latents: Blocks,
        weights: LatentWeights, shape: LatentShape,
    ) -> Tensor:  # fmt: skip
        """Turn queries and keys, write keys and normed latents into the cache, attend."""
        sizes = sizes_of(shape) | {"codes": _CODES.index(self.codes)}
        rank, heads = sizes["padded_rank"], shape.heads
        cache = _cache_arguments(keys, latents, "latents", "latent_scales")
        absorbed = self._buffer("queries", heads * (rank + sizes["padded_rope"]), self.dtype)
        attended = self._buffer("attended latents", heads * rank, torch.float32)
        out = self._buffer("attended", heads * shape.value_dim, self.dtype)
        if self._parts is None:
            self._parts = torch.zeros(MOST_PARTS, heads * (rank + 2))
        self._add(
            "LatentWrite", **sizes, queries_width=queries.shape[1], joint_width=joint.shape[1],
            eps=weights.eps, softmax_scale=shape.scale, key_fixed=_fixed(keys),
            latent_fixed=_fixed(latents), angles=angles, queries=queries, joint=joint,
            gain=weights.gain.float().contiguous(), up=weights.up.keys, absorbed=absorbed, **cache,
        )  # fmt: skip
        self._add(
            "LatentAttention", **sizes, absorbed=absorbed, **cache, parts=self._parts,
            attended=attended,
        )  # fmt: skip
        self._add(
            "LatentValues", heads=heads, rank=shape.rank, padded_rank=rank, value=shape.value_dim,
            up=weights.up.values, attended=attended, out=out,
        )  # fmt: skip
        return out

    def take_rows(self, hidden: Tensor, delta: Tensor) -> Tensor:
        """The residual stream of the tokens whose logits are wanted; later operations see these."""
        self._over_rows = True
        out = self._buffer("taken", hidden.shape[1], torch.float32)
        self._add("TakeRows", width=hidden.shape[1], source=hidden, delta=delta, out=out)
        return out

    def new_cache(
        self, num_blocks: int, kv_heads: int, key_dim: int, value_dim: int
    ) -> tuple[Blocks, Blocks]:
        """Keys and values of one layer, [blocks, ...], not filled.

        rope/avx512.h and latent_attention/avx512.h have the layouts.
        """
        scales = (num_blocks, kv_heads, BLOCK_SIZE)
        keys, values = (
            new_blocks(
                (num_blocks, kv_heads * _padded(dim) * BLOCK_SIZE), scales, self.dtype,
                torch.device("cpu"), self.codes,
            )
            for dim in (key_dim, value_dim)
        )  # fmt: skip
        return keys, values

    def run(self, batch: Any) -> Tensor:
        """Carry the recorded operations out on a `Batch`: logits float32 [rows, V]."""
        tokens, rows = batch.tokens.shape[0], batch.rows.shape[0]  # `len` takes longer
        if tokens > self._most[False] or rows > self._most[True]:
            raise ValueError(
                f"{tokens} tokens with {rows} logits in a batch; room is for {self._most[False]} "
                f"and {self._most[True]}"
            )
        logits = torch.empty(rows, self._vocabulary)
        arguments = _BATCH(
            tokens, batch.contexts.shape[0], rows, batch.block_tables.shape[-1],
            batch.tokens.data_ptr(), batch.positions.data_ptr(), batch.slots.data_ptr(),
            batch.starts.data_ptr(), batch.contexts.data_ptr(), batch.block_tables.data_ptr(),
            batch.rows.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        self._library.program_run(self._program, ctypes.byref(arguments))
        return logits

    def _buffer(self, name: str, width: int, dtype: torch.dtype) -> Tensor:
        key = (name + " of rows" * self._over_rows, width)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(self._most[self._over_rows], width, dtype=dtype)
        return self._buffers[key]

    def _add(self, operation: str, **arguments: Any) -> None:
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        assert all(tensor.is_contiguous() for tensor in tensors)
        self._kept += tensors
        plain = {
            name: value.data_ptr() if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        struct = _ARGUMENTS[operation](**plain)
        self._library.program_add(
            self._program,
            list(_ARGUMENTS).index(operation),
            self.dtype == torch.float32,
            ctypes.byref(struct),
        )


def _cache_arguments(keys: Blocks, values: Blocks, *names: str) -> dict[str, Tensor | None]:
    """The tensors of a layer's cache, by the names of the arguments; `names` are the values'."""
    arguments: dict[str, Tensor | None] = {}
    for called, blocks in (("keys", "key_scales"), keys), (names, values):
        arguments |= dict.fromkeys(called) | dict(zip(called, tensors_of(blocks), strict=False))
    return arguments


def _fixed(blocks: Blocks) -> float:
    """The scale that all rows are written with, or 0 for each row's own."""
    return (blocks.fixed or 0.0) if isinstance(blocks, QuantizedBlocks) else 0.0


def _padded(head_dim: int) -> int:
    """The dimensions that a head takes in the cache: whole vectors."""
    return -(-head_dim // LANES) * LANES
