"""The model: Llama and its relatives, written once for every way of computing it.

    h = embedding[tokens]
    for each layer:  h += out(attention(qkv(norm(h)))) ;  h += down(silu(gate) * up),  of norm(h)
    logits = head(norm(h))

`Decoder._step` says so with operations, and three classes carry them out.  `RecordedDecoder` runs
the method once, and for each batch what that recorded (compress.kernels.program).  `EagerDecoder`
runs it for each batch (compress.kernels.eager).  `GpuDecoder` (compress.runtime.gpu_decoder)
captures it in CUDA graphs (compress.kernels.launched).  compress.runtime.loading chooses.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from compress.kernels.eager import BLOCK_SIZE, Eager
from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.paged_attention.cache import Blocks, Codes, tensors_of, with_scales
from compress.kernels.program import Recorder
from compress.runtime.batch import Batch
from compress.runtime.cache_layout import CacheLayout
from compress.runtime.latents import LatentLayer
from compress.runtime.weights import DecoderWeights


@dataclass(frozen=True)
class _Layer:
    """A layer's weights as the operations hold them; the linears are packed."""

    input_norm: Tensor
    post_norm: Tensor
    owns: bool  # keys and values of its own
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: Any
    out: Any
    gate_up: Any
    down: Any
    window: int | None
    kv_scales: tuple[float, float] | None  # calibrated ones
    latent: LatentLayer | None

    @property
    def weight_bytes(self) -> int:
        """What a step reads of the layer's matrices."""
        packed = [self.qkv, self.out, self.gate_up, self.down]
        if self.latent is not None:
            of_queries = (self.latent.apart, self.latent.q_up)
            packed += [self.latent.weights.up, *(part for part in of_queries if part is not None)]
        return sum(part.bytes for part in packed)


class Decoder(ABC):
    """A model with a paged cache (compress.runtime.batch.Model), computed by `operations`."""

    block_size = BLOCK_SIZE

    def __init__(
        self,
        weights: DecoderWeights,
        operations: Any,
        device: torch.device,
    ) -> None:
        self.vocab_size, self.max_context = weights.vocab_size, weights.max_context
        self._device = device
        self._operations = operations
        self._shape = {
            "heads": weights.heads,
            "kv_heads": weights.kv_heads,
            "head_dim": weights.head_dim,
            "eps": weights.norm_eps,
        }
        self._latent = weights.latent
        pack = self._operations.pack
        self._embedding = weights.embedding.to(device, operations.dtype).contiguous()
        self._final_norm = weights.final_norm.to(device)
        self._inv_freq, self._rope_scaling = weights.inv_freq.to(device), weights.rope_scaling
        tied = weights.head.dense is weights.embedding
        self._head = pack(LinearWeight.of_dense(self._embedding) if tied else weights.head)
        self._layers = []
        self._sources = [layer.source for layer in weights.layers]
        while weights.layers:  # a layer's own tensors go as their packed ones come
            layer = weights.layers.pop(0)
            self._layers.append(
                _Layer(
                    layer.input_norm.to(device),
                    layer.post_norm.to(device),
                    layer.source == len(self._layers),
                    None if layer.q_norm is None else layer.q_norm.to(device),
                    None if layer.k_norm is None else layer.k_norm.to(device),
                    pack(layer.qkv),
                    pack(layer.out),
                    pack(layer.gate_up, silu_mul=True),
                    pack(layer.down),
                    layer.window,
                    layer.kv_scales,
                    self._packed_latent(layer.latent),
                )
            )
        self._layout = CacheLayout.of(self._seen(), self.block_size, self._sources)
        self._stored: list[tuple[Blocks, Blocks]] = []  # of each place of a block
        self._cache: list[tuple[Blocks, Blocks]] = []  # of each layer
        self._groups: list[int] = []  # of each layer: whose blocks it has
        self._whole: tuple[Decoder, list[int]] | None = None  # whose layers these are, and which

    def _packed_latent(self, layer: LatentLayer | None) -> LatentLayer | None:
        if layer is None:
            return None
        return replace(
            layer,
            apart=None if layer.apart is None else self._operations.pack(layer.apart),
            q_gain=None if layer.q_gain is None else layer.q_gain.to(self._device),
            q_up=None if layer.q_up is None else self._operations.pack(layer.q_up),
            weights=self._operations.pack_latent(layer.weights),
        )

    def without(self, layers: Collection[int], head: LinearWeight | None = None) -> Self:
        """This model with some layers left out: the same weights, and the same cache.

        It takes no memory but for what a step computes with, and for a `head` [V, D] of its own.
        `allocate` takes the cache of this model, which must have one by then.  Its layers see
        the keys and values that those of this model wrote, and write theirs in the same places.
        """
        kept = [index for index in range(len(self._layers)) if index not in layers]
        part = copy.copy(self)
        part._layers = [self._layers[index] for index in kept]
        part._stored, part._cache, part._whole = [], [], (self, kept)
        if head is not None:
            part._head = self._operations.pack(head)
        return part

    @property
    def description(self) -> str:
        """How it is computed, for people."""
        return self._operations.description

    @property
    def windows(self) -> list[int | None]:
        """Of each layer: tokens that a query sees, itself included; None for all."""
        return [layer.window for layer in self._layers]

    @property
    def layout(self) -> CacheLayout:
        """Which layers share a block table."""
        return self._whole[0].layout if self._whole else self._layout

    def keep_all(self) -> None:
        """Have one block table, of which nothing is given back; before `allocate`.

        For a cache whose block numbers another model uses too.
        """
        seen: list[int | None] = [None] * len(self._layers)
        self._layout = CacheLayout.of(seen, self.block_size, self._sources)

    def _seen(self) -> list[int | None]:
        """The windows of the layers, but for those that no context outgrows."""
        return [
            None if window is None or window >= self.max_context else window
            for window in self.windows
        ]

    @property
    def kv_cache_dtype(self) -> str:
        """What keys and values are stored as, by name: bfloat16, float32, int8, fp8 ..."""
        codes = self._operations.codes
        return codes.name if codes else str(self._operations.dtype).removeprefix("torch.")

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of one block, of as many layers as it has places for.

        0 for a part of another model.
        """
        if self._whole:
            return 0
        tensors = (tensor for blocks in self._new_cache(1) for tensor in tensors_of(blocks))
        return self._layout.width * sum(tensor.nbytes for tensor in tensors)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token, all layers."""
        return sum(layers for _, layers in self._layout.kinds) * self._bytes_per_place

    def kv_bytes_read(self, context: float) -> float:
        """Keys and values that a decode step reads of a sequence of so many tokens: those of the
        windows, and by each of the layers that share them."""
        seen = sum(context if window is None else min(context, window) for window in self.windows)
        return seen * self._bytes_per_place

    @property
    def _bytes_per_place(self) -> int:
        """Keys and values of one token in one layer."""
        return self.bytes_per_block // (self._layout.width * self.block_size)

    @property
    def weight_bytes(self) -> int:
        """What a step reads of the weights, whatever the batch: all linears, and the head."""
        return sum(layer.weight_bytes for layer in self._layers) + self._head.bytes

    @property
    def surplus_outliers(self) -> int:
        """Elements of layers' inputs that had no room as outliers (InputRounding)."""
        return self._operations.surplus_outliers

    def allocate(self, num_blocks: int) -> None:
        """Make the cache."""
        if self._whole:
            model, kept = self._whole
            self._cache = [model._cache[index] for index in kept]
            self._groups = [model._groups[index] for index in kept]
            return
        layout, self._groups = self._layout, list(self._layout.groups)
        self._stored = [self._new_cache(num_blocks) for _ in range(layout.width)]
        self._cache = [
            with_scales(self._stored[place], layer.kv_scales)
            for place, layer in zip(layout.places, self._layers, strict=True)
        ]

    def _new_cache(self, num_blocks: int) -> tuple[Blocks, Blocks]:
        """Keys and values of a layer, or the keys and latents."""
        dims = (self._shape["head_dim"],) * 2
        if self._latent is not None:
            dims = (self._latent.rope_dim, self._latent.rank)
        return self._operations.new_cache(num_blocks, self._shape["kv_heads"], *dims)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy each (source, target) in turn, in all places."""
        for source, target in pairs:
            for blocks in (blocks for place in self._stored for blocks in place):
                for tensor in tensors_of(blocks):
                    tensor[target] = tensor[source]

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """The logits of `batch.rows`, float32 [R, V]."""

    def _step(self, do: Any) -> Any:
        """One step, in operations; what it returns are logits, or nothing when it is recorded."""
        eps = self._shape["eps"]
        hidden, delta = do.embed(self._embedding), None
        angles = do.angles(self._inv_freq, self._rope_scaling)
        layers = zip(self._layers, self._cache, self._groups, strict=True)
        for layer, cache, group in layers:
            hidden, x = do.rms_norm(hidden, delta, layer.input_norm, eps)
            joint = do.linear("qkv", x, layer.qkv)
            if layer.latent is None:
                attended = do.attention(
                    joint, angles, *cache, **self._shape, q_gain=layer.q_norm,
                    k_gain=layer.k_norm, window=layer.window, group=group,
                    owns=layer.owns,
                )  # fmt: skip
            else:
                attended = self._attend_latents(do, x, joint, angles, cache, layer.latent)
            delta = do.linear("out", attended, layer.out)
            hidden, x = do.rms_norm(hidden, delta, layer.post_norm, eps)
            delta = do.linear("down", do.linear("gate_up", x, layer.gate_up), layer.down)
        hidden = do.take_rows(hidden, delta)
        return do.logits(do.rms_norm(hidden, None, self._final_norm, eps)[1], self._head)

    def _attend_latents(
        self,
        do: Any,
        x: Any,
        joint: Any,
        angles: Any,
        cache: tuple[Blocks, Blocks],
        layer: LatentLayer,
    ) -> Any:
        """Attention on latents; `joint` has the queries, or what they are made of, in front, unless
        they are apart and made of `x` here."""
        queries = joint if layer.apart is None else do.linear("queries apart", x, layer.apart)
        if layer.q_gain is not None:
            width = layer.q_gain.numel()
            normed = do.norm_part(queries, width, layer.q_gain, layer.q_eps)
            queries = do.linear("q_up", normed, layer.q_up)
        return do.latent_attention(queries, joint, angles, *cache, layer.weights, self._latent)


class EagerDecoder(Decoder):
    """Computes operation by operation, on any device and in any dtype that PyTorch knows."""

    def __init__(
        self,
        weights: DecoderWeights,
        device: torch.device,
        dtype: torch.dtype,
        codes: Codes | None = None,
    ) -> None:
        super().__init__(weights, Eager(dtype, device, codes), device)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """The logits of `batch.rows`, float32 [R, V]."""
        if self._device.type != "cpu":
            fields = {name: tensor.to(self._device) for name, tensor in vars(batch).items()}
            batch = Batch(**fields)
        self._operations.batch = batch
        return self._step(self._operations)


class RecordedDecoder(Decoder):
    """Computes by a recorded program, on CPUs with AVX-512, in bfloat16 or float32.

    `most_tokens` is the size of the largest batch that it will be given.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        dtype: torch.dtype,
        most_tokens: int,
        codes: Codes | None = None,
    ) -> None:
        self._new = lambda: Recorder(dtype, most_tokens, most_tokens, codes)
        super().__init__(weights, self._new(), torch.device("cpu"))

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, and record the step on it."""
        super().allocate(num_blocks)
        self._operations = self._new()
        self._step(self._operations)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """The logits of `batch.rows`, float32 [R, V]."""
        assert len(batch.block_tables) == len(self.layout.windows), "a table for each group"
        return self._operations.run(batch)
