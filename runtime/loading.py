"""Which way of computing a model takes: by device, dtype, and what the machine has."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import torch

from compress.core.device import check_dtype, check_kv_cache_dtype
from compress.core.progress import say
from compress.core.source import ModelSource
from compress.kernels.paged_attention.cache import CODES
from compress.runtime.decoder import Decoder, EagerDecoder, RecordedDecoder
from compress.runtime.weights import DecoderWeights, load_weights

# Tokens of one step, unless a caller says otherwise: enough to fill the device, and no more, since
# everybody waits for a step.  Untuned for GPUs: what de-quantizing for a prefill costs is then a
# sixth of the products, by the numbers of operations and bytes.
MOST_TOKENS = {"cpu": 512, "cuda": 2048}
LEAST_CAPABILITY = (8, 0)  # of a GPU: bfloat16, and asynchronous copies into shared memory


def load_decoder(
    source: ModelSource,
    device: torch.device,
    dtype: str,
    lm_head_bits: int | None = None,
    most_tokens: int | None = None,
    kv_cache_dtype: str = "auto",
) -> Decoder:
    """Read a model; InputError when the runtime does not serve it (see `load_weights`).

    `most_tokens` is the size of the largest batch that it will be given; by default MOST_TOKENS.
    `kv_cache_dtype` is one of KV_CACHE_DTYPES.
    """
    check_dtype(dtype)
    check_kv_cache_dtype(kv_cache_dtype)
    weights = load_weights(source, lm_head_bits)
    return make_decoder(weights, device, getattr(torch, dtype), most_tokens, kv_cache_dtype)


def make_decoder(
    weights: DecoderWeights,
    device: torch.device,
    dtype: torch.dtype,
    most_tokens: int | None = None,
    kv_cache_dtype: str = "auto",
) -> Decoder:
    """The fastest decoder for a device and a dtype; says so where that is PyTorch's operations.

    Keys and values are in 8 bits where `kv_cache_dtype` says so, with a scale for each token and
    head; and with auto where the checkpoint has calibrated scales, by these.
    """
    check_kv_cache_dtype(kv_cache_dtype)
    most_tokens = most_tokens or MOST_TOKENS[device.type]
    if kv_cache_dtype == "auto":
        kv_cache_dtype = weights.kv_cache_dtype or "auto"
    else:
        weights.layers[:] = [replace(layer, kv_scales=None) for layer in weights.layers]
    codes = CODES.get(kv_cache_dtype)
    against = reason_against_triton(device)
    if against is None:
        from compress.runtime.gpu_decoder import GpuDecoder

        return GpuDecoder(weights, device, dtype, most_tokens, codes)
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32):
        from compress.kernels.program.build import reason_against

        against = reason_against()
        if against is None:
            return RecordedDecoder(weights, dtype, most_tokens, codes)
        say(f"CPU kernels: PyTorch's ({against})")
    elif device.type != "cpu":
        say(f"GPU kernels: PyTorch's, and weights are de-quantized ({against})")
    return EagerDecoder(weights, device, dtype, codes)


def reason_against_triton(device: torch.device) -> str | None:
    """Why the Triton kernels do not run on a device, or None when they do.

    Tests run them on a CPU: COMPRESS_CPU_KERNELS=triton under TRITON_INTERPRET=1.
    """
    if device.type == "cpu":
        asked = os.environ.get("COMPRESS_CPU_KERNELS") == "triton"
        return None if asked and os.environ.get("TRITON_INTERPRET") == "1" else "not a GPU"
    if os.environ.get("COMPRESS_GPU_KERNELS") == "torch":
        return "COMPRESS_GPU_KERNELS=torch asks for PyTorch's"
    if device.type != "cuda" or torch.version.hip:
        return f"device '{device}' is not an NVIDIA GPU"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the GPU has compute capability {'.'.join(map(str, capability))}; 8.0 is needed"
    return None
