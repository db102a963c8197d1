"""Checkpoints that round inputs: the runtime against the libraries of their formats.

What is allowed between the two is a share of what rounding the inputs does to the logits, which is
how far the same weights are from them with inputs left alone.
"""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.core.source import ModelSource
from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.program.build import reason_against
from compress.pipeline import run_recipe
from compress.recipe import build_recipe
from compress.runtime.decoder import EagerDecoder, RecordedDecoder
from compress.runtime.scoring import Span, logits
from compress.runtime.weights import load_weights

TOKENS = torch.randint(3, 120, (40,), generator=torch.Generator().manual_seed(3))
LINEARS = ("qkv", "out", "gate_up", "down")


def quantized(folder, out, text_file, method, **settings):
    values = {
        "model": str(folder),
        "out": out,
        "compute_dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 4, "seq_len": 64},
        "stages": [{"method": method, **settings}],
    }
    run_recipe(build_recipe(values))
    return out


def weights_of(folder):
    return load_weights(ModelSource(str(folder), folder))


def left_alone(weights):
    """The same weights, de-quantized, on inputs that are not rounded."""

    def dense(weight):
        return LinearWeight.of_dense(weight.dequantize(torch.float32), weight.bias)

    layers = [
        replace(layer, **{name: dense(getattr(layer, name)) for name in LINEARS})
        for layer in weights.layers
    ]
    return replace(weights, layers=layers)


def by_runtime(weights, way="PyTorch"):
    """Logits [T - 1, V] after each token but the last."""
    if way == "program":
        if reason := reason_against():
            pytest.skip(reason)
        decoder = RecordedDecoder(weights, torch.float32, 48)
    else:
        decoder = EagerDecoder(weights, torch.device("cpu"), torch.float32)
    return torch.cat([piece.logits for piece in logits(decoder, [Span(TOKENS.numpy(), 1)], 48)])


def by_transformers(folder):
    """The same by the library of the format, token by token.

    bitsandbytes leaves a column in 16 bits for all tokens of a batch if it does for one, and
    compressed-tensors gives one token no scale of its own; a token alone is the same to all.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for tensor in (*model.parameters(), *model.buffers()):  # bitsandbytes' stay as they are stored
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    past, found = None, []
    with torch.no_grad():
        for token in TOKENS[:-1]:
            given = model.eval()(token.view(1, 1), past_key_values=past, use_cache=True)
            past = given.past_key_values
            found.append(given.logits[0])
    return torch.cat(found)


def distance(found, expected):
    return (found - expected).norm().item()


# Only the order of float32 sums differs.  In compressed-tensors' integers it decides for a token's
# largest input, which by x / (|x| / 127.5) is a tie between two codes: half a step to either side
# is as much as rounding does to any input.
ALLOWED = {"smoothquant": 0.5, "fp8": 0.02}


@pytest.mark.parametrize("way", ["PyTorch", "program"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", ["smoothquant", "fp8"])
def test_logits_are_compressed_tensors(method, family, way, model_folder, text_file, tmp_path):
    out = quantized(model_folder(family), tmp_path / "out", text_file, method)
    expected = by_transformers(out)
    rounding = distance(by_runtime(left_alone(weights_of(out))), expected)
    assert distance(by_runtime(weights_of(out), way), expected) <= ALLOWED[method] * rounding


@pytest.mark.parametrize("way", ["PyTorch", "program"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_are_bitsandbytes(family, way, model_folder, text_file, tmp_path):
    """Where no column is stored: both find outliers token by token, and take weights from codes.

    bitsandbytes turns inputs into float16 before it rounds them, which moves a code by up to 0.03
    steps and its scale likewise, so some codes fall to the other side: half of what rounding does,
    in all.  test_rounded_inputs.py compares linears on inputs that float16 holds, within 1e-4.
    """
    pytest.importorskip("bitsandbytes")
    settings = {"outlier_columns": 0, "outlier_threshold": 50.0}
    folder = model_folder(family, torch.float16)
    out = quantized(folder, tmp_path / "out", text_file, "llm-int8", **settings)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 6.0
    (out / "config.json").write_text(json.dumps(config))
    expected = by_transformers(out)
    rounding = distance(by_runtime(left_alone(weights_of(out))), expected)
    assert distance(by_runtime(weights_of(out), way), expected) <= 0.8 * rounding


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_stored_columns_bring_logits_closer_than_bitsandbytes(
    family, model_folder, text_file, tmp_path
):
    pytest.importorskip("bitsandbytes")
    folder = model_folder(family, torch.float16)
    out = quantized(folder, tmp_path / "out", text_file, "llm-int8")
    original = by_runtime(weights_of(folder))
    ours, theirs = by_runtime(weights_of(out)), by_transformers(out)
    assert distance(ours, original) < distance(theirs, original)
