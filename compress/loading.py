"""Loading whole models through transformers, for evaluation and generation.

Compression itself never holds a whole model (see compress.core.blocks).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.device import check_dtype, default_device
from compress.core.errors import InputError, reason_of
from compress.core.progress import say, without_bars
from compress.core.source import read_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compress.core.shards import ShardReader

LATENTS = ("kv_a_proj_with_mqa", "q_a_proj")  # what makes them, in classes of DeepSeek's


def load_model(
    folder: Path, dtype: str = "float32", device: torch.device | None = None
) -> PreTrainedModel:
    """Load a causal language model for inference, on the GPU when there is one.

    Weights of a compressed-tensors checkpoint are de-quantized here, once, in `dtype`; layers
    whose scheme quantizes activations too still do so in their forward pass.  Not used is the
    library's switch `dequantize=True`: transformers 5.23 then rounds weights to the scales' dtype,
    drops activation quantization, and reads every layer by one scheme.  GPTQ, AWQ and bitsandbytes'
    int8 checkpoints are unpacked here, so that neither a library nor a GPU is needed, and outlier
    columns are those that are stored beside the last.

    Raises InputError when the folder holds no loadable model, lacks weights that the model needs
    (transformers would fill them at random), or needs a library that is absent, and for a dtype
    that does not hold its weights.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    import compress.core.cross_layer  # noqa: F401 (adds classes of our own)
    from compress.core.padded_values import pad_values
    from compress.core.shards import ShardReader  # imports torch

    check_dtype(dtype)
    scheme = read_config(folder).get("quantization_config") or {}
    device = device or default_device()
    settings: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "device_map": {"": str(device)},
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused below
    }
    try:
        if scheme.get("quant_method") in ("gptq", "awq") or scheme.get("load_in_8bit"):
            model, report = _load_unpacked(folder, settings)
        else:
            with without_bars():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False, **settings
                )
            model, report = loaded
    except InputError:
        raise
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"transformers cannot load '{folder}': {reason_of(error)}") from error
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    zero_points = {name for name in mismatched if name.endswith(".weight_zero_point")}
    if wrong := sorted(set(report["missing_keys"]) | mismatched - zero_points):
        raise InputError(
            f"'{folder}' lacks {len(wrong)} tensors that its config.json asks for, or has them in "
            f"another shape, such as {wrong[0]}; the checkpoint is broken, write it again"
        )
    if unexpected := sorted(report["unexpected_keys"]):
        say(f"'{folder}': {len(unexpected)} tensors are not used, such as {unexpected[0]}")
    with without_bars():
        _decompress(model, ShardReader(folder), zero_points)
    _check_latents(model, folder, dtype)
    pad_values(model)
    return model.eval()


def _check_latents(model: PreTrainedModel, folder: Path, dtype: str) -> None:
    """Raise InputError where a dtype does not hold the rows of latents, which are small in what
    `compress convert --to mla` makes (prune/mla_weights.py)."""
    import torch

    least = torch.finfo(getattr(torch, dtype)).tiny
    for name, module in model.named_modules():
        if name.endswith(LATENTS):
            rows: torch.Tensor = module.get_parameter("weight").abs().amax(1).float()
            if rows.median() < least:
                raise InputError(
                    f"dtype {dtype} does not hold {name} of '{folder}', whose rows are too small "
                    "for it; use bfloat16 or float32"
                )


def _load_unpacked(folder: Path, settings: dict[str, Any]) -> Any:
    """Hand transformers the plain model that such a checkpoint stands for.

    Where the format rounds inputs, the linears do so before they multiply.
    """
    from dataclasses import replace

    from transformers import GenerationConfig

    from compress.core.source import ModelSource
    from compress.quant.input_rounding import round_inputs_of  # imports torch
    from compress.quant.packed import PackedFolder

    packed = PackedFolder(ModelSource(str(folder), folder))
    dtype = settings["dtype"]
    state = {name: packed.load(name) for name in packed.others}
    roundings = {}
    for name in packed.linears:
        weight = packed.weight(name)
        if weight.inputs is not None:  # scales are float32
            roundings[name] = weight.inputs
            state[f"{name}.weight"] = weight.dequantize().to(dtype)
        else:
            state[f"{name}.weight"] = replace(weight, scale=weight.scale.to(dtype)).dequantize()
    cls: Any = type(packed.skeleton)
    config = packed.plain_config()
    with without_bars():
        model, report = cls.from_pretrained(None, config=config, state_dict=state, **settings)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    round_inputs_of(model, roundings)
    return model, report


def _decompress(model: PreTrainedModel, shards: ShardReader, zero_points: set[str]) -> None:
    """De-quantize compressed-tensors weights now, as their first forward pass would.

    compressed-tensors 0.18 to 0.20 under transformers 5.23 makes room for unpacked zero points,
    where `pack-quantized` stores packed ones: those that did not fit (`zero_points`) are put in.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    compressor = getattr(quantizer, "compressor", None)
    if compressor is None or not quantizer.quantization_config.is_quantization_compressed:
        return
    for name in zero_points:
        module_name, _, parameter = name.rpartition(".")
        stored = shards.load(name).to(model.device)
        getattr(model.get_submodule(module_name), parameter).data = stored
    compressor.decompress_model(model)
