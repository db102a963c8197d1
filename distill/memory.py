"""What forward and backward passes hold beside weights and gradients, found without running them.

They go over tensors that have shapes and no data (PyTorch's FakeTensorMode), through the model's
own code, autocast and activation checkpointing included, and each piece of memory that an operation
asks for is counted until it is free again.  That tells what a formula for one family of models
would miss: the casts of weights that autocast keeps, masks, what attention keeps for its backward.
"""

import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.distill.config import TrainConfig
from compress.distill.model_parts import inner_model, last_hidden
from compress.distill.preparation import prepare_student


def activation_bytes(model: Any, config: TrainConfig, sequences: int, lowered: bool) -> int:
    """The most that is held at once for a micro-batch of `sequences`, up to the last hidden state.

    model    a transformers or peft model on the meta device, which is used up; what it trains
             requires a gradient
    lowered  whether products are in bfloat16

    Weights and gradients are not counted, and neither is what losses take (head_loss.py).  Kernels
    are those of a CPU.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        inner_model(model).tie_weights()
        prepare_student(model, config)
        model.train()
        ids = torch.zeros(sequences, config.seq_len, dtype=torch.int64)
        live = _Live(model)
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
                states = last_hidden(model, ids, ids)
            states.sum().backward()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make and nothing has let go of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                self._known.add(parameter.grad.untyped_storage()._cdata)
            self._known.add(parameter.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size
