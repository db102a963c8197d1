"""Reading a checkpoint tensor by tensor, and writing one file by file.

`ShardReader` opens the safetensors files of a model folder and gives any tensor by name without
loading the rest.  `ShardWriter` writes one file for each part of the model (the tensors outside
the blocks, then each block) and names them as Hugging Face shards at the end, so that a model
larger than memory passes through in pieces.

Files are written here and not by the safetensors library, which wants all tensors of a file at
once and copies them: https://huggingface.co/docs/safetensors, 8 bytes with the length of a JSON
header, the header, and the data, each tensor at the offsets that the header states.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.core.errors import InputError, shown
from compress.core.files import replacing, write_text

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# A checkpoint of its own inside the folder, of tensors that only this toolkit reads (LLM.int8's
# outlier columns): among the others they would be unknown names to transformers and vLLM.
BESIDE = "outliers"
# bits of an element, by safetensors' dtype names
BITS_OF = {"BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS_OF |= {f"F8_{kind}": 8 for kind in ("E4M3", "E5M2", "E8M0", "E4M3FNUZ", "E5M2FNUZ")}
BITS_OF |= {f"{kind}{bits}": bits for kind in "UIF" for bits in (16, 32, 64)}
BITS_OF |= {"BF16": 16, "C64": 64}
# the dtypes that checkpoints hold, by safetensors' names
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
SINGLE_FILE_BYTES = 2 << 30  # a checkpoint up to this size becomes one file
CHUNK_BYTES = 64 << 20  # of a tensor that is read, checked or copied in runs of rows


def hashed(data: bytes) -> str:
    """A 128-bit hash (XXH3) in hexadecimal: to notice a change, not to withstand an attack."""
    return xxhash.xxh3_128(data).hexdigest()


def hashed_file(path: Path) -> str:
    """`hashed` of a file's contents, read in pieces."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity.

    By the extremes, which NaN is one of: a hundred times faster than `torch.isfinite` on a CPU.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # no extremes of float8
        tensor = tensor.float()
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))


def in_stored_dtype(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as a checkpoint holds it: what is floating point in `dtype`, the rest as it is.

    Raises InputError where that cannot hold its values.
    """
    if not value.is_floating_point():
        return value
    stored = value.to(dtype)
    if not all_finite(stored):
        raise InputError(
            f"tensor {name} has values up to {value.abs().max().item():.3g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; use --dtype bfloat16 or float32"
        )
    return stored


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
            return self._checked(name, file.get_tensor(name))

    def rows(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor in runs of rows, of some CHUNK_BYTES each (InputError as in `load`)."""
        for chunk in _rows_of(self._file_of[name], name):
            yield self._checked(name, chunk)

    def digest(self, names: Iterable[str]) -> str:
        """Read all of these tensors once; return a hash (XXH3) of names, shapes and contents.

        Raises InputError for the first one that holds a NaN or an infinity.
        """
        state = xxhash.xxh3_128()
        for name in names:
            state.update(repr((name, self.shapes[name], self.dtypes[name])).encode())
            for chunk in self.rows(name):
                state.update(_bytes_of(chunk))
        return state.hexdigest()

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors into its page cache, without waiting for it."""
        if not hasattr(os, "posix_fadvise"):  # macOS, Windows
            return
        names = list(names)
        for path in dict.fromkeys(self._file_of[name] for name in names):
            data, header = _header_of(path)
            with path.open("rb") as file:
                for name in (name for name in names if self._file_of[name] == path):
                    start, stop = header[name]["data_offsets"]
                    place = (data + start, stop - start)
                    os.posix_fadvise(file.fileno(), *place, os.POSIX_FADV_WILLNEED)

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if not all_finite(tensor):
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


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor to be written that comes in runs of rows, so that it is never whole in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[], Iterable[Tensor]]


class ShardWriter:
    """Write tensors in parts and finish with Hugging Face's names and index.

    Up to `single_file_bytes` in all, the parts are merged into one `model.safetensors`; above
    that each part stays a shard of its own and is only renamed.  A part has its name only when it
    is complete, and finishing can be broken off anywhere and done again.
    """

    def __init__(self, folder: Path, single_file_bytes: int = SINGLE_FILE_BYTES) -> None:
        self.folder = folder
        self.single_file_bytes = single_file_bytes

    def write(self, part: str, tensors: Mapping[str, Tensor | StreamedTensor]) -> None:
        """Write one part; `part` is a name unique in this checkpoint, such as `block-00003`."""
        write_file(self._path(part), tensors)

    def finish(self, parts: Sequence[str]) -> int:
        """Name these parts, in order, as a checkpoint; returns the bytes of its tensors."""
        single = self.folder / SINGLE_NAME
        paths = [self._path(part) for part in parts]
        if not single.exists():
            count = len(paths)
            shards = [
                self.folder / f"model-{number:05d}-of-{count:05d}.safetensors"
                for number in range(1, count + 1)
            ]
            found = [
                shard if shard.exists() else path for shard, path in zip(shards, paths, strict=True)
            ]
            total = sum(map(_data_bytes, found))
            if total > self.single_file_bytes:
                self._name_shards(found, shards, total)
                return total
            write_file(single, {n: t for path in paths for n, t in _streams_of(path)})
        for path in paths:
            path.unlink(missing_ok=True)
        return _data_bytes(single)

    def _name_shards(self, found: Sequence[Path], shards: Sequence[Path], total: int) -> None:
        weight_map: dict[str, str] = {}
        for path, shard in zip(found, shards, strict=True):
            path.rename(shard)
            weight_map.update(dict.fromkeys(_header_of(shard)[1], shard.name))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(self.folder / INDEX_NAME, json.dumps(index, indent=2))

    def _path(self, part: str) -> Path:
        return self.folder / f"part-{part}.safetensors"


def streamed(reader: "ShardReader", name: str) -> StreamedTensor:
    """A tensor of a checkpoint, to be copied into another as it is."""
    dtype = DTYPES[reader.dtypes[name]]
    return StreamedTensor(reader.shapes[name], dtype, partial(reader.rows, name))


def _rows_of(path: Path, name: str) -> Iterator[Tensor]:
    """A stored tensor in runs of rows, or whole where it is small."""
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(name)
        shape = stored.get_shape()
        row_bytes = math.prod(shape[1:]) * BITS_OF[stored.get_dtype()] // 8
        if len(shape) < 2 or shape[0] * row_bytes <= CHUNK_BYTES:
            yield file.get_tensor(name)
            return
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, shape[0], step):
            yield stored[start : start + step]


def _streams_of(path: Path) -> Iterator[tuple[str, StreamedTensor]]:
    """The tensors of a file, to be copied into another."""
    for name, entry in _header_of(path)[1].items():
        rows = partial(_rows_of, path, name)
        yield name, StreamedTensor(tuple(entry["shape"]), DTYPES[entry["dtype"]], rows)


def write_file(path: Path, tensors: Mapping[str, Tensor | StreamedTensor]) -> None:
    """Write a safetensors file, row by row where tensors are streamed."""
    # Widest elements first, so that every tensor starts at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name in names:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAME_OF[dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as partial_path, partial_path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = tensors[name]
            for chunk in tensor.rows() if isinstance(tensor, StreamedTensor) else (tensor,):
                file.write(_bytes_of(chunk.detach().cpu()))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and dtype, shape and place of each tensor."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def _data_bytes(path: Path) -> int:
    return path.stat().st_size - _header_of(path)[0]
