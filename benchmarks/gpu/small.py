"""The launches between products: norms, gate, rotation with the cache's write, embedding, draws.

At a decode step's sizes each is a few microseconds, of which the launch is most.  What they read
was written just before, so their data is left in the L2 cache here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compress.kernels.eager import BLOCK_SIZE
from compress.kernels.embed.triton import embed
from compress.kernels.rms_norm import reference as norm_reference
from compress.kernels.rms_norm.triton import rms_norm
from compress.kernels.rope.triton import angles, rope_and_write
from compress.kernels.sampling.triton import draw
from compress.kernels.silu_mul import reference as gate_reference
from compress.kernels.silu_mul.triton import silu_mul
from compress.kernels.workspace import Workspace
from gpu.place import Place
from gpu.timing import relative_error, seconds
from gpu.weights import Shape, shape_of

TOKENS = (1, 16, 64, 512)
TINY_TOKENS = (3,)
TOLERANCE = 8e-3  # two roundings to bfloat16, of 2^-9 each, in a norm and its gain
Case = tuple[str, Callable[[], Any], float]  # name, call, error


def measure(place: Place) -> dict[str, Any]:
    """Times of each launch at several numbers of tokens."""
    rows, problems = [], []
    for tokens in TINY_TOKENS if place.stand_in else TOKENS:
        for name, call, error in cases(place, shape_of(place), tokens):
            row: dict[str, Any] = {"name": name, "tokens": tokens, "error": error}
            if error <= TOLERANCE:
                row["seconds"] = seconds(place, [call] * 8)
            else:
                problems.append(f"{name}, {tokens} tokens: off by {error:.2g}")
            rows.append(row)
    return {"launches": rows, "problems": problems}


def cases(place: Place, shape: Shape, tokens: int) -> list[Case]:
    """Each launch with its inputs."""
    device, dtype = place.device, place.dtype
    generator = torch.Generator(device).manual_seed(tokens)
    kind = {"device": device, "dtype": dtype, "generator": generator}
    x, residual = torch.randn(tokens, shape.D, **kind), torch.randn(tokens, shape.D, **kind)
    gate_up = torch.randn(tokens, 2 * shape.F, **kind)
    gain = torch.ones(shape.D, device=device)
    table = torch.randn(shape.V, shape.D, **kind)
    ids = torch.arange(tokens, device=device)
    blocks = -(-tokens // BLOCK_SIZE)
    keys, values = torch.zeros(2, blocks, shape.K, BLOCK_SIZE, shape.H, device=device, dtype=dtype)
    qkv = torch.randn(tokens, (shape.N + 2 * shape.K) * shape.H, **kind)
    steps = torch.rand(shape.H // 2, device=device)
    turns = angles(ids, steps, 1.0)
    normed = norm_reference.rms_norm(x, gain, 1e-5, residual)[1]

    def rotate() -> Any:
        return rope_and_write(
            qkv, turns, keys, values, ids, heads=shape.N, kv_heads=shape.K, head_dim=shape.H,
            q_gain=None, k_gain=None, eps=1e-5,
        )  # fmt: skip

    # a rotation keeps lengths
    turned = rotate().float().norm() / qkv[:, : shape.N * shape.H].float().norm()
    found: list[Case] = [
        ("rms_norm + residual", lambda: rms_norm(x, gain, 1e-5, residual),
         relative_error(rms_norm(x, gain, 1e-5, residual)[1], normed)),
        ("silu_mul", lambda: silu_mul(gate_up),
         relative_error(silu_mul(gate_up), gate_reference.silu_mul(gate_up.float()))),
        ("angles", lambda: angles(ids, steps, 1.0),
         relative_error(turns[:, : shape.H // 2], (ids[:, None] * steps).cos())),
        ("rope + cache write", rotate, abs(float(turned) - 1)),
        ("embed", lambda: embed(ids, ids, table),
         relative_error(embed(ids, ids, table), table[:tokens])),
    ]  # fmt: skip
    return found + (draws(place, shape, tokens) if tokens <= 64 else [])


def draws(place: Place, shape: Shape, rows: int) -> list[Case]:
    """Sampling, without filters and with top-k and top-p; checked where the answer is known."""
    device = place.device
    generator = torch.Generator(device).manual_seed(rows)
    logits = 4 * torch.randn(rows, shape.V, device=device, generator=generator)
    uniform = torch.rand(rows, device=device, generator=generator, dtype=torch.float64)
    ones, workspace = torch.ones(rows, device=device), Workspace(device)

    def drawn(temperature: float, top_k: int, top_p: float, filtered: bool) -> Tensor:
        settings = (ones * temperature, (ones * top_k).int(), ones * top_p, ones * 0)
        return draw(logits, uniform, *settings, filtered=filtered, workspace=workspace)

    likeliest = logits.argmax(dim=1)
    greedy = float((drawn(0.0, 0, 1.0, False) != likeliest).float().mean())
    only = float((drawn(1.0, 1, 1.0, True) != likeliest).float().mean())
    settings = (ones, (ones * 40).int(), ones * 0.9, ones * 0)

    def call(filtered: bool) -> Callable[[], Tensor]:
        return lambda: draw(logits, uniform, *settings, filtered=filtered, workspace=workspace)

    return [
        ("draw", call(False), greedy),
        ("draw, top-k 40 and top-p 0.9", call(True), only),
    ]
