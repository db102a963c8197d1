"""A plan as one dictionary, for scripts and for the tables that people read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compress import roofline
from compress.planning.case import Case
from compress.roofline import ModelShape, Timing, Work

# Seconds are kept to 6 digits, rates and intensities likewise.
DIGITS = 6


def rounded(value: float) -> float:
    """To DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


def plan_report(case: Case, weights: str, kv: str, notes: Iterable[str] = ()) -> dict[str, Any]:
    """Everything about one case.  `weights` and `kv` are the precisions' names."""
    shape, precision, load = case.shape, case.precision, case.load
    count = vars(roofline.parameters(shape))
    stored = roofline.weight_bytes(shape, precision)
    context = load.context + load.new_tokens
    report: dict[str, Any] = {
        "model": shape.name,
        "device": _device(case),
        "weights": weights,
        "bits_per_weight": precision.weights,
        "kv": kv,
        "batch": load.batch,
        "context": load.context,
        "new_tokens": load.new_tokens,
        "tensor_parallel": load.devices,
        "parameters": sum(count.values()),
        "weight_bytes": sum(stored.values()),
        "parts": {part: {"parameters": count[part], "bytes": stored[part]} for part in count},
        "attention": attention_in_words(shape),
        "kv_bytes_per_token": roofline.kv_bytes_per_token(shape, precision),
        "kv_bytes_per_sequence": roofline.kv_bytes(shape, precision, context),
        "prefill": _step(case.prefill_work, case.prefill_time),
        "decode": _step(case.decode_work, case.decode_time),
        **measures(case),
    }
    if case.draft is not None:
        draft, cost = case.draft, case.draft_cost
        args = (draft.acceptance, draft.length, cost)
        report["draft"] = {
            "model": draft.shape.name if draft.shape else None,
            "tokens": draft.length,
            "acceptance": draft.acceptance,
            "cost": rounded(cost),
            "bytes": case.draft_memory,
            "expected_tokens": rounded(roofline.expected_tokens(*args[:2])),
            "speed_up": rounded(case.decode_time.seconds / case.token),
            "speed_up_limited_by_memory": rounded(roofline.speculative_speedup(*args)),
            "speed_up_linear_approximation": rounded(roofline.linear_speculative_speedup(*args)),
        }
    report["notes"] = [*notes, *_notes(case)]
    return report


def measures(case: Case) -> dict[str, Any]:
    """What changes from one row of a sweep to the next."""
    memory = case.memory
    return {
        "time_to_first_token_s": rounded(case.first_token),
        "seconds_per_token": rounded(case.token),
        "tokens_per_s": rounded(case.throughput),
        "answer_s": rounded(case.answer),
        "decode_intensity": rounded(case.decode_work.intensity),
        "decode_limit": case.decode_time.limit,
        "memory": {"weights": memory.weights, "kv": memory.kv, "draft": case.draft_memory},
        "memory_bytes": case.held,
        "fits": case.fits,
        "largest_batch": case.largest_batch,
    }


def sweep_report(cases: dict[Any, Case]) -> list[dict[str, Any]]:
    """A row for each value of what is swept."""
    return [{"value": value, **measures(case)} for value, case in cases.items()]


def attention_in_words(shape: ModelShape) -> str:
    """How keys and values are kept."""
    heads, kv = shape.heads, shape.kv_heads
    if shape.mla:
        said = f"MLA, {shape.mla.kv_rank} + {shape.mla.rope_dim} numbers a token and layer"
    elif heads == kv:
        said = f"MHA, {heads} heads of {shape.head_dim}"
    else:
        kind = "MQA" if kv == 1 else "GQA"
        said = f"{kind}, {heads} heads of {shape.head_dim} on {kv} KV heads ({heads / kv:g}x less)"
    windowed = [window for window in shape.windows if window is not None]
    if windowed:
        widths = " and ".join(f"{window:,}" for window in sorted(set(windowed)))
        said += f"; {len(windowed)} of {shape.layers} layers see {widths} tokens"
    if shape.kv_share > 1:
        said += f"; {shape.kv_share} layers share a cache"
    return said


def _device(case: Case) -> dict[str, Any]:
    device, compute = case.device, case.precision.compute
    share = device.efficiency
    return {
        "name": device.name,
        "memory_bytes": device.memory,
        "bandwidth_bytes_per_s": device.bandwidth,
        "compute": compute if compute in device.rates else "bf16",
        "flops_per_s": device.rate(compute),
        "intensity": rounded(roofline.device_intensity(device, compute)),
        "efficiency": vars(share),
        "source": device.source,
    }


def _step(work: Work, timing: Timing) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {}
    for part, spent in timing.parts.items():
        flops, moved = work.flops.get(part, 0.0), work.bytes.get(part, 0.0)
        parts[part] = {
            "flops": flops,
            "bytes": moved,
            "intensity": rounded(flops / moved) if moved else 0.0,
            "seconds": rounded(spent.seconds),
            "limit": spent.limit,
        }
    return {
        "flops": work.total_flops,
        "bytes": work.total_bytes,
        "intensity": rounded(work.intensity),
        "seconds": rounded(timing.seconds),
        "limit": timing.limit,
        "parts": parts,
    }


def _notes(case: Case) -> list[str]:
    """What a reader should know before believing the numbers."""
    shape, device, load, notes = case.shape, case.device, case.load, []
    last = load.context + load.new_tokens
    if last > shape.max_context:
        notes.append(f"{last:,} tokens are more than the model's context of {shape.max_context:,}")
    if case.precision.compute not in device.rates:
        notes.append(
            f"'{device.name}' multiplies no {case.precision.compute}; its bf16 rate is used"
        )
    share = device.efficiency
    if (share.bandwidth, share.matmul, share.overhead) == (1.0, 1.0, 0.0):
        notes.append(
            "times are what the device's peaks allow; kernels reach less, --calibrate says"
        )
    if case.draft is not None and case.draft.shape is None:
        notes.append("the draft's memory is not counted: only its cost is given")
    return notes
