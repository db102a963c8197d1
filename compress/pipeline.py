"""The one way through: load -> calibrate block by block -> transform -> write a checkpoint.

    embeddings ─> block 0 ─> block 1 ─> ...          one block in memory at a time (walk.py)
                  │ run, collecting statistics of each distinct input
                  │ stage.apply: new weights
                  │ write them
                  │ run again with the new weights: the next block's inputs
                  └ commit

    ... ─> last block ─> [the whole model is trained (qat.py)] ─> checkpoint

The output folder gets its final name only when complete.  A run that is broken off goes on after
the last block that was committed, and gives the same bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import calibration, checkpoint
from compress.core.blocks import BlockModel, linears_of
from compress.core.commits import numbered
from compress.core.errors import InputError, reason_of
from compress.core.kv_sizes import attention_of, owns_cache
from compress.core.outfolder import OutputFolder
from compress.core.processes import processes
from compress.core.shards import (
    BESIDE,
    DTYPES,
    ShardWriter,
    StreamedTensor,
    hashed,
    in_stored_dtype,
)
from compress.core.source import read_config
from compress.core.stage import Block, LayerReport
from compress.frontier_plot import write_plot
from compress.inspection import inspect_folder
from compress.kernels.paged_attention.cache import CODES, SMALLEST
from compress.mixed import settle_mixed
from compress.preflight import (
    Job,
    check_resources,
    kept_in_memory,
    needed_text,
    needs_of,
    preflight,
)
from compress.qat import train_whole_model
from compress.quant.formats import compressed_tensors
from compress.recipe import CalibrationConfig, Recipe, described
from compress.report import write_report
from compress.walk import Clock, Walk

KV_CACHE = "kv-cache"  # the part with scales of keys and values


def run_recipe(
    recipe: Recipe,
    overwrite: bool = False,
    restart: bool = False,
    activation_memory: int | None = None,
    only_allocate: bool = False,
) -> dict[str, Any]:
    """Carry out a recipe and return its report, as written to compress.json with times added.

    A broken-off run towards the same output goes on where it was, unless `restart`.
    `activation_memory` is how many bytes of hidden states are kept in memory, beside the disk; a
    quarter of what is free by default.  Neither changes a byte of the result.  With `only_allocate`
    a target of bits is allocated to the linears, that report returned, and what was found out kept
    for a run without.

    Raises InputError before any long work when the model, the method's settings, the calibration
    source, the machine or the output folder will not do.
    """
    clock = Clock()
    folder = OutputFolder(recipe.out, overwrite)
    first = processes().first
    first(folder.check)
    job = preflight(recipe)
    if only_allocate and job.choices is None:
        raise InputError("only a target has an allocation; give one, such as --target-bits 4.75")
    memory = kept_in_memory(activation_memory)
    with ExitStack() as stack:
        needs, text = needs_of(job, memory), needed_text(job)
        first(lambda: check_resources(needs, folder, job.model, text))
        first(lambda: stack.enter_context(folder))
        first(lambda: folder.begin(_identity(job), restart))
        with broken_off(folder):
            walk = Walk(job, folder.commits, folder.activations, memory, clock)
            walk.measures_cache = job.recipe.kv_cache is not None
            return _compress(walk, folder, only_allocate)


@contextmanager
def broken_off(folder: OutputFolder) -> Iterator[None]:
    """What a run that fails inside leaves: nothing, where the same run would end there again.

    Raises InputError where memory runs out, with what was done kept.
    """
    try:
        yield
    except InputError:
        if not folder.has_trained:
            processes().first(folder.commits.clear)
        raise
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        raise InputError(
            f"out of memory ({reason_of(error)}); what was done is kept: close something, or "
            "pass a smaller --activation-memory, and run the same command again to go on"
        ) from error


def _is_about_memory(error: Exception) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)  # PyTorch on a CPU


def _compress(walk: Walk[Job], folder: OutputFolder, only_allocate: bool) -> dict[str, Any]:
    """Do what preflight found possible; returns the report, with the times."""
    first = processes().first
    rows = _rows(walk) if needed_text(walk.job) else None
    tokens, seconds = None, {"calibration_seconds": walk.clock.seconds}
    if rows is not None and (walk.job.stage.needs_statistics or walk.job.choices):
        tokens = rows[: walk.job.recipe.calibration.samples]
    allocation = None
    if tokens is not None and walk.job.choices is not None:
        before = walk.clock.seconds
        allocation = settle_mixed(walk, walk.job.choices, tokens, folder)
        seconds["allocation_seconds"] = walk.clock.seconds - before
        if only_allocate:
            first(folder.leave)
            return {"allocation": allocation, "seconds": round(walk.clock.seconds, 1)}
    job, stage, model = walk.job, walk.job.stage, walk.job.model
    if tokens is not None and stage.needs_statistics:
        walk.tokens = processes().share(tokens)
    plan = _plan(walk) if stage.decides_globally else None
    writer = ShardWriter(folder.start if stage.trains_model else folder.output)
    if walk.commits.get("outer") is None:
        first(lambda: writer.write("outer", outer_tensors(model, job.dtype)))
        first(lambda: walk.commits.put("outer", True))
    beside = ShardWriter(folder.output / BESIDE)
    visit = partial(_apply_and_write, job, plan, writer, beside)
    with_originals = stage.needs_reference or stage.trains_blocks
    reports = walk.visit_all("apply", visit, job.recipe.propagate_error, with_originals)
    if job.recipe.kv_cache and walk.commits.get(KV_CACHE) is None:
        first(lambda: writer.write(KV_CACHE, _cache_scales(walk)))
        first(lambda: walk.commits.put(KV_CACHE, True))
    layers = [LayerReport(**layer) for layer in chain.from_iterable(reports)]
    layers += _left_in_float(model)
    made = Made(layers, tokens, seconds, allocation=allocation)
    if rows is not None and stage.trains_model:
        made = _train(walk, folder, writer, rows, made)
        writer = ShardWriter(folder.output)
    return first(lambda: _finish(walk, folder, writer, made)) or {}


@dataclass(frozen=True)
class Made:
    """What a run has made, for the report.

    layers      what happened to each linear
    tokens      that were calibrated on, int64 [samples, seq_len]
    seconds     of calibration, of an allocation and of training
    training    what `train_whole_model` reports
    allocation  what `settle_mixed` reports
    """

    layers: Sequence[LayerReport]
    tokens: Tensor | None
    seconds: dict[str, float]
    training: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None


def _train(
    walk: Walk[Job], folder: OutputFolder, writer: ShardWriter, rows: Tensor, made: Made
) -> Made:
    """Train the whole model from what the walk has written, and write the parts of the output."""
    job, first = walk.job, processes().first
    entries = _config_entries(job, made.layers)

    def finish_start() -> None:
        writer.finish(_part_names(job.model))
        config = read_config(job.model.source.folder) | entries
        checkpoint.write_config(folder.start, job.dtype, config)

    before = walk.clock.seconds
    first(finish_start)
    trained = train_whole_model(job, folder, rows, made.layers)
    walk.clock.go_on_from(before + trained.seconds)

    def write_parts() -> None:
        output = ShardWriter(folder.output)
        for part, tensors in trained.parts:
            output.write(part, tensors)

    first(write_parts)
    seconds = made.seconds | {"training_seconds": trained.seconds}
    return replace(made, layers=trained.layers, seconds=seconds, training=trained.report)


def _part_names(model: BlockModel, with_cache: bool = False) -> list[str]:
    blocks = [numbered("block", index) for index in range(model.num_blocks)]
    return ["outer", *blocks, *([KV_CACHE] if with_cache else [])]


def _cache_scales(walk: Walk[Job]) -> dict[str, Tensor]:
    """The scales of keys and values by name, float32 [1] each: the largest has the largest code."""
    model, kind = walk.job.model, walk.job.recipe.kv_cache
    assert kind is not None
    scales = {}
    for index, commit in enumerate(walk.commits.series("apply")):
        attention = attention_of(model.meta_block(index), model.block_name(index))
        if not owns_cache(model.meta_block(index), attention):
            continue
        owner = model.stored_name(f"{model.block_name(index)}.{attention}")
        for name, size in zip(("k_scale", "v_scale"), commit["cache_sizes"], strict=True):
            scales[f"{owner}.{name}"] = torch.tensor([max(size / CODES[kind].largest, SMALLEST)])
    return scales


def _config_entries(job: Job, layers: Sequence[LayerReport]) -> dict[str, Any]:
    """What the stage adds to config.json."""
    quantized = {layer.name for layer in layers if layer.method}
    in_float = [name for name in linears_of(job.model.skeleton) if name not in quantized]
    entries = job.stage.checkpoint_config(in_float)
    if job.recipe.kv_cache:
        scheme = compressed_tensors.kv_cache_scheme(job.recipe.kv_cache)
        entries["quantization_config"]["kv_cache_scheme"] = scheme
    return entries


def _rows(walk: Walk[Job]) -> Tensor:
    """Token ids, int64 [N, seq_len], made once; the first `samples` rows are to calibrate on."""
    job = walk.job
    text = needed_text(job)
    assert text is not None
    vocabulary = job.model.config.get_text_config().vocab_size
    return made_once(walk, lambda: _made(text, job, vocabulary))


def made_once(walk: Walk[Any], make: Callable[[], Tensor]) -> Tensor:
    """The token ids that a run calibrates on, as it made them before it was broken off, or now."""

    def put() -> None:
        if walk.commits.get("tokens") is None:
            tokens = make()
            walk.commits.put("tokens", {"tokens": tokens, "seconds": walk.clock.seconds})

    processes().first(put)
    commit = walk.commits.get("tokens")
    walk.clock.go_on_from(commit["seconds"])
    return commit["tokens"]


def _made(text: CalibrationConfig, job: Job, vocabulary: int) -> Tensor:
    """Token ids as asked for; InputError that says what asks for so many."""
    try:
        return calibration.calibration_tokens(text, job.model.source, vocabulary, job.device)
    except InputError as error:
        more = text.samples - job.recipe.calibration.samples
        if more <= 0:
            raise
        raise InputError(
            f"{error}; {more} of the samples are for training the whole model, fewer with fewer "
            "tokens (--set tokens=50k)"
        ) from None


def _plan(walk: Walk[Job]) -> Any:
    """What a stage decides on all blocks together, once."""
    stage, commits = walk.job.stage, walk.commits
    if commits.get("plan") is None:
        summaries = walk.visit_all("collect", stage.collect, propagate=False)
        processes().first(lambda: commits.put("plan", stage.decide(summaries)))
    return commits.get("plan")


def _apply_and_write(
    job: Job, plan: Any, writer: ShardWriter, beside: ShardWriter, block: Block
) -> list[dict[str, Any]]:
    """Let the stage change a block, and write what is left of it and what stands for the rest."""
    outcome = job.stage.apply(block, plan)
    tensors = dict(outcome.tensors)
    for name, value in block.module.state_dict().items():
        if name not in outcome.replaces:
            tensors[name] = in_stored_dtype(block.full_name(name), value, block.dtype)
    stored_name = job.model.stored_name

    def write(where: ShardWriter, found: Mapping[str, Tensor]) -> None:
        part = {stored_name(block.full_name(name)): value for name, value in found.items()}
        where.write(numbered("block", block.index), part)

    write(writer, tensors)
    if outcome.beside is not None:
        beside.folder.mkdir(exist_ok=True)
        write(beside, outcome.beside)
    return [asdict(layer) for layer in outcome.layers]


def _finish(
    walk: Walk[Job], folder: OutputFolder, writer: ShardWriter, made: Made
) -> dict[str, Any]:
    """Name the shards and write what stands beside them; can be broken off and done again."""
    job, model = walk.job, walk.job.model
    total_bytes = writer.finish(_part_names(model, job.recipe.kv_cache is not None))
    beside = ShardWriter(folder.output / BESIDE)
    if beside.folder.is_dir():
        total_bytes += beside.finish(_part_names(model)[1:])
    report = _report(job, made, total_bytes)
    seconds, others = walk.clock.seconds, sum(made.seconds.values())
    times = made.seconds | {"quantization_seconds": seconds - others, "seconds": seconds}
    times = {name: round(value, 1) for name, value in times.items()}
    config = read_config(model.source.folder) | _config_entries(job, made.layers)
    card = checkpoint.model_card(model.source.ref, report)
    checkpoint.write_side_files(folder.output, model.source, job.dtype, config, report, times, card)
    if made.allocation:
        write_plot(folder.output / "allocation.png", made.allocation)
    write_report(folder.output)
    return {**report, **times, "out": str(job.recipe.out)}


def outer_tensors(
    model: BlockModel,
    dtype: torch.dtype,
    change: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> dict[str, StreamedTensor]:
    """What is outside the blocks, to be read row by row when it is written.

    `change` makes of some rows of a tensor those to write; all rows alike, and as many.
    """
    reader = model.reader

    def rows(name: str) -> Iterator[Tensor]:
        return (in_stored_dtype(name, change(chunk), dtype) for chunk in reader.rows(name))

    def streamed(name: str) -> StreamedTensor:
        stored = DTYPES[reader.dtypes[name]]
        shape = change(torch.empty(reader.shapes[name], dtype=stored, device="meta")).shape
        written = dtype if stored.is_floating_point else stored
        return StreamedTensor(tuple(shape), written, partial(rows, name))

    return {name: streamed(name) for name in model.outer_names()}


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


def _report(job: Job, made: Made, total_bytes: int) -> dict[str, Any]:
    """What compress.json says: nothing in it depends on the clock or the host."""
    model, layers, tokens = job.model, made.layers, made.tokens
    quantized = sum(layer.shape[0] * layer.shape[1] for layer in layers if layer.method)
    return {
        "recipe": described(job.recipe),
        "versions": checkpoint.versions(),
        "calibration_sha256": calibration.fingerprint(tokens) if tokens is not None else None,
        "compute_dtype": str(model.compute_dtype).removeprefix("torch."),
        "dtype": str(job.dtype).removeprefix("torch."),
        "sizes": {
            "original_bytes": model.reader.total_bytes,
            "original_bytes_by_part": _original_parts(model, layers),
            "bytes": total_bytes,
            "quantized_weights": quantized,
            "parameters": model.num_parameters,
        },
        **({"training": made.training} if made.training else {}),
        **({"allocation": made.allocation} if made.allocation else {}),
        "layers": [asdict(layer) for layer in layers],
    }


def _original_parts(model: BlockModel, layers: Sequence[LayerReport]) -> dict[str, int]:
    """Bytes of the original, with the linears that are now quantized as a part of their own."""
    parts = inspect_folder(model.source.folder)["bytes_by_part"]
    names = (model.stored_name(f"{layer.name}.weight") for layer in layers if layer.method)
    linears = sum(model.reader.tensor_bytes(name) for name in names)
    return parts | {"quantized linears": linears, "other": parts["other"] - linears}


def _identity(job: Job) -> dict[str, Any]:
    return identity(described(job.recipe), job.recipe.calibration, job.model, job.dtype)


def identity(
    told: dict[str, Any], data: CalibrationConfig, model: BlockModel, dtype: torch.dtype
) -> dict[str, Any]:
    """What a broken-off run must have been of, for this one to go on from it.

    told  the recipe, as compress.json holds it

    Reads all weights once, and refuses those with a NaN or an infinity.
    """
    folder, text = model.source.folder, Path(data.source)
    small = [folder / "config.json", *checkpoint.carried_files(folder)]
    return {
        "recipe": told,
        "dtype": str(dtype),
        "compute dtype": str(model.compute_dtype),
        "versions": checkpoint.versions(),
        "processes": processes().count,
        "calibration file": hashed(text.read_bytes()) if text.is_file() else None,
        "calibration model": calibration.writer_files(data),
        "model files": {path.name: hashed(path.read_bytes()) for path in small},
        "model weights": model.digest(),
    }
