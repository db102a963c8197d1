"""The plan of a model as one HTML page with sliders, that needs no network and nothing beside it.

The page's formulas (formulas.js) are those of compress/roofline.py in JavaScript, on the same
shapes, precisions and devices, which lie in the page as JSON.  What a user sees of a setting is

    latency of a token   time_of(decode at context S); with drafts of k tokens, (time of a pass
                         over k + 1 tokens + k r times that of a step) / expected_tokens(a, k)
    throughput           B / latency
    first token          time_of(prefill of B prompts of S tokens)
    whole answer         first token + T latency at context S + T // 2
    memory               weights and KV of B sequences of S + T tokens, the draft model's too

On several devices all this is of one of them, with its share of the model (`shard`), and a step
waits for the link (`link_bytes`).

A pass over k + 1 tokens is what makes drafts worth less in large batches, which the closed form of
`speculative_speedup` takes as one step; the two agree as long as memory is the limit.
"""

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from compress.core.files import write_text
from compress.devices import COMPUTE, DEVICES, this_cpu
from compress.page_template import page_template
from compress.roofline import Device, ModelShape, Precision, bits, parameters, precision

SCRIPTS = ("formulas.js", "draw.js", "page.js")
WEIGHTS = ("bf16", "fp8", "w8a8", "int8", "int4", "int3", "int2")
KV = ("bf16", "fp8", "int8", "int4")
RANKS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # of MLA's latents
WINDOWS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
TOGETHER = (1, 2, 4, 8, 16, 32)  # devices
MOST_SHARING = 8  # layers with one cache


@dataclass(frozen=True)
class Start:
    """Where the sliders begin: B, S and T, on so many devices together; k drafted tokens, their
    acceptance a, and the time r of a draft's step in steps of the model.

    draft_model  the shape and precision of the draft, whose memory then counts
    """

    batch: int
    context: int
    new_tokens: int
    devices: int = 1
    draft_length: int = 0
    acceptance: float = 0.7
    draft_cost: float = 0.1
    draft_model: tuple[ModelShape, Precision] | None = None


def write_page(
    path: Path,
    shape: ModelShape,
    precision: Precision,
    device: Device,
    *,
    batch: int,
    context: int,
    new_tokens: int,
    devices: int = 1,
    draft_length: int = 0,
    acceptance: float = Start.acceptance,
    draft_cost: float = Start.draft_cost,
    draft_model: tuple[ModelShape, Precision] | None = None,
) -> None:
    """Write the page to `path`, its controls set to what is given (see Start).

    `device` joins the table of devices, or replaces that of its name there.
    """
    load = (batch, context, new_tokens, devices)
    start = Start(*load, draft_length, acceptance, draft_cost, draft_model)
    write_text(path, page_html(shape, precision, device, start))


def page_html(shape: ModelShape, precision: Precision, device: Device, start: Start) -> str:
    """The page as text: of its arguments, and of this processor, which is among the devices."""
    here = files("compress.planning")
    script = "\n".join(here.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page_template("compress.planning", "page.html.jinja").render(
        shape=shape,
        total=parameters(shape).total,
        method=_as_it_is(shape),
        draft_name=start.draft_model[0].name if start.draft_model else None,
        rates=COMPUTE,
        style=here.joinpath("page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        data=_for_script(_facts(shape, precision, device, start)),
    )


def _for_script(value: Any) -> str:
    """JSON that ends no script element, whatever names it holds."""
    text = json.dumps(value, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _facts(shape: ModelShape, chosen: Precision, device: Device, start: Start) -> dict[str, Any]:
    """What the page's script reads: the names and fields are those of the dataclasses."""
    weights = {name: precision(name) for name in WEIGHTS}
    kv = {name: bits(name) for name in KV}
    weights_name = next(
        (
            n
            for n, p in weights.items()
            if (p.weights, p.compute) == (chosen.weights, chosen.compute)
        ),
        f"{chosen.weights:g} bits",
    )
    kv_name = next((n for n, b in kv.items() if b == chosen.kv), f"{chosen.kv:g} bits")
    weights.setdefault(weights_name, chosen)
    kv.setdefault(kv_name, chosen.kv)
    devices = [d for d in (*DEVICES.values(), this_cpu()) if d.name != device.name]
    return {
        "shape": asdict(shape),
        "precision": asdict(chosen),
        "weights": {
            name: {"weights": p.weights, "compute": p.compute}
            for name, p in sorted(weights.items(), key=lambda item: -item[1].weights)
        },
        "kv": dict(sorted(kv.items(), key=lambda item: -item[1])),
        "drafter": _drafter(start),
        "methods": _methods(shape),
        "devices": [_device(d) for d in (device, *devices)],
        "devices_together": sorted({*TOGETHER, start.devices}),
        "rates": COMPUTE,
        "start": {
            "batch": start.batch,
            "context": start.context,
            "tokens": start.new_tokens,
            "devices": start.devices,
            "draft": start.draft_length,
            "acceptance": start.acceptance,
            "cost": start.draft_cost,
            "weights": weights_name,
            "kv": kv_name,
            "device": 0,
        },
    }


def _drafter(start: Start) -> dict[str, Any] | None:
    if start.draft_model is None:
        return None
    shape, bits_of = start.draft_model
    return {"shape": asdict(shape), "precision": asdict(bits_of)}


def _device(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "memory": device.memory,
        "bandwidth": device.bandwidth,
        "rates": dict(device.rates),
        "link": device.link,
        "efficiency": asdict(device.efficiency),
        "source": device.source,
    }


def _methods(shape: ModelShape) -> dict[str, dict[str, Any]]:
    """Ways to keep keys and values: the control beside each, its stops, and where it begins."""
    changed = "The projections' parameters follow."

    def method(
        title: str, hint: str, label: str = "", unit: str = "", stops: Any = (), start: int = 0
    ) -> dict[str, Any]:
        stops = list(stops)
        begin = min(stops, key=lambda stop: abs(stop - start)) if stops else None
        known = {"title": title, "hint": hint, "label": label, "unit": unit}
        return known | {"stops": stops, "start": begin}

    divisors = [n for n in range(1, shape.heads + 1) if shape.heads % n == 0]
    windows = [n for n in WINDOWS if n <= max(shape.max_context, WINDOWS[0])]
    return {
        "model": method("as it is", f"{_as_it_is(shape)}: what the model has."),
        "mha": method("MHA", f"{shape.heads} KV heads, one for each query head. {changed}"),
        "gqa": method(
            "GQA",
            f"Query heads share KV heads; with one it is MQA. {changed}",
            "KV heads K", "KV heads", divisors, max(1, shape.heads // 8),
        ),
        "mla": method(
            "MLA",
            f"One latent a token and layer, and a rotary part beside it. {changed}",
            "Rank of the latent", "numbers", RANKS, 512,
        ),
        "window": method(
            "window", "Every layer sees no more than the window.",
            "Window", "tokens", windows, 1024,
        ),
        "shared": method(
            "shared", "Neighbouring layers share one cache, and its projections.",
            "Layers that share", "layers", range(1, min(MOST_SHARING, shape.layers) + 1), 2,
        ),
    }  # fmt: skip


def _as_it_is(shape: ModelShape) -> str:
    if shape.mla:
        name = f"MLA {shape.mla.kv_rank}+{shape.mla.rope_dim}"
    elif shape.kv_heads == shape.heads:
        name = "MHA"
    else:
        name = "MQA" if shape.kv_heads == 1 else f"GQA, {shape.kv_heads} KV heads"
    windowed = sum(window is not None for window in shape.windows)
    if windowed:
        name += f", {windowed} of {shape.layers} layers with a window"
    return name + (f", {shape.kv_share} layers share a cache" if shape.kv_share > 1 else "")
