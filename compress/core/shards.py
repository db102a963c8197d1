"""Reading a checkpoint tensor by tensor, and writing one file by file.

`ShardReader` opens the safetensors files of a model folder and gives any tensor by name without
loading the rest.  `ShardWriter` writes one file for each part of the model (the tensors outside
the blocks, then each block) and names them as Hugging Face shards at the end, so that a model
larger than memory passes through in pieces.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.core.errors import InputError, shown

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# bits of an element, by safetensors' dtype names
BITS_OF = {"BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS_OF |= {f"F8_{kind}": 8 for kind in ("E4M3", "E5M2", "E8M0", "E4M3FNUZ", "E5M2FNUZ")}
BITS_OF |= {f"{kind}{bits}": bits for kind in "UIF" for bits in (16, 32, 64)}
BITS_OF |= {"BF16": 16, "C64": 64}


class ShardReader:
    """Random access to the tensors of a folder's safetensors files.

    `shapes` and `dtypes` (safetensors' names, such as BF16) map every tensor's name to what the
    headers say; `total_bytes` is the files' size.  As in transformers, `model.safetensors` counts
    if it is there, else the index, else every safetensors file of the folder.

    Raises InputError when a file is missing, truncated or corrupt, when two files hold a tensor
    of one name, or when the index is broken or contradicts the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        index = folder / INDEX_NAME
        listed = None
        if (folder / SINGLE_NAME).exists():
            paths = [folder / SINGLE_NAME]
        elif index.exists():
            listed = _read_index(index)
            paths = [folder / name for name in sorted(set(listed.values()))]
        else:
            paths = sorted(folder.glob("*.safetensors"))
        for path in paths:
            self._read_header(path)
        for name, file_name in (listed or {}).items():
            if (found := self._file_of.get(name)) != folder / file_name:
                place = f"is in {found.name}" if found else "is in none of its files"
                raise InputError(
                    f"{index} says that {file_name} holds tensor {name}, which {place}; "
                    "download the model again"
                )
        self.total_bytes = sum(path.stat().st_size for path in set(self._file_of.values()))
        if not self._file_of:
            raise InputError(f"'{folder}' holds no tensors; give a model folder with safetensors")

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name in self._file_of:
                        raise InputError(
                            f"tensor {name} is in {self._file_of[name].name} and in {path.name} "
                            f"of '{self.folder}'; remove the file that does not belong there"
                        )
                    part = file.get_slice(name)
                    self._file_of[name] = path
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"cannot read {path}: {error}; the file is truncated or corrupt, download it again"
            ) from None

    @property
    def names(self) -> list[str]:
        """All tensor names, in file order."""
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor_bytes(self, name: str) -> int:
        """Return the size of a tensor's data, without reading it."""
        return math.prod(self.shapes[name]) * BITS_OF[self.dtypes[name]] // 8

    def load(self, name: str) -> Tensor:
        """Read one tensor, in the dtype it is stored in.

        Raises InputError when it is absent, or holds a NaN or an infinity.
        """
        if name not in self._file_of:
            raise InputError(
                f"'{self.folder}' has no tensor {name}; the checkpoint does not fit its config.json"
            )
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(
                f"tensor {name} in '{self.folder}' holds NaN or infinite values; "
                "the model is broken, use another copy"
            )
        return tensor


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor by the index of a sharded checkpoint; every file is there.

    Raises InputError when the index is not one, or names files that are not in its folder.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {index}: {error}; download it again") from None
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index} has no 'weight_map' of tensors and files; download it again")
    present = {path.name for path in index.parent.glob("*.safetensors") if path.is_file()}
    for name, file_name in listed.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise InputError(
                f"{index} places tensor {name} in {shown(file_name)}, which is not the name of a "
                "file beside it; download it again"
            )
        if file_name not in present:
            raise InputError(f"{index} names {file_name}, which is not there; download it again")
    return listed


class ShardWriter:
    """Write tensors in parts and finish with Hugging Face's names and index.

    Up to `single_file_bytes` in all, the parts are merged into one `model.safetensors`; above
    that each part stays a shard of its own and is only renamed.
    """

    def __init__(self, folder: Path, single_file_bytes: int = 2 << 30) -> None:
        self.folder = folder
        self.single_file_bytes = single_file_bytes
        self._parts: list[Path] = []
        self.total_bytes = 0

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one part; `part` is a name unique in this checkpoint, such as `block-00003`."""
        path = self.folder / f"part-{part}.safetensors"
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk arrives as this
            raise OSError(str(error)) from None
        self._parts.append(path)
        self.total_bytes += sum(t.numel() * t.element_size() for t in contiguous.values())

    def finish(self) -> None:
        """Name the parts as a checkpoint.  Call once, after the last part."""
        if self.total_bytes <= self.single_file_bytes:
            merged: dict[str, Tensor] = {}
            for path in self._parts:
                merged.update(load_file(path))
            save_file(merged, self.folder / SINGLE_NAME, metadata={"format": "pt"})
            for path in self._parts:
                path.unlink()
            return
        weight_map: dict[str, str] = {}
        for number, path in enumerate(self._parts, start=1):
            name = f"model-{number:05d}-of-{len(self._parts):05d}.safetensors"
            with safe_open(path, framework="pt") as file:
                weight_map.update(dict.fromkeys(file.keys(), name))
            path.rename(self.folder / name)
        index: dict[str, Any] = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": weight_map,
        }
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
