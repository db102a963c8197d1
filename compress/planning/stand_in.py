"""What a device makes of a step beside its peaks: measured on random models, not on the user's.

    seconds of a decode step = overhead + bytes / bandwidth

A small model gives the overhead (scheduler, sampler, launches or barriers), which grows with
layers; a larger one of as many layers, whose weights no cache holds, gives the bandwidth that the
kernels reach, and its prefill the matmul rate that they reach.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from compress.bench.latency import Shape, run_once
from compress.kernels.lowbit_matmul import LinearWeight
from compress.runtime.engine import Engine
from compress.runtime.loading import MOST_TOKENS, make_decoder
from compress.runtime.weights import DecoderWeights, LayerWeights

SEED = 0
HEAD_DIM = 64
VOCAB = 1024
SMALL, LARGE = (128, 256), (1024, 3072)  # (hidden, ffn)
FEW_LAYERS, MANY_LAYERS = 4, 16
PROMPT, STEPS, PREFILL = 16, 32, 512  # tokens


@dataclass(frozen=True)
class Reached:
    """What the runtime reached here.

    bandwidth        bytes/s of weights in a decode step
    matmul           FLOP/s of the linears in a prefill
    step_seconds     a decode step of no layers, and layer_seconds what each adds, without its bytes
    """

    bandwidth: float
    matmul: float
    step_seconds: float
    layer_seconds: float

    def overhead(self, layers: int) -> float:
        """Seconds of a decode step that do not grow with bytes."""
        return self.step_seconds + layers * self.layer_seconds


class StandIn:
    """Random models with linears of `bits`, in groups, or dense ones in `dtype` where it is None.

    They decode `batch` sequences at once: how fast kernels read weights depends on the rows that
    these meet.  `run` measures once more; take turns with what is compared, so that the machine's
    drift hits both.
    """

    def __init__(
        self,
        bits: int | None,
        group_size: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
    ) -> None:
        def decoder(size: tuple[int, int], layers: int) -> Any:
            torch.manual_seed(SEED)
            return make_decoder(
                random_decoder(size, layers, bits, group_size, dtype), device, dtype
            )

        self._few, self._many, self._large = (
            decoder(SMALL, FEW_LAYERS),
            decoder(SMALL, MANY_LAYERS),
            decoder(LARGE, MANY_LAYERS),
        )
        self._decoders = (self._few, self._many, self._large)
        self._batch = batch
        room = Shape(PROMPT, PREFILL + STEPS, batch).cached_tokens
        self._engines = [engine_on(one, device, batch, room) for one in self._decoders]
        self._steps: list[list[float]] = [[] for _ in self._decoders]
        self._prefills: list[float] = []

    def run(self) -> None:
        """Decode with each model, and fill the large one's cache with a longer prompt."""
        for engine, steps in zip(self._engines, self._steps, strict=True):
            prompts = [list(range(PROMPT))] * self._batch
            run = run_once(engine, prompts, Shape(PROMPT, STEPS, self._batch))
            steps += run.steps[STEPS // 4 :]
        prompt = [number % VOCAB for number in range(PREFILL)]
        self._prefills.append(run_once(self._engines[-1], [prompt], Shape(PREFILL, 2)).prefill)

    def reached(self) -> Reached:
        """By the medians of all runs."""
        few, many, large = (statistics.median(steps) for steps in self._steps)
        layer_seconds = max(0.0, (many - few) / (MANY_LAYERS - FEW_LAYERS))
        hidden, ffn = LARGE
        weights = MANY_LAYERS * (4 * hidden * hidden + 3 * hidden * ffn)
        read = self._large.weight_bytes - self._many.weight_bytes
        return Reached(
            bandwidth=read / max(large - many, 1e-6),
            matmul=2 * PREFILL * weights / statistics.median(self._prefills),
            step_seconds=max(0.0, few - FEW_LAYERS * layer_seconds),
            layer_seconds=layer_seconds,
        )


def engine_on(decoder: Any, device: torch.device, sequences: int, tokens: int) -> Engine:
    """An engine for so many sequences of so many tokens, that finds no prefix again."""
    return Engine(
        decoder,
        sequences * decoder.layout.blocks_for(tokens, MOST_TOKENS[device.type]),
        max_tokens_per_step=MOST_TOKENS[device.type],
        max_sequences=sequences,
        prefix_caching=False,
    )


def random_decoder(
    size: tuple[int, int], layers: int, bits: int | None, group_size: int, dtype: torch.dtype
) -> DecoderWeights:
    """Weights of (hidden, ffn) and so many layers; the head is dense."""
    hidden, ffn = size
    heads = hidden // HEAD_DIM

    def linear(rows: int, columns: int) -> LinearWeight:
        if bits is None:
            return LinearWeight.of_dense(torch.randn(rows, columns).mul_(columns**-0.5).to(dtype))
        half = 1 << (bits - 1)
        codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
        width = group_size if columns % group_size == 0 else columns
        scale = torch.full((rows, columns // width), columns**-0.5 / half)
        return LinearWeight(None, codes, scale.bfloat16().float(), None, width, bits)

    ones = torch.ones(hidden)
    embedding = torch.randn(VOCAB, hidden)
    return DecoderWeights(
        embedding=embedding,
        layers=[
            LayerWeights(
                input_norm=ones,
                post_norm=ones,
                source=index,
                qkv=linear(3 * heads * HEAD_DIM, hidden),
                q_norm=None,
                k_norm=None,
                out=linear(hidden, heads * HEAD_DIM),
                gate_up=linear(2 * ffn, hidden),
                down=linear(hidden, ffn),
                window=None,
            )
            for index in range(layers)
        ],
        final_norm=ones,
        head=LinearWeight.of_dense(embedding.to(dtype)),
        heads=heads,
        kv_heads=heads,
        head_dim=HEAD_DIM,
        norm_eps=1e-5,
        max_context=2 * PREFILL,
        vocab_size=VOCAB,
        inv_freq=10_000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM),
        rope_scaling=1.0,
    )
