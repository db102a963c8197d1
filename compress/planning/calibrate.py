"""`compress plan --calibrate`: this machine measured, and a model on it beside its prediction.

Measured without the model: copies, matrix products, and what the runtime reaches of either on
random models of other widths (`stand_in`).  In turn with those the model itself decodes, as in
`compress bench latency`, and that is compared with two predictions: from the device's numbers
alone, and with what was reached.  The model's own run goes into neither.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from compress.bench.bandwidth import copy_bandwidth
from compress.bench.latency import Run, Shape, percentile, run_once
from compress.core.device import default_device, fastest_dtype
from compress.core.errors import InputError, reason_of
from compress.core.files import write_text
from compress.core.progress import track
from compress.core.source import resolve_model
from compress.devices import DEVICES, Device, Efficiency, find_device, this_cpu
from compress.kernels.lowbit_matmul import LinearWeight
from compress.planning.case import Case
from compress.planning.question import Question
from compress.planning.report import rounded
from compress.planning.stand_in import Reached, StandIn, engine_on
from compress.roofline import Precision
from compress.runtime.loading import make_decoder
from compress.runtime.weights import DecoderWeights, load_weights

NEW_TOKENS = 64  # where none are asked for
ROUNDS = 5
PRODUCT = 2048  # rows and columns of the product that gives the matmul rate
PROMPT_SEED = 0
MOST_SPREAD = 1.5  # slow over fast steps: 1.07 to 1.26 with a core to spare, more than 2 without
Kind = tuple[int | None, int]  # bits of codes and their group, or None and 0: dense


def calibrate(question: Question, save: Path | None) -> dict[str, Any]:
    """Measure, compare, and save the device if asked; the report.

    Raises InputError for a model that the runtime does not serve, and for what cannot be measured.
    """
    _check(question, save)
    assert question.model is not None
    if question.threads is not None:
        torch.set_num_threads(question.threads)
    device = default_device()
    dtype_name = fastest_dtype(device)
    dtype = getattr(torch, dtype_name)
    weights = load_weights(resolve_model(question.model), 8 if question.head != "bf16" else None)
    kinds = [_kind(weights.layers[0].down), _kind(weights.head)]
    precision = _precision(weights, dtype)
    load = replace(question.load, new_tokens=question.new_tokens or NEW_TOKENS)
    if load.context + load.new_tokens > weights.max_context:
        raise InputError(
            f"{load.context} + {load.new_tokens} tokens are more than the model's context of "
            f"{weights.max_context}; lower --context or --new-tokens"
        )
    copy, matmul = copy_bandwidth(device=device), matmul_rate(dtype, device)
    stand_ins = {kind: StandIn(*kind, dtype, device, load.batch) for kind in dict.fromkeys(kinds)}
    guess = Case(question.model_shape, precision, _table_device(question, device), load)
    decoder = make_decoder(weights, device, dtype)
    shape = Shape(load.context, load.new_tokens, load.batch)
    runs = _runs(decoder, device, shape, list(stand_ins.values()))
    reached = {kind: stand_in.reached() for kind, stand_in in stand_ins.items()}
    measured_device = _device(guess, device, copy, matmul, [reached[kind] for kind in kinds])
    known = Case(question.model_shape, precision, measured_device, load)
    report = {
        "model": question.model,
        "device": measured_device.name,
        "dtype": dtype_name,
        "threads": torch.get_num_threads(),
        "kernels": decoder.description,
        "copy_bytes_per_s": round(copy),
        "matmul_flops_per_s": round(matmul),
        "layers": guess.shape.layers,
        "reached": {
            _in_words(kind, dtype_name): {
                "bandwidth": round(found.bandwidth),
                "matmul": round(found.matmul),
                "overhead_s": rounded(found.overhead(guess.shape.layers)),
            }
            for kind, found in reached.items()
        },
        "weights": _in_words(kinds[0], dtype_name),
        "head": _in_words(kinds[1], dtype_name),
        "batch": load.batch,
        "context": load.context,
        "new_tokens": load.new_tokens,
        "efficiency": asdict(measured_device.efficiency),
        "compared": compared(runs, guess, known),
        "step_spread": rounded(spread(runs)),
        "notes": [f"before calibration: {guess.device.name}, {guess.device.source}"],
    }
    if report["step_spread"] > MOST_SPREAD:
        report["notes"].append(
            f"the model's steps differ by a factor of {report['step_spread']:.1f}: something else "
            "ran here; repeat it on a quiet machine, or with fewer --threads"
        )
    if save is not None:
        _save(save, measured_device)
        report["saved"] = str(save)
    return report


def _check(question: Question, save: Path | None) -> None:
    if question.model is None:
        raise InputError("--calibrate measures a real MODEL; --shape has no weights")
    for flag, value in (("--weights", question.weights), ("--draft", question.draft)):
        if value is not None:
            raise InputError(f"{flag} does not go with --calibrate, which takes MODEL as stored")
    if question.kv is not None or question.tensor_parallel != 1:
        raise InputError("--kv and --tensor-parallel do not go with --calibrate")
    if question.head not in ("bf16", "int8"):
        raise InputError("--calibrate runs a --head as stored, or rounded to int8")
    if save is not None and (save.suffix != ".json" or not save.absolute().parent.is_dir()):
        raise InputError(f"--save-device '{save}': give a .json file in a folder that exists")
    _ = question.model_shape  # refused before anything is measured


def _table_device(question: Question, device: torch.device) -> Device:
    """What is known without measuring: --device, the table's GPU of this name, or a guess."""
    if question.device is not None:
        return find_device(question.device)
    if device.type == "cpu":
        return this_cpu()
    name = torch.cuda.get_device_name(device).lower()
    found = next((one for one in DEVICES.values() if one.name in name), None)
    if found is None:
        raise InputError(f"GPU '{name}' is not in the table; give its numbers as --device FILE")
    return found


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product of PyTorch's, the best of some."""
    a = torch.randn(PRODUCT, PRODUCT, device=device).to(dtype)
    b = torch.randn(PRODUCT, PRODUCT, device=device).to(dtype)
    best = float("inf")
    for _ in range(2 + ROUNDS):
        _wait(device)
        started = time.perf_counter()
        torch.matmul(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * PRODUCT**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(
    guess: Case, device: torch.device, copy: float, matmul: float, reached: list[Reached]
) -> Device:
    """This machine in numbers: `reached` on the kind of the layers' linears, and of the head.

    One share of the bandwidth has to do for both: the one at which a step takes as long.
    """
    linears, head = reached
    moved = guess.decode_work.bytes
    in_layers = moved["attention_projections"] + moved["mlp"]
    spent = in_layers / linears.bandwidth + (guess.decode_work.total_bytes - in_layers) / (
        head.bandwidth
    )
    efficiency = Efficiency(
        bandwidth=rounded(guess.decode_work.total_bytes / spent / copy),
        matmul=rounded(linears.matmul / matmul),
        overhead=rounded(linears.overhead(guess.shape.layers)),
    )
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    else:
        name = f"{platform.machine()}, {torch.get_num_threads()} threads"
        memory = psutil.virtual_memory().total
    return Device(
        name=name,
        memory=memory,
        bandwidth=round(copy),
        rates={"bf16": round(matmul)},
        efficiency=efficiency,
        source=f"compress plan --calibrate, for models like {guess.shape.name} "
        f"({guess.precision.weights:g} bits a weight, {guess.shape.layers} layers, batch "
        f"{guess.load.batch})",
    )


def _kind(weight: LinearWeight) -> Kind:
    return (None, 0) if weight.codes is None else (weight.bits, weight.group_size)


def _in_words(kind: Kind, dtype: str) -> str:
    return dtype if kind[0] is None else f"int{kind[0]}-g{kind[1]}"


def _precision(weights: DecoderWeights, dtype: torch.dtype) -> Precision:
    """Bits a number as the runtime holds it: 16-bit scales, and shifts where there are some."""

    def bits(weight: LinearWeight) -> float:
        if weight.codes is None:
            return 8.0 * dtype.itemsize
        on_grid = 1 if weight.shift is None else 2
        return weight.bits + 16.0 * on_grid / weight.group_size

    dense, head = 8.0 * dtype.itemsize, bits(weights.head)
    # the table of embeddings is not read by a step, but for a row: what counts is the head
    return Precision(bits(weights.layers[0].down), dense, head, dense)


def _runs(decoder: Any, device: torch.device, shape: Shape, stand_ins: list[StandIn]) -> list[Run]:
    """The model's own decode after a warm-up, in turn with the random models."""
    engine = engine_on(decoder, device, shape.batch, shape.cached_tokens)
    generator = torch.Generator().manual_seed(PROMPT_SEED)
    prompts = [
        torch.randint(decoder.vocab_size, (shape.prompt_tokens,), generator=generator).tolist()
        for _ in range(shape.batch)
    ]
    run_once(engine, prompts, replace(shape, new_tokens=min(8, shape.new_tokens)))
    runs = []
    for _ in track(range(ROUNDS), "Measuring"):
        for stand_in in stand_ins:
            stand_in.run()
        runs.append(run_once(engine, prompts, shape))
    return runs


def compared(runs: list[Run], guess: Case, known: Case) -> dict[str, dict[str, float]]:
    """Measured and predicted seconds; an error is predicted over measured, less 1.

    A decode step is predicted at the context that it has on average, S + T / 2.
    """
    step = statistics.median(seconds for run in runs for seconds in run.steps)
    first = statistics.median(run.prefill for run in runs)

    def predicted(case: Case) -> dict[str, float]:
        load = case.load
        halfway = replace(case, load=replace(load, context=load.context + load.new_tokens // 2))
        return {"decode step": halfway.token, "prefill": case.first_token}

    rows: dict[str, dict[str, float]] = {}
    for name, seconds in {"decode step": step, "prefill": first}.items():
        rows[name] = {"measured_s": rounded(seconds)}
        for which, case in {"uncalibrated": guess, "calibrated": known}.items():
            value = predicted(case)[name]
            rows[name][f"{which}_s"] = rounded(value)
            rows[name][f"{which}_error"] = round(value / seconds - 1, 4)
    return rows


def spread(runs: list[Run]) -> float:
    """The 90th percentile of the steps' seconds over the 10th."""
    steps = [seconds for run in runs for seconds in run.steps]
    return percentile(steps, 90) / percentile(steps, 10)


def _save(path: Path, device: Device) -> None:
    values = asdict(device)
    if values["link"] is None:
        del values["link"]
    try:
        write_text(path, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write '{path}': {reason_of(error)}") from None
