"""Does speculation draw what the model alone would draw?  Chi-square against exact distributions.

    python benchmarks/speculative_exactness.py --model SMOLLM2 --draft SMOLLM2_W4 \\
        --out benchmarks/results/speculative-exactness.json

Three parts, 100,000 samples each, by several seeds where the model is tiny:

- three speculated tokens of a model with 12 tokens whose logits depend on the whole output: all
  1,728 outcomes are enumerated, with transformers' processors, under every setting, and compared
  with what the engine draws with guesses and with samples of another distribution;
- the same under wrong rules of acceptance, which must all be rejected;
- the first speculated token of a real model, with a quantized one as its draft, on the 30
  likeliest tokens and the rest; the exact distribution is by transformers, in float32.

Cells are pooled to an expectation of 5; alpha is 1e-4.  Results are kept as they come: a second
call goes on where the first was broken off.  Writes a table beside them, as .md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each worker

import torch
from exactness.cases import every
from exactness.chi_square import ALPHA, compare
from exactness.distribution import Case, joint, processed
from exactness.proposers import Draws, FixedGuesses, Peeking, draft_model
from exactness.real_model import draw_second_tokens, logits_after, pooled
from exactness.sampling import draw_outcomes
from exactness.tiny_model import FIRST, PROMPT, TinyModel
from exactness.wrong import RULES, wrong
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.core.source import resolve_model
from compress.runtime.loading import load_decoder

VOCAB = 12
TEXT = "My favourite animal is the"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature 0.7, top_p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "top_k 40, min_p 0.02, repetition_penalty 1.1": {
        "temperature": 1.3,
        "top_k": 40,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
    },
}
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a float checkpoint; without it no real model is asked")
    parser.add_argument("--draft", help="a checkpoint with the same vocabulary")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.draft):
        parser.error("give both --model and --draft, or neither")
    results: dict[str, Result] = {}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text("utf-8"))
    work = {key: task for key, task in tasks(arguments) if key not in results}
    print(f"{len(results)} done before, {len(work)} to do", flush=True)
    began = time.monotonic()
    with ProcessPoolExecutor(arguments.workers) as pool:
        futures = {pool.submit(task): key for key, task in work.items()}
        for done, future in enumerate(as_completed(futures), 1):
            key = futures[future]
            results[key] = future.result()
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            left = (time.monotonic() - began) / done * (len(futures) - done)
            print(f"{key}: p = {results[key]['p']:.3g}; {left / 60:.0f} min left", flush=True)
    table = report(results, [key for key, _ in tasks(arguments)])
    arguments.out.with_suffix(".md").write_text(table, "utf-8")
    print(table)


def tasks(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Result]]]:
    """A key "part | what | how | samples | seed" for each test, and the test."""
    samples, seeds = arguments.samples, range(1, arguments.seeds + 1)
    for case in every(VOCAB):
        for how in ("guesses", "samples", "draft model"):
            for seed in seeds:
                task = partial(examine, case.name, how, samples, seed)
                yield f"joint | {case.name} | {how} | {samples} | {seed}", task
    for seed in seeds:
        task = partial(examine, "plain", "samples, lengths from the last draft", samples, seed)
        yield f"joint | plain | samples, lengths from the last draft | {samples} | {seed}", task
    for rule in RULES:
        for seed in seeds:
            task = partial(examine_wrong, rule, samples, seed)
            yield f"wrong | {rule} | samples | {samples} | {seed}", task
    if arguments.model:
        for name in SETTINGS:
            task = partial(examine_real, arguments.model, arguments.draft, name, samples, 1)
            yield f"real | {name} | samples | {samples} | 1", task


def examine(name: str, how: str, samples: int, seed: int) -> Result:
    """Three speculated tokens under a setting."""
    case = next(case for case in every(VOCAB) if case.name == name)
    model = TinyModel(VOCAB, seed)
    proposer = {
        "guesses": FixedGuesses,
        "samples": partial(Draws, samples=True),
        "samples, lengths from the last draft": partial(Peeking, samples=True),
        "draft model": draft_model,
    }[how](model, seed)
    exact = joint(model.logits_of, PROMPT, FIRST, case)
    counts = draw_outcomes(model, proposer, case, samples, seed)
    return asdict(compare(counts, exact)) | {"outcomes": len(exact)}


def examine_wrong(rule: str, samples: int, seed: int) -> Result:
    """Three speculated tokens under a wrong rule."""
    with wrong(rule, VOCAB, seed) as (model, proposer):
        exact = joint(model.logits_of, PROMPT, FIRST, Case("plain"))
        counts = draw_outcomes(model, proposer, Case("plain"), samples, seed)
    return asdict(compare(counts, exact)) | {"outcomes": len(exact)}


def examine_real(model: str, draft: str, name: str, samples: int, seed: int) -> Result:
    """The first speculated token of a real model."""
    prompt = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    peer: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        first = int(peer(torch.tensor([prompt])).logits[0, -1].argmax())
        inputs = torch.tensor([[*prompt, first]])
        scores = peer(inputs).logits[:, -1]
    del peer
    p = processed(inputs, scores, len(prompt), Case(name, SETTINGS[name]))
    p = p[0].double().softmax(-1).numpy()
    proposing = load_decoder(resolve_model(draft), cpu, "float32")
    q = torch.from_numpy(logits_after(proposing, inputs[0].tolist()))
    q = q.double().softmax(-1).numpy()
    del proposing
    decoder = load_decoder(resolve_model(model), cpu, "float32")
    counts, speculator = draw_second_tokens(
        decoder, prompt, first, SETTINGS[name], q, samples, seed
    )
    verdict = asdict(compare(*pooled(counts, p)))
    return verdict | {"acceptance": speculator.accepted / speculator.drafted}


def report(results: dict[str, Result], keys: list[str]) -> str:
    """Tables in Markdown."""
    rows: dict[tuple[str, str, str], list[Result]] = {}
    for key in keys:
        part, what, how, *_ = key.split(" | ")
        rows.setdefault((part, what, how), []).append(results[key])
    lines = ["# Does speculation draw what the model alone would draw?", ""]
    titles = {
        "joint": f"## Three speculated tokens of {VOCAB}, against the enumerated distribution",
        "wrong": "## The same under wrong rules, which must be rejected",
        "real": f'## The first speculated token of the real model, after "{TEXT} ..."',
    }
    shown = set()
    for (part, what, how), found in rows.items():
        if part not in shown:
            shown.add(part)
            lines += ["", titles[part], "", "| | proposals | samples | cells | p, by seed | |"]
            lines.append("|---|---|---|---|---|---|")
        rejected = [result["p"] < ALPHA for result in found]
        right = all(rejected) if part == "wrong" else not any(rejected)
        p = ", ".join(f"{result['p']:.2g}" for result in found)
        accepted = found[0].get("acceptance")
        note = f"{what}, {accepted:.0%} accepted" if accepted is not None else what
        samples = f"{len(found)} x {found[0]['samples']:,}"
        cells = found[0]["cells"]
        lines.append(f"| {note} | {how} | {samples} | {cells} | {p} | {'' if right else 'WRONG'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
