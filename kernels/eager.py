"""The operations of a decoder one by one in PyTorch: any device and dtype that it knows.

The same names as `compress.kernels.program.Recorder`, so that a model is written once for both.
Here they compute at once, on the batch of the moment; each chooses its implementation by device
and dtype (the `__init__.py` of its folder).  Activations are in the model's dtype throughout.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.kernels.latent_attention import LatentShape, LatentWeights, latent_attention
from compress.kernels.lowbit_matmul import LinearWeight, PackedLinear, pack
from compress.kernels.paged_attention import paged_attention, write_kv
from compress.kernels.paged_attention.cache import Blocks, Codes, new_blocks
from compress.kernels.rms_norm import rms_norm
from compress.kernels.rope import apply_rope, rope_table
from compress.kernels.silu_mul import silu_mul
from compress.kernels.w8a8_matmul import pack as pack_rounding

BLOCK_SIZE = 16


@dataclass(frozen=True)
class _Linear:
    packed: PackedLinear
    silu_mul: bool

    @property
    def bytes(self) -> int:
        return self.packed.bytes


class Eager:
    """The operations on one device; `batch` (compress.runtime.batch.Batch) is what they work on."""

    description = "PyTorch operations"
    batch: Any

    def __init__(
        self, dtype: torch.dtype, device: torch.device, codes: Codes | None = None
    ) -> None:
        """`codes` are those of keys and values; None keeps them in `dtype`."""
        self.dtype, self.device, self.codes = dtype, device, codes
        self._surplus = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def surplus_outliers(self) -> int:
        """Elements above a threshold that were rounded, for want of room (see InputRounding)."""
        return int(self._surplus)

    def pack(self, weight: LinearWeight, silu_mul: bool = False) -> _Linear:
        """Lay a weight out for `linear`; with `silu_mul` it is gate over up."""
        if weight.inputs is None:
            return _Linear(pack(weight, self.dtype, self.device), silu_mul)
        packed = pack_rounding(weight, self.dtype, self.device, self._surplus)
        return _Linear(packed, silu_mul)

    def new_cache(
        self, num_blocks: int, kv_heads: int, key_dim: int, value_dim: int
    ) -> tuple[Blocks, Blocks]:
        """Keys and values of a layer, not filled: [blocks, kv_heads, block_size, dim] each."""
        rows = (num_blocks, kv_heads, BLOCK_SIZE)
        keys, values = (
            new_blocks((*rows, dim), rows, self.dtype, self.device, self.codes)
            for dim in (key_dim, value_dim)
        )
        return keys, values

    def embed(self, table: Tensor) -> Tensor:
        """Look up the tokens' embeddings: the residual stream [tokens, D]."""
        return table[self.batch.tokens].to(self.dtype)

    def angles(self, inverse_frequency: Tensor, attention_scaling: float) -> Any:
        """Cosines and sines of the tokens' rotary angles."""
        positions = self.batch.positions
        return rope_table(positions, inverse_frequency, attention_scaling, self.dtype)

    def rms_norm(
        self, hidden: Tensor, delta: Tensor | None, gain: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return hidden + delta and its norm times `gain`."""
        return rms_norm(hidden, gain, eps, delta)

    def linear(self, name: str, x: Tensor, weight: _Linear) -> Tensor:
        """Return x Wᵀ + bias; with gate and up in one weight, silu(gate) * up."""
        y = weight.packed(x)
        return silu_mul(y) if weight.silu_mul else y

    def attention(
        self, qkv: Tensor, angles: Any, keys: Blocks, values: Blocks, *, heads: int, kv_heads: int,
        head_dim: int, q_gain: Tensor | None, k_gain: Tensor | None, eps: float,
        window: int | None, group: int = 0, owns: bool = True,
    ) -> Tensor:  # fmt: skip
        """Turn queries and keys, write keys and values into the cache, attend: [tokens, N H].

        `group` is the layer's, whose slots and block tables it has.  A layer that does not own what
        is in the cache has queries alone in `qkv`, and writes nothing.
        """
        batch, written = self.batch, kv_heads if owns else 0
        split = qkv.view(len(qkv), -1, head_dim).split([heads, written, written], dim=1)
        q, k, v = split  # [T, N, H], [T, K, H], [T, K, H]
        if q_gain is not None:
            q = rms_norm(q, q_gain, eps)[1]
        if k_gain is not None:
            k = rms_norm(k, k_gain, eps)[1]
        q, k = apply_rope(q, k, *angles)
        if owns:
            write_kv(keys, values, k, v, batch.slots[group])
        out = paged_attention(
            q, keys, values, batch.starts, batch.contexts, batch.block_tables[group],
            head_dim**-0.5, window,
        )  # fmt: skip
        return out.reshape(len(qkv), heads * head_dim)

    def pack_latent(self, weights: LatentWeights) -> LatentWeights:
        """Lay out what `latent_attention` has beside the linears."""
        return replace(
            weights,
            gain=weights.gain.to(self.device),
            up=weights.up.to(self.device, self.dtype),
        )

    def norm_part(self, joint: Tensor, width: int, gain: Tensor, eps: float) -> Tensor:
        """The norm of the first `width` columns, times `gain`."""
        return rms_norm(joint[:, :width], gain, eps)[1]

    def latent_attention(
        self, queries: Tensor, joint: Tensor, angles: Any, keys: Blocks, latents: Blocks,
        weights: LatentWeights, shape: LatentShape,
    ) -> Tensor:  # fmt: skip
        """Turn queries and keys, write keys and normed latents into the cache, attend.

        queries  [tokens, >= N (P + d)], heads of P dimensions without a position and d with one
        joint    [tokens, >= R + d], whose last columns are the latents and the keys

        Returns [tokens, N v].
        """
        batch, tokens = self.batch, len(joint)
        q = queries[:, : shape.heads * shape.query_dim].view(tokens, shape.heads, -1)
        nope, turned = q.split([shape.nope_dim, shape.rope_dim], dim=-1)
        latent, key = joint[:, -shape.cached_dim :].split([shape.rank, shape.rope_dim], dim=-1)
        latent = rms_norm(latent.float(), weights.gain, weights.eps)[1].to(self.dtype)
        turned, key = apply_rope(turned, key[:, None], *angles)
        write_kv(keys, latents, key, latent[:, None], batch.slots[0])
        out = latent_attention(
            torch.cat([nope, turned], dim=-1), keys, latents, weights.up, batch.starts,
            batch.contexts, batch.block_tables[0], shape.scale,
        )  # fmt: skip
        return out.flatten(1)

    def take_rows(self, hidden: Tensor, delta: Tensor) -> Tensor:
        """The residual stream of the tokens whose logits are wanted."""
        return (hidden + delta)[self.batch.rows]

    def logits(self, x: Tensor, weight: _Linear) -> Tensor:
        """Logits float32 [rows, V]."""
        return weight.packed(x).float()
