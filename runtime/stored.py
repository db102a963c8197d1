"""The tensors of a checkpoint, packed or plain, as the runtime takes them: none is left over."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.core.progress import say
from compress.core.shards import ShardReader
from compress.core.skeleton import build_skeleton, original_config
from compress.core.source import ModelSource, gguf_file, read_config
from compress.kernels.lowbit_matmul import LinearWeight
from compress.quant.formats import compressed_tensors
from compress.quant.gguf import GgufModel
from compress.quant.packed import PackedFolder
from compress.quant.weight import QuantizedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPUTED = ".rotary_emb.inv_freq"  # stored by old versions of transformers, which ignores it


class StoredModel:
    """A model's tensors by transformers' names, from a plain or quantized folder or a .gguf file.

    `skeleton` is transformers' model on the meta device, which says what tensors there must be.
    Raises InputError when the source is in a format that is not read.
    """

    def __init__(self, source: ModelSource) -> None:
        self.ref = source.ref
        path = gguf_file(source.ref)
        self._gguf = GgufModel(source, path) if path else None
        self._packed: GgufModel | PackedFolder | None = self._gguf
        if path is None and read_config(source.folder).get("quantization_config"):
            self._packed = PackedFolder(source)
        if self._gguf and self._gguf.unread:
            raise InputError(
                f"'{self.ref}' holds {self._gguf.unread[0]}, which transformers cannot read from "
                "GGUF; give the model as a Hugging Face folder"
            )
        self.skeleton: Any
        if self._packed:
            self.reader, self.skeleton = self._packed.reader, self._packed.skeleton
        else:
            self.reader = ShardReader(source.folder)
            config = original_config(source, self.reader)
            self.skeleton = build_skeleton(config, source, self.reader)
        self._linears = set(self._packed.linears if self._packed else ())
        self._left = {*(self._packed.others if self._packed else self.reader.names), *self._linears}
        self._reordered = 0

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor, or a packed linear, of this name."""
        return name in self.reader or name in self._linears

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A float tensor in the shape that the model asks for, in `dtype` or as it is stored.

        Raises InputError when it is absent, of another shape or of no float type.
        """
        tensor = self.reader.load(name)
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{name} in '{self.ref}' is {tensor.dtype}, and config.json names no format for "
                "it; the checkpoint is broken, write it again"
            )
        self._check_shape(name, tensor.shape)
        self._left.discard(name)
        return tensor if dtype is None else tensor.to(dtype)

    def optional(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """A tensor, or None where the model class has no parameter of this name."""
        return None if self._expected(name) is None else self.tensor(name, dtype)

    def linear(self, name: str) -> LinearWeight:
        """A linear layer with its bias, quantized where it is stored so.

        GPTQ tools store biases of zeros for classes that have none: these may be left out.
        """
        bias_name = f"{name}.bias"
        bias = self.optional(bias_name, torch.float32)
        if bias is None and bias_name in self.reader and not self.reader.load(bias_name).any():
            self._left.discard(bias_name)
        if name not in self._linears:
            return LinearWeight.of_dense(self.tensor(f"{name}.weight"), bias)
        assert self._packed is not None
        return self._on_grid(name, self._packed.weight(name), bias)

    def head(self, embedding: Tensor) -> LinearWeight:
        """The output layer: its own weight where one is stored, else the embedding's.

        As in transformers, a stored head counts even where config.json says that it is tied.  Of a
        .gguf file it is taken in the file's blocks.
        """
        own = "lm_head" in self or "lm_head.weight" in self
        own = own or not self.skeleton.config.tie_word_embeddings  # `linear` says what is missing
        name = "lm_head" if own else "model.embed_tokens"
        if self._gguf and self._gguf.holds(name):
            self._left.discard(f"{name}.weight")
            return self._on_grid(name, self._gguf.weight(name), None)
        return self.linear(name) if own else LinearWeight.of_dense(embedding)

    @property
    def kv_cache_dtype(self) -> str | None:
        """What the checkpoint's calibrated scales of keys and values are for: int8, fp8 or None."""
        if not isinstance(self._packed, PackedFolder):
            return None
        return compressed_tensors.kv_cache_dtype(self._packed.scheme)

    def kv_scales(self, name: str) -> tuple[float, float] | None:
        """The scales of keys and values of the attention of this name, if there are any.

        Raises InputError when one is absent, is no number above 0, or is one of several.
        """
        if self.kv_cache_dtype is None:
            return None
        return self._number(f"{name}.k_scale"), self._number(f"{name}.v_scale")

    def _number(self, name: str) -> float:
        tensor = self.reader.load(name)
        if tensor.numel() != 1 or not 0 < tensor.item() < math.inf:
            raise InputError(
                f"{name} in '{self.ref}' is not one number above 0; the checkpoint is broken, "
                "write it again"
            )
        self._left.discard(name)
        return tensor.item()

    def finish(self) -> None:
        """Refuse a checkpoint with tensors that nobody took; say once what was changed."""
        unused = sorted(name for name in self._left if not name.endswith(COMPUTED))
        if unused:
            raise InputError(
                f"'{self.ref}' holds {len(unused)} tensors that a {type(self.skeleton).__name__} "
                f"does not use, such as {unused[0]}; they are not dropped in silence: correct "
                "config.json or the checkpoint"
            )
        if self._left:
            say(f"{len(self._left)} stored tables of rotary frequencies are computed anew")
        if self._reordered:
            say(
                f"{self._reordered} linears are grouped in activation order (g_idx); they are "
                "de-quantized"
            )

    def _on_grid(self, name: str, weight: QuantizedWeight, bias: Tensor | None) -> LinearWeight:
        self._check_shape(f"{name}.weight", weight.shape)
        self._left.discard(name)
        if weight.group_of is not None:
            self._reordered += 1
        return linear_of(weight, bias)

    def _check_shape(self, name: str, found: tuple[int, ...]) -> None:
        expected = self._expected(name)
        if expected is not None and tuple(found) != expected:
            raise InputError(
                f"{name} in '{self.ref}' is {list(found)}, and config.json asks for "
                f"{list(expected)}; the two do not belong together"
            )

    def _expected(self, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter of the model; None where it has none of this name."""
        owner, _, leaf = name.rpartition(".")
        try:
            module: Any = self.skeleton.get_submodule(owner)
        except AttributeError:
            return None
        parameter = getattr(module, leaf, None)
        return None if parameter is None else tuple(parameter.shape)


def linear_of(weight: QuantizedWeight, bias: Tensor | None = None) -> LinearWeight:
    """A quantized weight in the runtime's form; de-quantized in float32 if columns are reordered.

    The values are equal to `weight.dequantize()` in float32 wherever shift = offset - zero_point *
    scale is a float32: always for symmetric weights and for 16-bit scales with zero points, and for
    GGUF's Q4_1 unless scale and offset differ by a factor of thousands.  Otherwise they agree to
    the last bit of the largest term.
    """
    scale = weight.scale.float()
    if weight.inputs is not None:
        width = weight.shape[1]
        return LinearWeight(None, weight.codes, scale, None, width, 8, bias, weight.inputs)
    if weight.group_of is not None:
        return LinearWeight.of_dense(replace(weight, scale=scale).dequantize(), bias)
    shift = None
    if weight.zero_point is not None or weight.offset is not None:
        exact = torch.zeros_like(scale, dtype=torch.float64)
        if weight.zero_point is not None:
            exact -= weight.zero_point * scale.double()
        if weight.offset is not None:
            exact += weight.offset
        shift = exact.float()
    linear = LinearWeight(None, weight.codes, scale, shift, weight.group_size, weight.bits, bias)
    # The last group may be cut off by the width.
    return with_groups_of(linear, math.gcd(weight.group_size, weight.shape[1]))


def with_groups_of(linear: LinearWeight, size: int) -> LinearWeight:
    """The same quantized weight in groups of `size` columns, which divides its group size."""
    if size == linear.group_size:
        return linear
    groups, times = linear.shape[1] // size, linear.group_size // size

    def spread(per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(times, dim=1)[:, :groups].contiguous()

    assert linear.scale is not None
    shift = None if linear.shift is None else spread(linear.shift)
    return replace(linear, scale=spread(linear.scale), shift=shift, group_size=size)
