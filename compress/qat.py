"""Training the whole model after the walk: QAT's second phase, from checkpoint to checkpoint.

    folder.start   the quantized model, a checkpoint like any other
        │ its linears become fake-quantized ones and learn the original's predictions
        │ (distill/qat.py)
        ▼
    folder.output  the same tensors, with other codes, scales and vectors

Unlike the rest of the pipeline it holds whole models: the one that learns in float32, with
gradients and Adam's two moments, and the original in the dtype of forwards.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.commits import numbered
from compress.core.outfolder import OutputFolder
from compress.core.processes import processes
from compress.core.progress import say
from compress.core.shards import DTYPES, StreamedTensor, streamed
from compress.core.source import ModelSource
from compress.core.stage import LayerReport
from compress.distill.config import TrainConfig
from compress.distill.data import PackedData
from compress.distill.loop import TrainResult
from compress.distill.qat import learn_predictions
from compress.loading import load_model
from compress.preflight import MICRO_BATCH, Job, held_out_of, qat_config, whole_shares
from compress.quant.fake_quant import FakeQuantLinear, put_on_grid, steps_of
from compress.quant.packed import PackedFolder
from compress.quant.qat import PLACES
from compress.quant.training import Rates

EVALUATIONS = 4  # on the held-out sequences, besides that of the start
OUTER = "outer"  # the part with what is outside the blocks
RECORDS = ("losses.jsonl", "loss.png")  # of the loop, for the output folder


@dataclass(frozen=True)
class TrainedModel:
    """What training made.

    parts    tensors of the output by part, to be written one after another
    layers   what happened to each linear, in the end
    report   for compress.json
    seconds  of training
    """

    parts: Iterator[tuple[str, Mapping[str, Tensor | StreamedTensor]]]
    layers: list[LayerReport]
    report: dict[str, Any]
    seconds: float


def train_whole_model(
    job: Job, folder: OutputFolder, rows: Tensor, layers: Sequence[LayerReport]
) -> TrainedModel:
    """Train from the checkpoint in `folder.start`.

    rows    token ids, int64 [N, S]; the last ones are held out
    layers  what the walk did to each linear

    All processes call this.  Where the divergence on the held-out text does not fall the model
    stays as it was at the start, which is said and reported.  A run that was broken off goes on
    from the loop's last checkpoint in `folder.training`.
    """
    config, data = train_config(job), packed_rows(job, rows)
    start = PackedFolder(ModelSource(str(folder.start), folder.start))
    model = fake_quantized(job, start)
    dtype = str(job.model.compute_dtype).removeprefix("torch.")
    original = load_model(job.model.source.folder, dtype, job.device)
    settings = qat_config(job)
    rates = Rates(settings.rate, settings.scale_rate, settings.trains)
    result = learn_predictions(model, original, data, config, rates, folder.training)
    for name in RECORDS:
        if processes().is_first and (folder.training / name).is_file():
            shutil.copyfile(folder.training / name, folder.output / name)
    kls = [row["evaluation"]["loss"] for row in result.evaluations]
    if not kls[-1] < kls[0]:
        say("Training did not bring the model closer to the original: it stays as it was before")
        report = _report(result, data) | {"helped": False}
        return TrainedModel(_parts(job, start, {}), list(layers), report, result.seconds)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    moved = {n: _share_moved(start, job.model.stored_name(n), m) for n, m in linears.items()}
    sizes = {name: linear.latent.numel() for name, linear in linears.items()}
    share = sum(moved[name] * size for name, size in sizes.items()) / sum(sizes.values())
    return TrainedModel(
        _parts(job, start, _changed(job, start, model, linears)),
        [_after_training(layer, moved) for layer in layers],
        _report(result, data) | {"helped": True, "codes_moved": share},
        result.seconds,
    )


def train_config(job: Job) -> TrainConfig:
    """The loop's settings; rates are with the groups of parameters."""
    config, data = qat_config(job), job.recipe.calibration
    size = whole_shares(config.batch_tokens // data.seq_len)
    settings = TrainConfig(
        tokens=config.tokens,
        seq_len=data.seq_len,
        batch_size=size,
        micro_batch=MICRO_BATCH,
        precision="bfloat16" if job.model.compute_dtype == torch.bfloat16 else "float32",
        seed=data.seed,
    )
    return replace(settings, evaluate_every=-(-settings.steps // EVALUATIONS))


def packed_rows(job: Job, rows: Tensor) -> PackedData:
    """Sequences for the loop: held out are the last ones, which were not calibrated on either."""
    return PackedData.of_rows(rows.flip(0), held_out_of(job))


def fake_quantized(job: Job, start: PackedFolder) -> nn.Module:
    """The model that a quantized checkpoint stands for, in float32, with linears that can learn."""
    model = load_model(job.model.source.folder, "float32", job.device)
    names = {job.model.stored_name(name): name for name in model.state_dict()}
    others = {names[name]: start.load(name) for name in start.others if name in names}
    model.load_state_dict(others, strict=False)
    weights = {name: start.weight(job.model.stored_name(name)) for name in job.grids}
    for name, weight in weights.items():
        places = start.load(f"{job.model.stored_name(name)}.{PLACES}").float() / 254
        steps = steps_of(weight) + places
        scale = weight.scale.float().repeat_interleave(weight.group_size, dim=1)
        model.get_submodule(name).weight.data = steps * scale
    put_on_grid(model, weights)
    return model.to(job.device)  # type: ignore  # transformers' wrapper hides the signature


def _changed(
    job: Job, start: PackedFolder, model: nn.Module, linears: Mapping[str, FakeQuantLinear]
) -> dict[str, Tensor]:
    """The tensors of the checkpoint that training has changed, as they are stored."""
    stored_name, reader = job.model.stored_name, start.reader
    changed = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (stored := stored_name(name)) in reader:
            changed[stored] = parameter.detach().to(DTYPES[reader.dtypes[stored]])
    for name, linear in linears.items():
        for suffix, tensor in start.format.pack_weight(linear.quantized()).items():
            changed[f"{stored_name(name)}.{suffix}"] = tensor
    return changed


def _parts(
    job: Job, start: PackedFolder, changed: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Tensor | StreamedTensor]]]:
    """The output part by part: the start's tensors, but for those that changed."""
    prefixes = {
        job.model.stored_name(f"{job.model.block_name(index)}."): numbered("block", index)
        for index in range(job.model.num_blocks)
    }
    parts: dict[str, dict[str, Tensor | StreamedTensor]] = {
        part: {} for part in (OUTER, *prefixes.values())
    }
    for name in start.reader.names:
        if not name.endswith(PLACES):
            part = next((p for prefix, p in prefixes.items() if name.startswith(prefix)), OUTER)
            parts[part][name] = changed.get(name, streamed(start.reader, name))
    yield from parts.items()


def _share_moved(start: PackedFolder, name: str, linear: FakeQuantLinear) -> float:
    """The share of a linear's codes that training has changed; `name` as it is stored."""
    now = linear.quantized().codes.cpu()
    return (now != start.weight(name).codes).float().mean().item()


def _after_training(layer: LayerReport, moved: Mapping[str, float]) -> LayerReport:
    """A linear's report, with what the errors in it are of."""
    if layer.name not in moved:
        return layer
    change = f"errors before the training of the whole model, which moved {moved[layer.name]:.2%}"
    note = ", ".join(part for part in (layer.note, f"{change} of the codes") if part)
    return replace(layer, note=note)


def _report(result: TrainResult, data: PackedData) -> dict[str, Any]:
    """What compress.json says of the training; times are not in it."""
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "sequences": data.trained,
        "sequences_held_out": data.held_out,
        "seq_len": data.seq_len,
        "data_sha256": data.fingerprint(),
        "held_out_kl": [
            {"tokens": row["tokens"], "kl": row["evaluation"]["loss"]} for row in result.evaluations
        ],
    }
