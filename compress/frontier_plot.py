"""The frontier of size against predicted loss, as a picture and as geometry for the report."""

import importlib.util
import math
from pathlib import Path
from typing import Any

from compress.core.files import replacing

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 760, 300, 60, 40, 12


def write_plot(path: Path, allocation: dict[str, Any]) -> None:
    """Draw `allocation` of compress.json as PNG; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    frontier, uniform = allocation["frontier"], allocation["uniform"]
    axes.plot(*_columns(frontier), color="#4477aa", label="frontier of mixed grids")
    axes.plot(*_columns(uniform), "s", color="#ccbb44", label="one grid for all")
    for point in uniform:
        axes.annotate(point["choice"], (point["bits"], point["predicted_kl"]))
    axes.plot(*_columns([allocation]), "o", color="#ee6677", label="taken")
    axes.set(yscale="log", xlabel="bits a weight, scales and zero points included")
    axes.set(ylabel="predicted KL, nats a token", title="Size against predicted loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def chart_of(allocation: dict[str, Any]) -> dict[str, Any]:
    """Geometry of the same chart for the report: places in a box of WIDTH x HEIGHT."""
    frontier, uniform = allocation["frontier"], allocation["uniform"]
    points = [*frontier, *uniform, allocation]
    losses = [point["predicted_kl"] for point in points if point["predicted_kl"] > 0] or [1.0]
    low, high = math.floor(math.log10(min(losses))), math.ceil(math.log10(max(losses)))
    high = max(high, low + 1)
    first = math.floor(min(point["bits"] for point in points))
    last = math.ceil(max(point["bits"] for point in points))

    def x_of(bits: float) -> float:
        return round(LEFT + (bits - first) / (last - first) * (WIDTH - LEFT - EDGE), 1)

    def y_of(loss: float) -> float:
        share = (math.log10(max(loss, 10**low)) - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - EDGE), 1)

    def placed(point: dict[str, Any]) -> dict[str, Any]:
        return point | {"x": x_of(point["bits"]), "y": y_of(point["predicted_kl"])}

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "floor": HEIGHT - BOTTOM,
        "line": " ".join(f"{p['x']},{p['y']}" for p in map(placed, frontier)),
        "uniform": [placed(point) for point in uniform],
        "taken": placed(allocation),
        "bits": [(bits, x_of(bits)) for bits in range(first, last + 1)],
        "losses": [(10.0**power, y_of(10.0**power)) for power in range(low, high + 1)],
    }


def _columns(points: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [point["bits"] for point in points], [point["predicted_kl"] for point in points]
