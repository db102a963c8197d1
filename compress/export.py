"""Re-packing: the same codes in another checkpoint format, without quantizing again.

    read a linear ─> QuantizedWeight ─> pack it for the target       one block in memory at a time

Two passes: the first reads every linear and refuses what the target cannot hold, the second writes.
The formats' scales are float16, except in compressed-tensors, where they take the dtype of the
checkpoint's floats if that holds them exactly, and else keep their own.
"""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import checkpoint
from compress.core.blocks import linears_of
from compress.core.errors import InputError, nearest
from compress.core.outfolder import OutputFolder
from compress.core.progress import say, track
from compress.core.shards import ShardWriter
from compress.core.source import gguf_file, read_config, resolve_model
from compress.quant.config import Grid, RoundedGrid
from compress.quant.formats import FORMATS, Format
from compress.quant.gguf import GgufModel
from compress.quant.packed import PackedFolder
from compress.quant.weight import QuantizedWeight


@dataclass
class Survey:
    """What the first pass found: grids and shapes by linear, and what float16 does to scales."""

    grids: dict[str, Grid] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    reordered: set[str] = field(default_factory=set)
    rounded: int = 0
    largest_change: float = 0.0


def export_model(
    model: str, format_name: str, out: Path, overwrite: bool = False
) -> dict[str, Any]:
    """Re-pack a quantized checkpoint or a .gguf file and return the report, as in compress.json.

    Raises InputError before anything is written when the model is not quantized, or the format
    cannot hold it.
    """
    if format_name not in FORMATS:
        raise InputError(
            f"format '{format_name}' is unknown; allowed are {', '.join(FORMATS)}"
            f"{nearest(format_name, FORMATS)}"
        )
    started = time.monotonic()
    target = FORMATS[format_name]
    with OutputFolder(out, overwrite) as work:
        work.begin({"export": model, "format": format_name})
        path = gguf_file(model)
        resolved = resolve_model(model)
        source = GgufModel(resolved, path) if path else PackedFolder(resolved)
        stored = _stored_dtype(source.config)
        survey = _survey(source, target, format_name, stored)
        if survey.rounded:
            say(
                f"{survey.rounded:,} scales change in float16, "
                f"by {survey.largest_change:.1e} of their value at most"
            )
        scheme = source.scheme if isinstance(source, PackedFolder) else {}
        cache = scheme.get("kv_cache_scheme")
        if cache and format_name != "compressed-tensors":
            raise InputError(
                f"format {format_name} cannot hold the scales of keys and values that "
                f"'{source.source.ref}' has (kv_cache_scheme); use compressed-tensors"
            )
        in_float = source.float_linears()
        inside = [name for name in in_float if re.search(r"\.\d+\.", name)]
        if inside:
            say(f"Left in float, {len(inside)} linears in blocks: {', '.join(inside)}")
        writer = ShardWriter(work.output)
        total_bytes = writer.finish(_write(source, target, survey, stored, writer))
        config = target.quantization_config(survey.grids, in_float, survey.reordered)
        config |= {"kv_cache_scheme": cache} if cache else {}
        report = _report(source, format_name, out, survey, inside, total_bytes)
        times = {"seconds": round(time.monotonic() - started, 1)}
        checkpoint.write_side_files(
            work.output,
            source.source,
            stored,
            read_config(source.source.folder) | {"quantization_config": config},
            report,
            times,
            checkpoint.export_card(source.source.ref, report),
        )
    return {**report, **times, "out": str(out)}


def _survey(
    source: PackedFolder | GgufModel, target: Format, format_name: str, stored: torch.dtype
) -> Survey:
    """Read every linear once, and refuse what the target cannot hold."""
    survey = Survey()
    if not source.linears:
        raise InputError(
            f"'{source.source.ref}' has no linear of a type that can be re-packed (GPTQ, AWQ, "
            "compressed-tensors pack-quantized, GGUF Q4_0 or Q8_0); run: compress quantize"
        )
    rounded = [name for name in source.linears if isinstance(source.grid(name), RoundedGrid)]
    if rounded:
        raise InputError(
            f"'{source.source.ref}' rounds inputs as well ({rounded[0]}), which no other format "
            "holds in the same way; run compress quantize on the original"
        )
    linears: dict[str, nn.Linear] = linears_of(source.skeleton)
    symmetric: dict[str, bool] = {}
    for name in track(source.linears, "Reading linears"):
        weight = source.weight(name)
        if name not in linears:
            raise InputError(f"'{source.source.ref}' packs {name}, which is no linear of its model")
        expected = (linears[name].out_features, linears[name].in_features)
        if weight.shape != expected:
            raise InputError(
                f"{name} in '{source.source.ref}' has shape {list(weight.shape)}, config.json "
                f"calls for {list(expected)}; the checkpoint does not fit its config.json"
            )
        if weight.offset is not None:
            raise InputError(
                f"format {format_name} cannot hold {name}: Q4_1 has a float offset for each "
                f"group; run: compress quantize {source.source.ref}"
            )
        scale = _scale_for(target, weight, stored)
        if not torch.isfinite(scale).all() or ((scale == 0) & (weight.scale != 0)).any():
            raise InputError(
                f"format {format_name} cannot hold {name}: its scales, up to "
                f"{weight.scale.abs().max().item():.3g} and down to "
                f"{weight.scale.abs().min().item():.3g}, are out of float16's range; "
                "use compressed-tensors"
            )
        change = (scale.double() - weight.scale.double()).abs()
        if changed := int(change.count_nonzero()):
            relative = (change / weight.scale.double().abs()).nan_to_num().max().item()
            survey.rounded += changed
            survey.largest_change = max(survey.largest_change, relative)
        survey.grids[name] = source.grid(name)
        survey.shapes[name] = weight.shape
        symmetric[name] = weight.symmetric
        if weight.group_of is not None:
            survey.reordered.add(name)
    # AWQ does not say which linears are symmetric: one whose zero points are all 8 is only
    # counted as such if all are.
    for name, grid in survey.grids.items():
        counts = symmetric[name] and (grid.symmetric or all(symmetric.values()))
        survey.grids[name] = replace(grid, symmetric=counts)
    if reason := target.refusal(survey.grids, survey.shapes, survey.reordered):
        raise InputError(f"format {format_name} cannot hold {reason}")
    return survey


def _scale_for(target: Format, weight: QuantizedWeight, stored: torch.dtype) -> Tensor:
    """The scales in the target's dtype, or as they are where it allows that and would lose."""
    own = weight.scale.dtype
    scale = weight.scale.to(target.scale_dtype(stored))
    exact = torch.equal(scale.double(), weight.scale.double())
    return weight.scale if not exact and target.scale_dtype(own) == own else scale


def _write(
    source: PackedFolder | GgufModel,
    target: Format,
    survey: Survey,
    stored: torch.dtype,
    writer: ShardWriter,
) -> list[str]:
    """Write every tensor, a part for each block and one for each run of tensors between them.

    Returns the names of the parts.
    """
    names = sorted([*source.linears, *source.others], key=_block_of)  # stable within a block
    parts = [list(part) for _, part in groupby(names, key=_block_of)]
    packed = set(source.linears)
    for number, part in enumerate(track(parts, "Writing blocks")):
        tensors: dict[str, Tensor] = {}
        for name in part:
            if name not in packed:
                tensors[name] = source.load(name)
                continue
            weight = source.weight(name)
            weight = replace(weight, scale=_scale_for(target, weight, stored))
            if weight.symmetric and not survey.grids[name].symmetric:
                weight = replace(
                    weight, zero_point=torch.zeros_like(weight.scale, dtype=torch.int8)
                )
            for suffix, tensor in target.pack_weight(weight).items():
                tensors[f"{name}.{suffix}"] = tensor
        writer.write(f"{number:05d}", tensors)
    return [f"{number:05d}" for number in range(len(parts))]


def _block_of(name: str) -> tuple[str, int]:
    """The block that a tensor is in, by its name: `model.layers.3.mlp` is in (model.layers, 3)."""
    found = re.match(r"(.*?)\.(\d+)\.", name)
    return (found[1], int(found[2])) if found else ("", -1)


def _stored_dtype(config: dict[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))


def _report(
    source: PackedFolder | GgufModel,
    format_name: str,
    out: Path,
    survey: Survey,
    in_float: Iterable[str],
    total_bytes: int,
) -> dict[str, Any]:
    """What compress.json says: nothing in it depends on the clock or the host."""
    original = gguf_file(source.source.ref)
    tied = set(getattr(source.skeleton, "all_tied_weights_keys", None) or ())
    return {
        "model": source.source.ref,
        "from": source.format_name,
        "format": format_name,
        "out": out.name,
        "versions": checkpoint.versions(),
        "scales": {"rounded": survey.rounded, "largest_relative_change": survey.largest_change},
        "sizes": {
            "original_bytes": original.stat().st_size if original else source.reader.total_bytes,
            "bytes": total_bytes,
            "quantized_weights": sum(rows * columns for rows, columns in survey.shapes.values()),
            "parameters": sum(
                parameter.numel()
                for name, parameter in source.skeleton.named_parameters()
                if name not in tied
            ),
        },
        "layers": [
            {
                "name": name,
                "shape": survey.shapes[name],
                "bits": grid.bits,
                "group_size": grid.group_size,
                "symmetric": grid.symmetric,
            }
            for name, grid in survey.grids.items()
        ],
        "left_in_float": list(in_float),
        "made_by": checkpoint.report_of(source.source.folder),
    }
