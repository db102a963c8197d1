"""Low-rank adapters through peft: W + (alpha / rank) B A, of which only A and B are trained.

Hu et al., LoRA, 2021, arXiv:2106.09685, equation 3.  B begins at zero, so the model does not change
at first; at the end the product is added to W and nothing of the adapter remains.
"""

import importlib.util
from typing import Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from compress.core.errors import InputError


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LoraConfig:
    """Adapters of a model.

    rank     r, rows of A [r, K] and columns of B [N, r]
    alpha    scale of the product, over the rank; twice the rank by default
    targets  linears that get one, by the end of their names; all but the head by default
    seed     of A
    """

    rank: int = Field(default=16, ge=1, le=1 << 16)
    alpha: float | None = Field(default=None, gt=0)
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    seed: int = Field(default=0, ge=0, lt=1 << 63)


def check_lora() -> None:
    """Raise InputError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("LoRA needs peft; run: pip install 'compress-llm[train]'")


def add_lora(model: Any, config: LoraConfig) -> nn.Module:
    """Freeze a transformers model and give its linears adapters, which are trainable.

    Raises InputError for targets that the model does not have, or that include its head: the
    losses multiply by it themselves.
    """
    import peft

    head = model.get_output_embeddings()
    for target in config.targets or ():
        found = [m for n, m in model.named_modules() if f".{n}".endswith(f".{target}")]
        linears = [m for m in found if isinstance(m, nn.Linear)]
        if not linears or head in linears:
            what = "is the head" if linears else "names no linear"
            raise InputError(
                f"LoRA target '{target}' {what}; allowed are linears of the blocks by the end of "
                "their names, such as q_proj"
            )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or 2 * config.rank,  # type: ignore[arg-type] (any number will do)
        target_modules=list(config.targets) if config.targets else "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return peft.get_peft_model(model, settings)


def merge_lora(model: Any, dtype: torch.dtype) -> nn.Module:
    """The model with its adapters added to its weights, one linear at a time.

    The sums are made in float32 and kept so that `dtype` holds them as if they were rounded once;
    all else stays in the dtype that it has.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            adapted: Any = module
            linear = adapted.get_base_layer()
            kept = torch.promote_types(linear.weight.dtype, dtype)
            added = sum(adapted.get_delta_weight(name).float() for name in module.active_adapters)
            merged = (linear.weight.detach().float() + added).to(kept)
            linear.weight = nn.Parameter(merged, requires_grad=False)
    return model.unload()
