"""Checkpoints without weights: the files of a model that is yet to be made, to look at its shapes.

config.json, tokenizer   as the model will have them
model.safetensors        names, shapes and dtypes of its tensors: vectors are ones, as gains
                         often are; the first embeddings and the first block's attention, which
                         conversions try out, are random; all else is zero and takes no room
                         (holes in the file)
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.core.shards import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ATTENTION = re.compile(r"\.0\..*attn")
EMBEDDINGS = re.compile(r"embed.*\.weight$")
TILE = 1 << 20  # random numbers, over and over


def write_hollow(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype, beside: Iterable[Path]
) -> None:
    """Write the folder of a causal language model with this config.json, its weights in `dtype`.

    `beside` are files that go with it, such as a tokenizer's.  Raises what the class of
    transformers refuses the config by.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    for path in beside:
        shutil.copyfile(path, folder / path.name)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        )
    tied = set(getattr(built, "all_tied_weights_keys", None) or ())
    shapes = {name: tuple(v.shape) for name, v in built.state_dict().items() if name not in tied}
    _write_shapes(folder / "model.safetensors", shapes, dtype)


def _write_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """A safetensors file: the header's length in 8 bytes, the header, the tensors in its order."""
    header, end, filled = {}, 0, []
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        if len(shape) < 2 or ATTENTION.search(name):
            filled.append((start, shape, math.prod(shape)))
        elif EMBEDDINGS.search(name):
            filled.append((start, shape, min(TILE, math.prod(shape))))
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(0))
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        begin = file.tell()
        for start, shape, left in filled:
            values = tile / math.sqrt(shape[-1]) if len(shape) > 1 else torch.ones(TILE)
            part = values.to(dtype).view(torch.uint8).numpy().tobytes()
            file.seek(begin + start)
            while left > 0:
                file.write(part[: left * dtype.itemsize])
                left -= TILE
        file.truncate(begin + end)
