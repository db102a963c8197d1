"""Checkpoint files: written in pieces, read by the safetensors library."""

import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.core import shards
from compress.core.blocks import BlockModel
from compress.core.shards import (
    DTYPES,
    ShardReader,
    ShardWriter,
    StreamedTensor,
    all_finite,
    write_file,
)
from compress.core.source import resolve_model


def some_tensors() -> dict[str, torch.Tensor]:
    """Every dtype, odd lengths, a scalar, an empty one, and one that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        values = torch.randint(0, 2, (3, 5), generator=generator)
        tensors[f"in {name}"] = values.to(dtype)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4, dtype=torch.bfloat16)
    tensors["transposed"] = torch.randn(4, 7, generator=generator).T
    return tensors


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def test_written_files_are_those_of_the_library(tmp_path):
    tensors = some_tensors()
    rows = torch.randn(11, 3)
    streamed = StreamedTensor((11, 3), torch.float32, lambda: rows.split(4))
    write_file(tmp_path / "ours", {**tensors, "streamed": streamed})
    read = load_file(tmp_path / "ours")
    expected = {**tensors, "streamed": rows}
    assert set(read) == set(expected)
    assert all(equal(read[name], expected[name]) for name in expected)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    # data begins at a multiple of 8, and every tensor at one of its element's size
    begin, header = shards._header_of(tmp_path / "ours")
    assert begin % 8 == 0
    for entry in header.values():
        assert entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_rows_and_digests_do_not_depend_on_the_pieces(chunk, tmp_path, monkeypatch):
    tensors = {name: t for name, t in some_tensors().items() if "F8" not in name}
    tensors["large"] = torch.randn(37, 5)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    reader = ShardReader(tmp_path)
    whole = reader.digest(reader.names)
    monkeypatch.setattr(shards, "CHUNK_BYTES", chunk)
    assert reader.digest(reader.names) == whole
    pieces = list(reader.rows("large"))
    assert len(pieces) == {1: 37, 40: 19, 1 << 20: 1}[chunk]
    for name, tensor in tensors.items():
        parts = list(reader.rows(name))
        assert equal(torch.cat(parts) if len(parts) > 1 else parts[0], tensor)


def test_prefetched_bytes_are_the_tensors(tmp_path, monkeypatch):
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(70), "c": torch.ones(2, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = ShardReader(tmp_path)
    ranges = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _fd, start, size, _: ranges.append((start, size))
    )
    reader.prefetch(["b", "c"])
    data = (tmp_path / "model.safetensors").read_bytes()
    for (start, size), name in zip(ranges, "bc", strict=True):
        assert data[start : start + size] == tensors[name].numpy().tobytes()


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_finishing_can_be_broken_off_anywhere(limit, tmp_path, monkeypatch):
    """Merged into one file, or renamed as shards: broken off before every change of a name."""
    parts = {str(i): {f"{i}.w": torch.randn(3, 4), f"{i}.b": torch.randn(4)} for i in range(3)}
    names = [n for part in parts.values() for n in part]
    rename, replace = shards.Path.rename, shards.Path.replace
    for step in range(5):
        folder = tmp_path / str(step)
        folder.mkdir()
        writer = ShardWriter(folder, single_file_bytes=limit)
        for part, tensors in parts.items():
            writer.write(part, tensors)
        left = step

        def counted(act):
            def instead(*arguments):
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return act(*arguments)

            return instead

        with monkeypatch.context() as patched:
            patched.setattr(shards.Path, "rename", counted(rename))
            patched.setattr(shards.Path, "replace", counted(replace))
            try:
                writer.finish(list(parts))
            except KeyboardInterrupt:
                pass
            else:
                assert step == (4 if limit == 0 else 1)
        total = writer.finish(list(parts))
        assert total == sum(t.nbytes for part in parts.values() for t in part.values())
        files = sorted(path.name for path in folder.iterdir())
        if limit:
            assert files == ["model.safetensors"]
        else:
            shard_names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
            assert files == [*shard_names, "model.safetensors.index.json"]
        reader = ShardReader(folder)
        assert sorted(reader.names) == sorted(names)
        assert all(torch.equal(reader.load(n), parts[n[0]][n]) for n in names)
        if limit and step == 1:
            break


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.0])
def test_all_finite(dtype, value):
    for place in (0, 17, 99):
        tensor = torch.zeros(100, dtype=dtype)
        tensor[place] = value
        assert all_finite(tensor) == math.isfinite(value)
    assert all_finite(torch.zeros(0, dtype=dtype))
    assert all_finite(torch.tensor([1, 2]))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_equal_arguments_of_batches_are_held_once(family, model_folder):
    """Masks and positions: those of batches of one shape are the same tensors, and right."""
    model = BlockModel(resolve_model(str(model_folder(family))), torch.device("cpu"), torch.float32)
    tokens = torch.randint(3, 120, (5, 32), generator=torch.Generator().manual_seed(0))

    def tensors_of(value) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        items = value.values() if isinstance(value, dict) else value
        return [
            t
            for item in items
            if isinstance(item, torch.Tensor | dict | list | tuple)
            for t in tensors_of(item)
        ]

    first, second, third = (
        tensors_of(kwargs) for _, kwargs in model.capture_inputs(tokens.split(2))
    )
    assert len(first) >= 4  # cosines and sines for each of two blocks
    assert all(a is b for a, b in zip(first, second, strict=True))
    alone = tensors_of(next(iter(model.capture_inputs([tokens[4:]])))[1])
    assert all(torch.equal(a, b) for a, b in zip(third, alone, strict=True))
    assert all(a is b for a, b in zip(first, third, strict=True) if a.shape == b.shape)
