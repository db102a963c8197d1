"""A GGUF file as a source of quantized linears, under transformers' names and in its row order.

llama.cpp stores the rows of q_proj and k_proj of some classes (Llama, Mistral) in another order,
for its rotary embedding.  transformers knows how to undo it for each architecture; the same code is
run here on row numbers, and the rows of codes and scales follow.  Groups lie within a row.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.core.blocks import BlockModel, linears_of
from compress.core.errors import InputError
from compress.core.shards import ShardReader
from compress.core.source import ModelSource, read_config
from compress.quant.config import Grid
from compress.quant.formats.gguf import BLOCK_BYTES, GROUP, unpack_blocks
from compress.quant.weight import QuantizedWeight


class GgufModel:
    """A .gguf file with Q4_0, Q4_1 or Q8_0 linears (see PackedFolder for what it offers).

    Everything else comes from the float32 copy that `resolve_model` makes of the file, which is
    `source`.  Tensors of the file that transformers does not know are `unread`.
    """

    format_name = "GGUF"

    def __init__(self, source: ModelSource, path: Path) -> None:
        self.source = source
        self.config = read_config(self.source.folder)
        model = BlockModel(self.source, torch.device("cpu"), torch.float32)
        self.skeleton = model.skeleton
        self.reader: ShardReader = model.reader
        inside = {
            f"{model.block_name(index)}.{name}"
            for index in range(model.num_blocks)
            for name in linears_of(model.meta_block(index))
        }
        self._read_file(path)
        self.linears = [
            name for name in linears_of(self.skeleton) if name in inside and self.holds(name)
        ]
        packed = {f"{name}.weight" for name in self.linears}
        self.others = [name for name in self.reader.names if name not in packed]

    def _read_file(self, path: Path) -> None:
        """Open the file, and find its tensors' names in the model."""
        from gguf import GGUFReader
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        self._processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(self.config)
        names = get_gguf_hf_weights_map(_Shallow(self.skeleton), self._processor)
        self._tensors: Mapping[str, Any] = {
            names[tensor.name]: tensor for tensor in reader.tensors if tensor.name in names
        }
        self.unread = [tensor.name for tensor in reader.tensors if tensor.name not in names]

    def holds(self, name: str) -> bool:
        """Whether `name`, a linear or an embedding, is in the file in blocks that can be read."""
        return self._kind(name) in BLOCK_BYTES

    def _kind(self, name: str) -> str | None:
        tensor = self._tensors.get(f"{name}.weight")
        return None if tensor is None else tensor.tensor_type.name

    def grid(self, name: str) -> Grid:
        """The grid of a linear's block type."""
        kind = self._kind(name)
        return Grid(8 if kind == "Q8_0" else 4, GROUP, kind != "Q4_1")

    def weight(self, name: str) -> QuantizedWeight:
        """Unpack a linear, or what else it `holds`, and put its rows in the model's order."""
        tensor = self._tensors[f"{name}.weight"]
        blocks = torch.from_numpy(np.array(tensor.data))
        weight = unpack_blocks(blocks, tensor.tensor_type.name)
        rows = self._row_order(name, tensor.name, weight.shape[0])
        moved = {"codes": weight.codes, "scale": weight.scale}
        moved |= {"zero_point": weight.zero_point, "offset": weight.offset}
        return replace(weight, **{k: None if v is None else v[rows] for k, v in moved.items()})

    def _row_order(self, name: str, gguf_name: str, count: int) -> Tensor:
        numbers = np.arange(count)[:, None]
        try:
            order = self._processor.process(weights=numbers, name=gguf_name).weights
        except (ValueError, KeyError) as error:
            raise InputError(f"{name}: its rows cannot be traced in GGUF ({error})") from None
        if order.shape != numbers.shape or not np.array_equal(np.sort(order, axis=0), numbers):
            raise InputError(f"{name}: GGUF changes more than its rows; run: compress quantize")
        return torch.from_numpy(order[:, 0].copy())

    def load(self, name: str) -> Tensor:
        """One of `others`, in float32."""
        return self.reader.load(name)

    def float_linears(self) -> list[str]:
        """Linears of the model that are not packed."""
        packed = set(self.linears)
        return [name for name in linears_of(self.skeleton) if name not in packed]


class _Shallow:
    """A model and its children, for transformers' search of names, without what is inside those.

    The search makes the whole table of names anew for every module of the tree, and finds nothing
    more below the children: 4 seconds for 30 layers.
    """

    def __init__(self, module: nn.Module, levels: int = 1) -> None:
        self.config: Any = getattr(module, "config", None)
        self.state_dict = module.state_dict
        self._children = dict(module.named_children()) if levels else {}

    def named_children(self) -> list[tuple[str, "_Shallow"]]:
        return [(name, _Shallow(child, 0)) for name, child in self._children.items()]
