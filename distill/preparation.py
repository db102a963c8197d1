"""What stands before the first step: checks, the accelerator, and the student made ready."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from compress.core.device import default_device, fastest_dtype
from compress.core.errors import InputError, nearest
from compress.core.processes import processes
from compress.distill.config import TrainConfig
from compress.distill.data import PackedData

PROJECT = "compress"  # under which trackers file a run
TRACKED = "trackers"  # folder for what trackers write to the disk


def check(student: nn.Module, data: PackedData, config: TrainConfig) -> None:
    """Raise InputError for what would fail later, or train nothing."""
    if not any(p.requires_grad for p in student.parameters()):
        raise InputError("no parameter of the student is trainable; let some require a gradient")
    if data.seq_len != config.seq_len:
        raise InputError(
            f"the data is cut into sequences of {data.seq_len} tokens and seq_len is "
            f"{config.seq_len}; pack the data anew"
        )
    count = processes().count
    for name, size in (("batch_size", config.step_sequences), ("held-out part", data.held_out)):
        if size % count:
            raise InputError(
                f"a {name} of {size} sequences cannot be shared out evenly over {count} processes; "
                f"give a multiple of {count}, or start another number of processes"
            )
    check_trackers(config)


def check_trackers(config: TrainConfig) -> None:
    """Raise InputError for trackers that accelerate does not know or that are not installed."""
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in config.trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = [str(known) for known in LOGGER_TYPE_TO_CLASS]
            raise InputError(
                f"tracker '{name}' is unknown; allowed: {', '.join(known)}{nearest(name, known)}"
            )
        if name not in available:
            raise InputError(f"tracker '{name}' is not installed; run: pip install {name}")


def settle_precision(config: TrainConfig, device: torch.device) -> str:
    """What `auto` means on a device: `bfloat16` or `float32`."""
    return fastest_dtype(device) if config.precision == "auto" else config.precision


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """accelerate's view of this process, with the trackers started.

    Precision is left to the training step, whose region of autocast spans micro-batches.
    """
    accelerator = Accelerator(
        cpu=default_device().type == "cpu",
        mixed_precision="no",
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / TRACKED)),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    if config.trackers:
        accelerator.init_trackers(PROJECT, config=_flat(config))
    return accelerator


def settle_sharding(accelerator: Accelerator, student: nn.Module, precision: str) -> None:
    """Tell FSDP2, where it is switched on, what to shard by itself and in which dtype.

    Each transformer block is; embeddings and head stay with the student, whose forward multiplies
    by the head.  Gradients are summed in float32.  Raises InputError for FSDP 1, which flattens
    parameters: groups of an optimizer and frozen parameters get lost in that.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise InputError(
            "FSDP version 1 is not supported; pass --fsdp_version 2 to accelerate launch"
        )
    names = (getattr(module, "_no_split_modules", None) or () for module in student.modules())
    present = {type(module).__name__ for module in student.modules()}
    plugin.transformer_cls_names_to_wrap = sorted({n for group in names for n in group} & present)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bfloat16" else None,
        reduce_dtype=torch.float32,
    )
    plugin.cpu_ram_efficient_loading = False  # each process has loaded the weights


def _flat(config: TrainConfig) -> dict[str, Any]:
    """The settings as trackers take them: numbers and text."""
    values = vars(config).items()
    return {k: v if isinstance(v, int | float | str) else str(v) for k, v in values}


def prepare_student(student: nn.Module, config: TrainConfig) -> None:
    """Put what is trained into float32, and switch activation checkpointing on if asked.

    Raises InputError when no trained part of the student supports that.
    """
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.activation_checkpointing:
        models: list[Any] = [module for module in student.modules() if _checkpoints(module)]
        if not models:
            raise InputError(
                f"activation_checkpointing is on, and {type(student).__name__} holds no model that "
                "supports it; switch it off"
            )
        for model in models:
            # transformers 5.23 renamed it
            name = "activation_checkpointing_enable"
            enable: Any = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})


def _checkpoints(module: nn.Module) -> Any:
    """Whether a module is a transformers model that can, with something trained in it."""
    can = getattr(module, "supports_gradient_checkpointing", False)
    return can and any(p.requires_grad for p in module.parameters())
