"""Model folders that are quantized already: their packed linears one by one, in any format.

`PackedFolder` is how re-packing, loading and inspection read such a folder; what the tensors mean
is said in the modules of compress.quant.formats.
"""

import math
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from compress.core.blocks import linears_of
from compress.core.errors import InputError
from compress.core.progress import say
from compress.core.shards import BESIDE, ShardReader
from compress.core.skeleton import build_skeleton, transformers_config
from compress.core.source import ModelSource, read_config
from compress.quant.config import Grid
from compress.quant.formats import FORMATS
from compress.quant.weight import QuantizedWeight


class PackedFolder:
    """A quantized checkpoint: `linears` are packed, `others` are tensors stored as they are.

    Raises InputError when the folder is not quantized, or in a layout that is not one of ours.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.config = read_config(source.folder)
        self.scheme: dict[str, Any] = self.config.get("quantization_config") or {}
        if not self.scheme:
            raise InputError(f"'{source.ref}' is not quantized; run: compress quantize")
        self.format_name = str(self.scheme.get("quant_method"))
        if self.format_name not in FORMATS:
            raise InputError(
                f"'{source.ref}' is quantized by {self.format_name}; read are {', '.join(FORMATS)}"
            )
        self.format = FORMATS[self.format_name]
        if foreign := self.format.foreign(self.scheme):
            raise InputError(
                f"'{source.ref}' is {self.format_name} in {foreign}, a layout that is not read"
            )
        self.reader = ShardReader(source.folder)
        marker = f".{self.format.SUFFIXES[0]}"
        self.linears = [n.removesuffix(marker) for n in self.reader.names if n.endswith(marker)]
        packed = {f"{name}.{suffix}" for name in self.linears for suffix in self.format.SUFFIXES}
        self.others = [name for name in self.reader.names if name not in packed]

    @cached_property
    def beside(self) -> ShardReader | None:
        """The checkpoint inside the folder (compress.core.shards.BESIDE); says where it is absent.

        bitsandbytes writes none, and does not read it.
        """
        if not self.format.BESIDE:
            return None
        if (self.source.folder / BESIDE).is_dir():
            return ShardReader(self.source.folder / BESIDE)
        say(
            f"'{self.source.ref}' has no folder {BESIDE}: outlier columns are found at run time "
            "and computed from the codes, as bitsandbytes does; if compress made the checkpoint, "
            "copy the folder too"
        )
        return None

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model without its weights, with plain linears."""
        return build_skeleton(self.plain_config(), self.source, self.reader)

    def plain_config(self) -> Any:
        """The config as transformers reads it, without `quantization_config`."""
        config = transformers_config(self.source, self.reader)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def grid(self, name: str) -> Grid:
        """The grid that config.json states for a linear."""
        return self.format.grid_of(self.scheme, name)

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear, from the shapes of its tensors."""
        shapes = self.reader.shapes
        if f"{name}.weight_shape" in shapes:
            rows, columns = self.reader.load(f"{name}.weight_shape").tolist()
            return rows, columns
        if f"{name}.weight" in shapes:
            rows, columns = shapes[f"{name}.weight"]
            return rows, columns
        rows = shapes[f"{name}.scales"][1]
        bits = 32 * math.prod(shapes[f"{name}.{self.format.SUFFIXES[0]}"])
        return rows, bits // self.grid(name).bits // rows

    def weight(self, name: str) -> QuantizedWeight:
        """Unpack a linear; InputError when its tensors do not fit together."""
        tensors = {
            suffix: reader.load(f"{name}.{suffix}")
            for reader in (self.reader, self.beside)
            for suffix in (*self.format.SUFFIXES, *self.format.BESIDE)
            if reader is not None and f"{name}.{suffix}" in reader
        }
        absent = [suffix for suffix in self.format.BESIDE if suffix not in tensors]
        if absent and self.beside is not None:
            raise InputError(self._broken(name, f"{BESIDE} has no {' and no '.join(absent)}"))
        try:
            weight = self.format.unpack_weight(tensors, self.scheme, name)
        except (KeyError, IndexError, RuntimeError) as error:
            raise InputError(self._broken(name, f"{type(error).__name__} {error}")) from None
        rows, columns = weight.shape
        expected = (rows, -(-columns // weight.group_size))
        if weight.scale.shape != expected:
            found = list(weight.scale.shape)
            raise InputError(self._broken(name, f"scales are {found}, not {list(expected)}"))
        if weight.zero_point is not None and weight.zero_point.shape != expected:
            found = list(weight.zero_point.shape)
            raise InputError(self._broken(name, f"zero points are {found}, not {list(expected)}"))
        if (
            weight.group_of is not None
            and not 0 <= weight.group_of.min() <= weight.group_of.max() < expected[1]
        ):
            raise InputError(self._broken(name, f"g_idx leaves 0 to {expected[1] - 1}"))
        return weight

    def load(self, name: str) -> Tensor:
        """One of `others`."""
        return self.reader.load(name)

    def float_linears(self) -> list[str]:
        """Linears of the model that are not packed."""
        packed = set(self.linears)
        return [name for name in linears_of(self.skeleton) if name not in packed]

    def _broken(self, name: str, reason: str) -> str:
        return (
            f"{name} in '{self.source.ref}' does not fit its config.json: {reason}; "
            "the checkpoint is broken, write it again"
        )
