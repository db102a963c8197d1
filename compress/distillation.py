"""Distillation from checkpoint to checkpoint: a student learns what its teacher predicts.

    text ─> .NAME.progress/training/tokens     packed sequences, made once (distill/data.py)
              │ with `topk`: the teacher runs on all of them once, its likeliest tokens go to disk
              │ the loop (distill/loop.py), which goes on from its own checkpoints
              ▼
            NAME    the student's class and dtype, losses.jsonl, loss.png, compress.json, report

Unlike quantization this holds whole models: the student in float32 with gradients and AdamW's
moments, and the teacher where it runs beside it.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import calibration, checkpoint, texts
from compress.core.blocks import BlockModel
from compress.core.commits import IDENTITY, numbered
from compress.core.errors import InputError
from compress.core.outfolder import OutputFolder
from compress.core.processes import processes
from compress.core.progress import say, track, without_bars
from compress.core.shards import hashed, hashed_file, in_stored_dtype
from compress.core.source import read_config
from compress.core.tokenizer import load_tokenizer
from compress.distill.checkpoint import whole_weights
from compress.distill.data import LARGE_ODD, PackedData, pack
from compress.distill.latent_scale import LatentScale
from compress.distill.loop import TrainResult, train
from compress.distill.lora import add_lora, merge_lora
from compress.distill.objective import Objective, Student
from compress.distill.preparation import TRACKED
from compress.distill.teacher import LiveTeacher, TopKCache
from compress.distill_preflight import DistillJob, check_resources, preflight, vocabulary_of
from compress.inspection import inspect_folder
from compress.loading import load_model
from compress.recipe import DistillRecipe, described
from compress.report import write_report

WHAT = "training"  # as messages on its text name it
PIECES = 128  # sampled side by side, and committed together
RECORDS = ("losses.jsonl", "loss.png")  # of the loop, for the output folder


def run_distillation(
    recipe: DistillRecipe, overwrite: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Carry out a recipe and return its report, as written to compress.json with times added.

    A broken-off run towards the same output goes on where it was, unless `restart`.

    Raises InputError before any long work when the models, the data, the machine or the output
    folder will not do; later when the data is too short or a loss is not finite, with the last
    checkpoints kept.
    """
    folder = OutputFolder(recipe.out, overwrite)
    first = processes().first
    first(folder.check)
    job = preflight(recipe)
    with ExitStack() as stack:
        first(lambda: check_resources(job, folder))
        first(lambda: stack.enter_context(folder))
        first(lambda: folder.begin(_identity(job), restart))
        try:
            data = _data(job, folder)
            teacher = _teacher(job, data, folder)  # of a cache it is gone before the student comes
            model = _model(job)
            latents = LatentScale(model)
            if job.config.lora:
                model = add_lora(model, job.config.lora)
            student = Student(model, Objective(job.config.loss, model, teacher))
            result = train(student, data, job.config.train, folder.training)
            model = merge_lora(student.model, job.dtype) if job.config.lora else student.model
            weights = latents.restored(whole_weights(model))
            report = first(lambda: _finish(job, folder, model, weights, data, result))
            return report or {}
        except InputError:  # the same run would end here again
            if not folder.has_trained:
                first(folder.commits.clear)
            raise


def _data(job: DistillJob, folder: OutputFolder) -> PackedData:
    """The packed sequences, made once by the first process."""
    path = folder.training / "tokens"
    config = job.config

    def make() -> None:
        if not path.exists():
            own = config.data.source == "self"
            pack(_sampled(job, folder) if own else _documents(job), path, job.tokens)
            folder.commits.put("data", True)

    processes().first(make)
    data = PackedData.read(path, config.train.seq_len, config.data.held_out)
    if (needed := config.train.steps * config.train.step_sequences) > data.trained:
        say(
            f"The data has {data.trained} sequences of {data.seq_len} tokens to train on: "
            f"{needed / data.trained:.1f} passes over them"
        )
    return data


def _documents(job: DistillJob) -> Iterator[list[int]]:
    """Token ids of the texts, each with the token that ends a text.  Raises InputError."""
    source, origin = job.student.source, job.config.data.source
    tokenizer = load_tokenizer(source.folder)
    end: list[Any] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    is_file = texts.is_file(Path(origin), WHAT)
    found = texts.read_file(Path(origin), WHAT) if is_file else texts.stream_dataset(origin, WHAT)
    vocabulary = vocabulary_of(job.student)
    for text in track(found, "Reading training text"):
        ids = texts.encode(tokenizer, text, source, WHAT)
        if not ids:
            continue
        if max(ids) >= vocabulary:
            raise InputError(
                f"the tokenizer of '{source.ref}' yields token {max(ids)}, but the model has only "
                f"{vocabulary}; the tokenizer does not fit the model"
            )
        yield ids + end


def _sampled(job: DistillJob, folder: OutputFolder) -> Iterator[list[int]]:
    """Pieces of text sampled from the teacher, each from a random first token (calibration.py)."""
    assert job.teacher is not None
    length = min(job.config.train.seq_len, calibration.SELF_LENGTH)
    batches = -(-job.tokens // (length * PIECES))
    model = None
    for number in range(batches):
        name = numbered("sampled", number)
        if folder.commits.get(name) is None:
            model = model or calibration.sampling_model(job.teacher.source, job.device)
            seed = (job.config.data.seed + LARGE_ODD * (number + 1)) % (1 << 63)
            generator = torch.Generator().manual_seed(seed)
            first, steps = calibration.sampled_batch(model, PIECES, length, generator)
            title = f"Sampling text, {number + 1} of {batches},"
            rows = torch.cat([first, *track(steps, title, total=length - 1)], dim=1)
            folder.commits.put(name, rows)
        yield from folder.commits.get(name).tolist()


def _model(job: DistillJob) -> Any:
    """The student's weights: of what is not trained, forward passes need no more than their own
    precision."""
    precision = job.precision if job.config.lora else "float32"
    model = load_model(job.student.source.folder, precision, job.device)
    return model if job.config.lora else model.requires_grad_(True)


def _teacher(
    job: DistillJob, data: PackedData, folder: OutputFolder
) -> LiveTeacher | TopKCache | None:
    """The teacher, or what was kept of it."""
    if not job.teacher_runs:
        return None
    return _live_teacher(job) if job.config.loss.topk is None else _cached(job, data, folder)


def _live_teacher(job: DistillJob) -> LiveTeacher:
    assert job.teacher is not None
    return LiveTeacher(load_model(job.teacher.source.folder, job.precision, job.device))


def _cached(job: DistillJob, data: PackedData, folder: OutputFolder) -> TopKCache:
    """The teacher's likeliest tokens for the sequences that are used; it runs if one is missing."""
    assert job.teacher is not None
    place = job.config.cache or folder.training / "teacher"
    identity, train = job.cache_identity(job.teacher.digest()), job.config.train
    used = data.used(train.steps, train.step_sequences, train.seed)
    if (place / IDENTITY).is_file():
        cache = TopKCache(place, identity)
        if all(index in cache for index in used.tolist()):
            return cache
    batches = (data.batch(part) for part in processes().share(used).split(train.micro_batch))
    return TopKCache.build(place, identity, _live_teacher(job), batches, len(used))


def _finish(
    job: DistillJob,
    folder: OutputFolder,
    model: Any,
    weights: dict[str, Tensor],
    data: PackedData,
    result: TrainResult,
) -> dict[str, Any]:
    """Write the checkpoint; can be broken off and done again."""
    stored: dict[int, Tensor] = {}  # tied weights stay one
    for name, weight in weights.items():
        if weight.data_ptr() not in stored:
            stored[weight.data_ptr()] = in_stored_dtype(name, weight, job.dtype)
    state = {name: stored[weight.data_ptr()] for name, weight in weights.items()}
    with without_bars():
        model.save_pretrained(folder.output, state_dict=state)
    for name in RECORDS:
        if (folder.training / name).is_file():
            shutil.copyfile(folder.training / name, folder.output / name)
    if (folder.training / TRACKED).is_dir():
        shutil.copytree(folder.training / TRACKED, folder.output / TRACKED, dirs_exist_ok=True)
    report = _report(job, folder, data, result)
    times = {"seconds": round(result.seconds, 1)}
    card = checkpoint.distill_card(report)
    student = job.student.source
    checkpoint.write_side_files(
        folder.output, student, job.dtype, read_config(student.folder), report, times, card
    )
    write_report(folder.output)
    return {**report, **times, "out": str(job.recipe.out)}


def _report(
    job: DistillJob, folder: OutputFolder, data: PackedData, result: TrainResult
) -> dict[str, Any]:
    """What compress.json says: nothing in it depends on the clock or the host."""
    student = job.student
    evaluations = [{"tokens": row["tokens"], **row["evaluation"]} for row in result.evaluations]
    return {
        "recipe": described(job.recipe),
        "versions": checkpoint.versions(),
        "calibration_sha256": None,
        "compute_dtype": job.precision,
        "dtype": str(job.dtype).removeprefix("torch."),
        "sizes": {
            "original_bytes": student.reader.total_bytes,
            "original_bytes_by_part": inspect_folder(student.source.folder)["bytes_by_part"],
            "bytes": inspect_folder(folder.output)["bytes"],
            "quantized_weights": 0,
            "parameters": student.num_parameters,
        },
        "layers": [],
        "training": {
            "steps": result.steps,
            "tokens": result.tokens,
            "loss": result.loss,
            "sequences": data.trained,
            "sequences_held_out": data.held_out,
            "data_sha256": data.fingerprint(),
            "evaluations": evaluations,
        },
    }


def _identity(job: DistillJob) -> dict[str, Any]:
    """What a broken-off run must have been of, for this one to go on from it.

    Reads all weights once, and refuses those with a NaN or an infinity.
    """
    text = Path(job.config.data.source)
    models = {"student": job.student, "teacher": job.teacher}
    found = {"recipe": described(job.recipe), "precision": job.precision, "dtype": str(job.dtype)}
    return found | {
        "versions": checkpoint.versions(),
        "data file": hashed_file(text) if text.is_file() else None,
        **{name: files_of(model) for name, model in models.items() if model is not None},
    }


def files_of(model: BlockModel) -> dict[str, Any]:
    """Hashes of a model's small files and of its weights, all of which are read."""
    folder = model.source.folder
    small = [folder / "config.json", *checkpoint.carried_files(folder)]
    return {
        "files": {path.name: hashed(path.read_bytes()) for path in small},
        "weights": model.digest(),
    }
