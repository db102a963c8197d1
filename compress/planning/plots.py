"""Plots of a plan as one PNG: throughput, latency and memory by batch, and the roofline."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.files import replacing
from compress.planning.case import Case
from compress.planning.tables import digits
from compress.roofline import device_intensity

MOST_DOUBLINGS = 10  # up to batch 1,024
COLOURS = {"weights": "#4477aa", "kv": "#ee6677", "draft": "#ccbb44"}


def write_plots(path: Path, case: Case, title: str) -> None:
    """Write the plots to `path`, whole or not at all.

    Raises InputError without matplotlib, and OSError where nothing can be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib; run: pip install 'compress-llm[plots]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    speed, memory, roofline = figure.subplots(1, 3)
    cases = [replace(case, load=replace(case.load, batch=batch)) for batch in batches(case)]
    _plot_speed(speed, cases)
    _plot_memory(memory, cases)
    _plot_roofline(roofline, case)
    figure.suptitle(f"{title} on {case.device.name}, context {case.load.context:,}")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def batches(case: Case) -> list[int]:
    """Doublings from 1 to past the largest batch that fits, and the one that was asked about."""
    last = max(case.largest_batch, case.load.batch)
    found = {1, case.load.batch}
    for power in range(1, MOST_DOUBLINGS + 1):
        found.add(1 << power)
        if 1 << power > last:
            break
    return sorted(found)


def _plot_speed(axes: Any, cases: list[Case]) -> None:
    sizes = [case.load.batch for case in cases]
    axes.plot(sizes, [case.throughput for case in cases], "o-", color="#4477aa")
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="tokens/s, all sequences")
    axes.set_title("Throughput (blue) and latency (red)")
    latency = axes.twinx()
    latency.plot(sizes, [1000 * case.token for case in cases], "s--", color="#ee6677")
    latency.set(ylabel="ms a token", ylim=(0, None))
    largest = cases[0].largest_batch
    if largest:
        axes.axvline(largest, color="grey", linestyle=":")


def _plot_memory(axes: Any, cases: list[Case]) -> None:
    places = range(len(cases))
    below = [0.0] * len(cases)
    heights = {
        "weights": [case.memory.weights / 1e9 for case in cases],
        "kv": [case.memory.kv / 1e9 for case in cases],
        "draft": [case.draft_memory / 1e9 for case in cases],
    }
    for name, values in heights.items():
        if any(values):
            label = "KV" if name == "kv" else name
            axes.bar(places, values, bottom=below, label=label, color=COLOURS[name])
            below = [a + b for a, b in zip(below, values, strict=True)]
    axes.axhline(cases[0].device.memory / 1e9, color="black", linestyle="--", label="capacity")
    axes.set_xticks(list(places), [str(case.load.batch) for case in cases], rotation=60)
    axes.set(xlabel="batch", ylabel="GB", title="Memory of a device")
    axes.legend()


def _plot_roofline(axes: Any, case: Case) -> None:
    device, compute = case.device, case.precision.compute
    peak, turn = device.rate(compute), device_intensity(device, compute)
    points = {
        "prefill": (case.prefill_work, case.prefill_time),
        "decode": (case.decode_work, case.decode_time),
    }
    intensities = [work.intensity for work, _ in points.values()]
    low, high = min([0.1, *intensities]) / 2, max([10 * turn, *intensities]) * 2
    axes.plot(
        [low, turn, high], [low * device.bandwidth / 1e12, peak / 1e12, peak / 1e12], color="black"
    )
    for name, (work, timing) in points.items():
        reached = work.total_flops / timing.seconds / 1e12
        axes.plot(
            work.intensity, reached, "o", label=f"{name}: {digits(work.intensity)} FLOP a byte"
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s", title="Roofline")
    axes.legend()
