"""Random weights in the shapes of Llama-3-8B, made on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compress.kernels.lowbit_matmul import LinearWeight
from compress.runtime.weights import DecoderWeights, LayerWeights
from gpu.place import Place


@dataclass(frozen=True)
class Shape:
    """D model, F ffn, N query heads, K KV heads, H head dim, V vocabulary, L layers, S context."""

    D: int
    F: int
    N: int
    K: int
    H: int
    V: int
    L: int
    S: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Of a layer: name -> (out, in)."""
        return {
            "qkv": ((self.N + 2 * self.K) * self.H, self.D),
            "out": (self.D, self.N * self.H),
            "gate_up": (2 * self.F, self.D),
            "down": (self.D, self.F),
        }


LLAMA_3_8B = Shape(D=4096, F=14336, N=32, K=8, H=128, V=128256, L=32, S=8192)
TINY = Shape(D=128, F=256, N=4, K=2, H=32, V=256, L=1, S=64)


def shape_of(place: Place) -> Shape:
    """Llama-3-8B's; a tiny one in the interpreter."""
    return TINY if place.stand_in else LLAMA_3_8B


def quantized(out: int, width: int, bits: int, group: int, place: Place) -> LinearWeight:
    """Random codes, positive scales [out, width / group]; products of unit x are of order 1.

    Scales are numbers of float16, as in checkpoints, which kernels may keep in that.
    """
    generator = torch.Generator(place.device).manual_seed(out * width + bits)
    kind = {"device": place.device, "generator": generator}
    most = 1 << (bits - 1)
    codes = torch.randint(-most, most, (out, width), dtype=torch.int8, **kind)
    scale = 0.5 + torch.rand(out, width // group, **kind)
    scale = (scale * 2 / (most * width**0.5)).half().float()
    return LinearWeight(None, codes, scale, None, group, bits)


def decoder_weights(shape: Shape, bits: int, group: int, place: Place) -> DecoderWeights:
    """A whole model.  Its layers share their codes here; packing gives each layer its own."""
    device = place.device
    linears = {name: quantized(*size, bits, group, place) for name, size in shape.linears.items()}
    gain = torch.ones(shape.D, device=device)
    layer = LayerWeights(
        input_norm=gain,
        post_norm=gain,
        source=0,
        q_norm=None,
        k_norm=None,
        window=None,
        kv_scales=None,
        latent=None,
        **linears,
    )
    generator = torch.Generator(device).manual_seed(0)
    kind = {"device": device, "dtype": place.dtype, "generator": generator}
    head = torch.randn(shape.V, shape.D, **kind) * shape.D**-0.5
    steps = torch.arange(0, shape.H, 2, device=device).float() / shape.H
    return DecoderWeights(
        embedding=torch.randn(shape.V, shape.D, **kind),
        layers=[replace(layer, source=index) for index in range(shape.L)],
        final_norm=gain,
        head=LinearWeight.of_dense(head),
        heads=shape.N,
        kv_heads=shape.K,
        head_dim=shape.H,
        norm_eps=1e-5,
        max_context=shape.S,
        vocab_size=shape.V,
        inv_freq=500000.0**-steps,
        rope_scaling=1.0,
    )
