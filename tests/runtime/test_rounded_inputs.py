"""Decoders whose linears round their inputs, in all three ways of computing.

They are held against transformers' own model with each linear replaced by the reference in float64.
In float32 the others sum in another order, some 1e-7 of a value.  Where that moves an input across
the half between two codes (one in some ten thousand), that code changes by one step, as much as
rounding itself does to every one of them.  So a tenth of what rounding does to the logits is
allowed.
"""

import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from compress.core.source import ModelSource
from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.lowbit_matmul.weight import InputRounding
from compress.kernels.program.build import reason_against
from compress.kernels.w8a8_matmul import reference
from compress.loading import load_model
from compress.runtime.batch import Batch
from compress.runtime.decoder import EagerDecoder, RecordedDecoder
from compress.runtime.engine import Engine
from compress.runtime.gpu_decoder import GpuDecoder
from compress.runtime.llm import LLM
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.scoring import Span, score
from compress.runtime.weights import load_weights

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 120, (22,), generator=torch.Generator().manual_seed(3))
CHUNKS = (20, 1, 1)
LINEARS = ("qkv", "out", "gate_up", "down")
KINDS = ("w8a8", "llm.int8", "fp8")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def rounding(weight: LinearWeight, kind: str) -> LinearWeight:
    """A dense weight in codes with one scale a row; the widest columns are stored outliers."""
    dense = weight.dense.float()
    largest = 448.0 if kind == "fp8" else 127.0
    scale = dense.abs().amax(dim=1, keepdim=True) / largest
    codes = dense / scale
    codes = codes.to(torch.float8_e4m3fn) if kind == "fp8" else codes.round().to(torch.int8)
    inputs = InputRounding("fp8" if kind == "fp8" else "int8", largest)
    if kind == "llm.int8":
        index = dense.norm(dim=0).topk(2).indices.sort().values
        inputs = InputRounding("int8", 127.0, index, dense[:, index].half(), threshold=1.5)
    return LinearWeight(None, codes, scale, None, dense.shape[1], 8, weight.bias, inputs)


def rounded_weights(folder, kind):
    weights = load_weights(ModelSource(str(folder), folder))
    layers = [
        replace(layer, **{name: rounding(getattr(layer, name), kind) for name in LINEARS})
        for layer in weights.layers
    ]
    return replace(weights, layers=layers)


class Reference(nn.Module):
    """A module in place of some of a linear's rows."""

    def __init__(self, weight, rows):
        super().__init__()
        self.weight, self.rows = weight, rows

    def forward(self, x):
        y = reference.linear(x.flatten(0, -2), self.weight)[:, self.rows]
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def by_transformers(folder, weights):
    """Logits [T, V] of transformers' model on these weights."""
    model = load_model(folder, "float32", CPU)
    for layer, block in zip(weights.layers, model.model.layers, strict=True):
        for weight, owner, names in (
            (layer.qkv, block.self_attn, ("q_proj", "k_proj", "v_proj")),
            (layer.out, block.self_attn, ("o_proj",)),
            (layer.gate_up, block.mlp, ("gate_proj", "up_proj")),
            (layer.down, block.mlp, ("down_proj",)),
        ):
            first = 0
            for name in names:
                count = getattr(owner, name).weight.shape[0]
                setattr(owner, name, Reference(weight, slice(first, first + count)))
                first += count
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def decoder_of(way, weights):
    if way == "PyTorch":
        return EagerDecoder(weights, CPU, torch.float32)
    if way == "program":
        if reason := reason_against():
            pytest.skip(reason)
        return RecordedDecoder(weights, torch.float32, 48)
    if not INTERPRETED:
        pytest.skip("Triton's interpreter is off")
    return GpuDecoder(weights, CPU, torch.float32, 48)


def logits_of(decoder):
    """Of one sequence, in chunks."""
    decoder.allocate(4)
    found, done = [], 0
    for count in CHUNKS:
        positions = torch.arange(done, done + count)
        done += count
        batch = Batch(
            tokens=TOKENS[positions],
            positions=positions,
            slots=positions[None],
            starts=torch.tensor([0, count], dtype=torch.int32),
            contexts=torch.tensor([done], dtype=torch.int32),
            block_tables=torch.tensor([[[0, 1]]], dtype=torch.int32),
            rows=torch.arange(count),
        )
        found.append(decoder.forward(batch))
    return torch.cat(found)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("way", ["PyTorch", "program", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_are_those_of_the_reference(family, kind, way, model_folder):
    folder = model_folder(family)
    expected = by_transformers(folder, rounded_weights(folder, kind))
    found = logits_of(decoder_of(way, rounded_weights(folder, kind)))
    plain = rounded_weights(folder, kind)
    for layer in plain.layers:
        for name in LINEARS:
            weight = getattr(layer, name)
            dense = LinearWeight.of_dense(weight.dequantize(torch.float32), weight.bias)
            object.__setattr__(layer, name, dense)
    unrounded = distance(logits_of(decoder_of("PyTorch", plain)), expected)
    assert distance(found, expected) < unrounded / 10


@pytest.mark.parametrize("way", ["PyTorch", "program", "triton"])
def test_surplus_is_said_at_the_end(way, model_folder, capsys):
    """Every input exceeds a threshold of 0, and those of 48 columns have no room in part."""
    folder = model_folder("llama")
    for threshold, said in ((None, False), (0.0, True)):
        weights = rounded_weights(folder, "w8a8")
        for layer in weights.layers:
            inputs = replace(layer.qkv.inputs, threshold=threshold)
            object.__setattr__(layer, "qkv", replace(layer.qkv, inputs=inputs))
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        decoder = decoder_of(way, weights)
        with LLM.from_engine(Engine(decoder, 8, max_sequences=1, max_tokens_per_step=48)) as llm:
            llm.generate([TOKENS[:5].tolist()], params)
        count = decoder.surplus_outliers
        message = f"{count:,} input elements above the outlier threshold were rounded to int8"
        assert (message in capsys.readouterr().err) == said == (count > 0)
        list(score(decoder, [Span(TOKENS.numpy(), 1)], 48))
        assert ("above the outlier threshold" in capsys.readouterr().err) == said
