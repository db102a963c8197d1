"""The parts of a causal language model that losses read: decoder, head, blocks, attention."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.blocks import largest_module_list
from compress.core.errors import InputError

PROBE_TOKENS = 8


def inner_model(model: nn.Module) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


def last_hidden(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """The hidden states that enter the head, [B, S, D], of input_ids and position_ids [B, S]."""
    decoder = inner_model(model).base_model
    return decoder(
        input_ids=input_ids, position_ids=position_ids, use_cache=False
    ).last_hidden_state


@dataclass(frozen=True)
class Head:
    """How a model makes logits of its last hidden state h: cap(scale (W h + b)).

    linear   holds W [V, D] and b [V] or None; looked up at every use, since a tied, moved or
             sharded parameter is another tensor then
    scale    Cohere's `logit_scale`, one over Granite's `logits_scaling`
    softcap  c in c tanh(z / c), Gemma 2's `final_logit_softcapping`
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Head":
        """The head of a model, tried out on a few tokens against the model's own logits.

        Raises InputError where they differ: the class does something that is not known here.
        """
        inner = inner_model(model)
        linear, config = inner.get_output_embeddings(), inner.config
        if not isinstance(linear, nn.Linear):
            raise InputError(
                f"the head of {type(inner).__name__} is a {type(linear).__name__}; it must be a "
                "plain linear layer: leave it out of LoRA and of quantization"
            )
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        head = cls(linear, scale, getattr(config, "final_logit_softcapping", None))
        head._try_out(inner)
        return head

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens."""
        return self.linear.out_features

    def cap(self, logits: Tensor) -> Tensor:
        """Soft-cap logits, where the family does."""
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def _try_out(self, model: Any) -> None:
        count = min(PROBE_TOKENS, self.vocabulary)
        tokens = torch.arange(count, device=self.linear.weight.device)[None]
        training = model.training
        model.eval()
        expected = model(input_ids=tokens, position_ids=tokens, use_cache=False).logits.float()
        logits = self.linear(last_hidden(model, tokens, tokens)).float() * self.scale
        model.train(training)
        # The model rounds after the product, the scale and the cap; a scale missed is far larger.
        tolerance = 4 * torch.finfo(self.linear.weight.dtype).eps * expected.abs().max()
        if not (self.cap(logits) - expected).abs().max() <= tolerance:
            raise InputError(
                f"{type(model).__name__} makes its logits in a way that is not known here (more "
                "than a linear head with a scale or a soft cap); train another family"
            )


def check_whole(weight: Tensor) -> Tensor:
    """The weight of a head, which must be a plain tensor while its logits are computed.

    Raises InputError for one that FSDP has left in shards.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(weight, DTensor):
        raise InputError(
            "the head's weight is sharded by itself; let FSDP wrap the transformer blocks alone "
            "(fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)"
        )
    return weight


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks.  Raises InputError for a model without any."""
    found = largest_module_list(inner_model(model))
    if found is None:
        raise InputError(f"{type(model).__name__} has no list of decoder blocks; train another")
    return found[1]


def attention_of(block: nn.Module) -> nn.Module:
    """The attention module of a block.  Raises InputError for a block without one."""
    for module in block.children():
        if "attention" in type(module).__name__.lower():
            return module
    raise InputError(f"{type(block).__name__} has no attention module; leave out attention_*")


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that fills with the outputs of these modules as a forward runs them.

    The hooks are gone at the end: activation checkpointing runs blocks again in the backward.
    """
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
