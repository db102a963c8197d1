"""The operations of a decoder as Triton launches: NVIDIA GPUs, or Triton's interpreter in tests.

The same names as `compress.kernels.eager.Eager`.  Nothing here waits for the device or looks at
what tensors hold, so a step can be captured in a CUDA graph: shapes alone decide what is launched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.kernels.eager import BLOCK_SIZE
from compress.kernels.embed.triton import embed
from compress.kernels.latent_attention import LatentShape, LatentWeights
from compress.kernels.latent_attention.triton import latent_attention, latent_write
from compress.kernels.lowbit_matmul import LinearWeight, pack_for_triton
from compress.kernels.lowbit_matmul.dense import DenseLinear
from compress.kernels.lowbit_matmul.triton import TritonLinear
from compress.kernels.paged_attention.cache import Blocks, Codes, new_blocks
from compress.kernels.paged_attention.triton import paged_attention
from compress.kernels.rms_norm.triton import rms_norm
from compress.kernels.rope.triton import angles, rope_and_write
from compress.kernels.silu_mul.triton import silu_mul
from compress.kernels.w8a8_matmul import pack_for_triton as pack_rounding
from compress.kernels.w8a8_matmul.triton import TritonRoundingLinear
from compress.kernels.workspace import Workspace


@dataclass(frozen=True)
class DeviceBatch:
    """A step as the kernels read it; all tensors are on the device.

    A sequence of context 0 and a token of slot -1 are padding: they read and write no cache.
    """

    tokens: Tensor  # int64 [T]; -1 - i is draw i of the launch before
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [groups, T]
    starts: Tensor  # int32 [S + 1]
    contexts: Tensor  # int32 [S]
    block_tables: Tensor  # int32 [groups, S, W], any strides
    drawn: Tensor  # int64, the last launch's draws
    rows: Tensor | None  # int64 [R], whose logits are wanted; None for all
    tiles: Tensor | None  # as `paged_attention` takes them
    most_new: int
    splits: int


@dataclass(frozen=True)
class _Linear:
    """`silu_mul`: the packed weight is gate over up, and does not apply silu itself."""

    packed: TritonLinear | TritonRoundingLinear | DenseLinear
    silu_mul: bool

    @property
    def bytes(self) -> int:
        return self.packed.bytes


class Launched:
    """The operations on one device; `batch` is what they work on."""

    description = "Triton kernels"
    batch: DeviceBatch

    def __init__(
        self, dtype: torch.dtype, device: torch.device, codes: Codes | None = None
    ) -> None:
        """`codes` are those of keys and values; None keeps them in `dtype`."""
        self.dtype, self.device, self.codes = dtype, device, codes
        self._workspace = Workspace(device)
        self._surplus = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def surplus_outliers(self) -> int:
        """Elements above a threshold that were rounded, for want of room; waits for the device."""
        return int(self._surplus)

    @property
    def workspace(self) -> Workspace:
        """What all launches share, draws included."""
        return self._workspace

    def pack(self, weight: LinearWeight, silu_mul: bool = False) -> _Linear:
        """Lay a weight out for `linear`; with `silu_mul` it is gate over up."""
        place = self.dtype, self.device, self._workspace
        if weight.inputs is not None:
            return _Linear(pack_rounding(weight, *place, self._surplus, silu_mul), False)
        packed = pack_for_triton(weight, *place, silu_mul)
        return _Linear(packed, silu_mul and isinstance(packed, DenseLinear))

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
        return embed(self.batch.tokens, self.batch.drawn, table)

    def angles(self, inverse_frequency: Tensor, attention_scaling: float) -> Tensor:
        """Cosines and sines of the tokens' rotary angles, float32 [tokens, R]."""
        return angles(self.batch.positions, inverse_frequency, attention_scaling)

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
        self, qkv: Tensor, angles: Tensor, keys: Blocks, values: Blocks, *, heads: int,
        kv_heads: int, head_dim: int, q_gain: Tensor | None, k_gain: Tensor | None, eps: float,
        window: int | None, group: int = 0, owns: bool = True,
    ) -> Tensor:  # fmt: skip
        """Turn queries and keys, write keys and values into the cache, attend: [tokens, N H].

        `group` is the layer's, whose slots and block tables it has.  A layer that does not own what
        is in the cache has queries alone in `qkv`, and writes nothing.
        """
        batch = self.batch
        q = rope_and_write(
            qkv, angles, keys, values, batch.slots[group], heads=heads,
            kv_heads=kv_heads if owns else 0, head_dim=head_dim, q_gain=q_gain,
            k_gain=k_gain if owns else q_gain, eps=eps,
        )  # fmt: skip
        out = paged_attention(
            q, keys, values, batch.starts, batch.contexts, batch.block_tables[group],
            head_dim**-0.5, window, tiles=batch.tiles, most_new=batch.most_new,
            splits=batch.splits, workspace=self._workspace,
        )  # fmt: skip
        return out.view(len(qkv), heads * head_dim)

    def pack_latent(self, weights: LatentWeights) -> LatentWeights:
        """Lay out what `latent_attention` has beside the linears."""
        gain, up = weights.gain.to(self.device), weights.up.to(self.device, self.dtype)
        return replace(weights, gain=gain, up=up)

    def norm_part(self, joint: Tensor, width: int, gain: Tensor, eps: float) -> Tensor:
        """The norm of the first `width` columns, times `gain`."""
        return rms_norm(joint[:, :width], gain, eps)[1]

    def latent_attention(
        self, queries: Tensor, joint: Tensor, angles: Tensor, keys: Blocks, latents: Blocks,
        weights: LatentWeights, shape: LatentShape,
    ) -> Tensor:  # fmt: skip
        """Turn queries and keys, write keys and normed latents into the cache, attend."""
        batch = self.batch
        turned = latent_write(
            queries, joint, angles, keys, latents, batch.slots[0], weights, shape
        )  # fmt: skip
        heads = queries[:, : shape.heads * shape.query_dim].unflatten(1, (shape.heads, -1))
        out = latent_attention(
            heads[..., : shape.nope_dim], turned, keys, latents, weights.up, batch.starts,
            batch.contexts, batch.block_tables[0], shape.scale, tiles=batch.tiles,
            most_new=batch.most_new, splits=batch.splits, workspace=self._workspace,
        )  # fmt: skip
        return out.flatten(1)

    def take_rows(self, hidden: Tensor, delta: Tensor) -> Tensor:
        """The residual stream of the tokens whose logits are wanted."""
        rows = self.batch.rows
        return hidden + delta if rows is None else hidden[rows] + delta[rows]

    def logits(self, x: Tensor, weight: _Linear) -> Tensor:
        """Logits float32 [rows, V]."""
        return weight.packed(x, torch.float32)
