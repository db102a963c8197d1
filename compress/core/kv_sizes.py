"""How large keys and values get, layer by layer, while calibration runs: what a cache with one
scale a layer needs to know.

Attention hands keys, as turned by their positions, and values to the `update` of the cache that it
is given.  A cache that only looks takes that place, so that no model class has to be known.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.errors import InputError

CACHE = "past_key_values"  # the argument of attention, in transformers since 4.56


def attention_of(block: nn.Module, where: str) -> str:
    """The name within a block of the module that fills a cache; InputError unless there is one."""
    found = [
        name
        for name, module in block.named_modules()
        if name and CACHE in inspect.signature(module.forward).parameters
    ]
    if len(found) != 1:
        raise InputError(
            f"{where} has {len(found)} modules with a cache of keys and values, and kv_cache "
            "measures that of one; leave out kv_cache"
        )
    return found[0]


def owns_cache(block: nn.Module, attention: str) -> bool:
    """Whether this attention fills a cache, and does not read that of another layer."""
    return getattr(block.get_submodule(attention), "owns", True)


class _Watching:
    """A cache that keeps nothing but the largest sizes."""

    def __init__(self, sizes: Tensor) -> None:
        self._sizes = sizes

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for place, x in enumerate((keys, values)):
            self._sizes[place] = torch.maximum(self._sizes[place], x.abs().amax().float())
        return keys, values


@contextmanager
def measuring(block: nn.Module, attention: str) -> Iterator[Tensor]:
    """Measure a block while it runs inside this context.

    Yields float32 [2]: the largest |key| and |value| of all tokens and heads so far, NaN where one
    is NaN.
    """
    sizes = torch.zeros(2, device=next(block.parameters()).device)

    def give(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {CACHE: _Watching(sizes)}

    module = block.get_submodule(attention)
    handle = module.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()
