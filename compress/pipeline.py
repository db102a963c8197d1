"""The one way through: load -> calibrate block by block -> transform -> write a checkpoint.

    embeddings ─> block 0 ─> block 1 ─> ...          one block in memory at a time
                  │ run, collecting statistics of each distinct input
                  │ stage.apply: new weights
                  │ write them
                  └ run again with the new weights: the next block's inputs

The output folder gets its final name only when complete.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from compress import calibration, checkpoint
from compress.core.blocks import BlockInputs, BlockModel, call_block, linears_of
from compress.core.errors import InputError
from compress.core.outfolder import OutputFolder
from compress.core.progress import say, track
from compress.core.shards import ShardWriter
from compress.core.source import resolve_model
from compress.core.stage import Block, LayerReport, Stage
from compress.core.statistics import InputStatistics, collecting
from compress.inspection import inspect_folder
from compress.loading import default_device, native_bfloat16
from compress.quant.config import settle_grids
from compress.quant.formats import FORMATS
from compress.recipe import Recipe, method_of
from compress.report import write_report

TOKENS_PER_BATCH = 4096  # large enough to keep matrix products busy, small enough for caches


@dataclass(frozen=True)
class Settings:
    """What `auto` became on this machine."""

    device: torch.device
    dtype: torch.dtype
    compute_dtype: torch.dtype


def run_recipe(recipe: Recipe, overwrite: bool = False) -> dict[str, Any]:
    """Carry out a recipe and return its report, as written to compress.json with times added.

    Raises InputError before any long work when the model, the method's settings, the calibration
    source or the output folder will not do.
    """
    started = time.monotonic()
    with OutputFolder(recipe.out, overwrite) as folder:
        model, settings, stage = _preflight(recipe)
        writer = ShardWriter(folder)
        tokens, inputs = _calibrate(model, stage, recipe, settings)
        calibrated = time.monotonic()
        plan = None
        if stage.decides_globally:
            summaries = _walk(model, inputs, settings, stage.collect, propagate=False)
            plan = stage.decide(summaries)
        writer.write("outer", _outer_tensors(model, settings.dtype))
        visit = partial(_apply_and_write, stage, plan, model, writer)
        reports = _walk(
            model, inputs, settings, visit, recipe.propagate_error, stage.needs_reference
        )
        layers = [*chain.from_iterable(reports), *_left_in_float(model)]
        writer.finish()
        finished = time.monotonic()
        report = _report(recipe, model, settings, layers, tokens, writer.total_bytes)
        times = {
            "calibration_seconds": round(calibrated - started, 1),
            "quantization_seconds": round(finished - calibrated, 1),
            "seconds": round(finished - started, 1),
        }
        quantized = {layer.name for layer in layers if layer.method}
        in_float = [name for name in linears_of(model.skeleton) if name not in quantized]
        entries = stage.checkpoint_config(in_float)
        card = checkpoint.model_card(model.source.ref, report)
        checkpoint.write_side_files(
            folder, model.source, settings.dtype, entries, report, times, card
        )
        write_report(folder)
    return {**report, **times, "out": str(recipe.out)}


def _preflight(recipe: Recipe) -> tuple[BlockModel, Settings, Stage]:
    """Everything that can be refused in the first second, and what `auto` stands for."""
    source = resolve_model(recipe.model)
    device = default_device()
    compute = recipe.compute_dtype
    if compute == "auto":
        compute = "bfloat16" if native_bfloat16(device) else "float32"
    model = BlockModel(source, device, getattr(torch, compute))
    dtype = model.stored_dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    config = recipe.stages[0]
    linears = {
        f"{model.block_name(index)}.{name}": linear
        for index in range(model.num_blocks)
        for name, linear in linears_of(model.meta_block(index)).items()
    }
    grids, remarks = settle_grids(config, {n: m.in_features for n, m in linears.items()})
    for remark in remarks:
        say(remark)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    if reason := FORMATS[config.format].refusal(grids, shapes):
        raise InputError(f"format {config.format} cannot hold {reason}")
    stage: Stage = config.stage(grids)
    if stage.needs_reference and not recipe.propagate_error:
        raise InputError(
            "cross_moment compares original with compressed activations, which propagate_error: "
            "false does not compute; switch one of the two off"
        )
    if stage.needs_statistics:
        calibration.check_source(recipe.calibration)
    for name in model.unknown_names():
        say(f"Not carried over: {name} is in the checkpoint, but the model class does not use it")
    return model, Settings(device, dtype, model.compute_dtype), stage


def _calibrate(
    model: BlockModel, stage: Stage, recipe: Recipe, settings: Settings
) -> tuple[Tensor | None, BlockInputs | None]:
    """Calibration tokens and what enters the blocks; nothing where the stage needs none."""
    if not stage.needs_statistics:
        return None, None
    tokens = calibration.calibration_tokens(
        recipe.calibration, model.source, _vocab_size(model), settings.device
    )
    size = max(1, TOKENS_PER_BATCH // tokens.shape[1])
    return tokens, model.capture_inputs(list(tokens.split(size)))


def _apply_and_write(
    stage: Stage, plan: Any, model: BlockModel, writer: ShardWriter, block: Block
) -> list[LayerReport]:
    """Let the stage change a block, and write what is left of it and what stands for the rest."""
    outcome = stage.apply(block, plan)
    tensors = dict(outcome.tensors)
    for name, value in block.module.state_dict().items():
        if name not in outcome.replaces:
            tensors[name] = _stored(block.full_name(name), value, block.dtype)
    part = {model.stored_name(block.full_name(name)): value for name, value in tensors.items()}
    writer.write(f"block-{block.index:05d}", part)
    return outcome.layers


@torch.no_grad()
def _walk(
    model: BlockModel,
    inputs: BlockInputs | None,
    settings: Settings,
    visit: Callable[[Block], Any],
    propagate: bool,
    with_originals: bool = False,
) -> list[Any]:
    """Visit every block in order, with statistics if there are inputs; return what visits return.

    `propagate` runs a block again after the visit, so that the next one sees what it now gives.
    `with_originals` also runs every block as it was on what the blocks before it gave as they were.
    """
    hidden = inputs.hidden if inputs else []
    originals = hidden
    results = []
    for index in track(range(model.num_blocks), "Compressing blocks"):
        module = model.load_block(index)
        kwargs = inputs.kwargs[index] if inputs else []
        statistics: Sequence[InputStatistics] = []
        probe = None
        outputs: list[Tensor] = []
        if inputs:
            runner = model.compute_copy(module)
            with collecting(runner, with_originals, outputs=not propagate) as statistics:
                if with_originals:
                    pairs = [
                        states for pair in zip(originals, hidden, strict=True) for states in pair
                    ]
                    twice = [given for given in kwargs for _ in range(2)]
                    outputs = model.run_block(runner, pairs, twice)
                    originals, outputs = outputs[::2], outputs[1::2]
                else:
                    outputs = model.run_block(runner, hidden, kwargs)
            probe = probe_of(hidden[0], kwargs[0], settings.device)
        block = Block(index, model.block_name(index), module, statistics, probe, settings.dtype)
        results.append(visit(block))
        if inputs and index + 1 < model.num_blocks:
            if propagate:
                outputs = model.run_block(model.compute_copy(module), hidden, kwargs)
            hidden = outputs
    return results


def probe_of(
    hidden: Tensor, kwargs: dict[str, Any], device: torch.device
) -> Callable[[nn.Module], Tensor]:
    """A function that runs a float32 block on the first batch's first sequence."""
    states = hidden[:1].to(device, torch.float32)

    def to_float(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value[:1] if value.shape[:1] == hidden.shape[:1] else value
            return value.float() if value.is_floating_point() else value
        if isinstance(value, tuple):
            return tuple(to_float(item) for item in value)
        return value

    one = {name: to_float(value) for name, value in kwargs.items()}
    return lambda block: call_block(block, states, one)


def _outer_tensors(model: BlockModel, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: _stored(name, model.reader.load(name), dtype) for name in model.outer_names()}


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the dtype that it is stored in; InputError where that cannot hold its values."""
    if not value.is_floating_point():
        return value
    stored = value.to(dtype)
    if not torch.isfinite(stored).all():
        raise InputError(
            f"tensor {name} has values up to {value.abs().max().item():.3g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; use --dtype bfloat16 or float32"
        )
    return stored


def _left_in_float(model: BlockModel) -> list[LayerReport]:
    """Matrices that no stage looked at, each with the reason."""
    inside = model.blocks_name + "."
    reports = []
    linear_weights = {
        f"{name}.weight" for name, m in model.skeleton.named_modules() if isinstance(m, nn.Linear)
    }
    for name, parameter in model.skeleton.named_parameters(remove_duplicate=False):
        if parameter.dim() < 2 or (name in linear_weights and name.startswith(inside)):
            continue
        if name.startswith(inside):
            note = "left in float: not a linear layer"
        elif name in model.tied_names:
            note = "left in float: the same tensor as the embeddings (tied)"
        else:
            note = "left in float: outside the decoder blocks"
        shape = (parameter.shape[0], parameter.numel() // parameter.shape[0])
        reports.append(LayerReport(name.removesuffix(".weight"), None, shape, note=note))
    return reports


def _vocab_size(model: BlockModel) -> int:
    return model.config.get_text_config().vocab_size


def _report(
    recipe: Recipe,
    model: BlockModel,
    settings: Settings,
    layers: Sequence[LayerReport],
    tokens: Tensor | None,
    total_bytes: int,
) -> dict[str, Any]:
    """What compress.json says: nothing in it depends on the clock or the host."""
    stage = recipe.stages[0]
    described = asdict(recipe)
    described["out"] = recipe.out.name
    described["stages"] = [{"method": method_of(stage), **asdict(stage)}]
    quantized = sum(layer.shape[0] * layer.shape[1] for layer in layers if layer.method)
    return {
        "recipe": described,
        "versions": checkpoint.versions(),
        "calibration_sha256": calibration.fingerprint(tokens) if tokens is not None else None,
        "compute_dtype": str(settings.compute_dtype).removeprefix("torch."),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "sizes": {
            "original_bytes": model.reader.total_bytes,
            "original_bytes_by_part": _original_parts(model, layers),
            "bytes": total_bytes,
            "quantized_weights": quantized,
            "parameters": model.num_parameters,
        },
        "layers": [asdict(layer) for layer in layers],
    }


def _original_parts(model: BlockModel, layers: Sequence[LayerReport]) -> dict[str, int]:
    """Bytes of the original, with the linears that are now quantized as a part of their own."""
    parts = inspect_folder(model.source.folder)["bytes_by_part"]
    names = (model.stored_name(f"{layer.name}.weight") for layer in layers if layer.method)
    linears = sum(model.reader.tensor_bytes(name) for name in names)
    return parts | {"quantized linears": linears, "other": parts["other"] - linears}
