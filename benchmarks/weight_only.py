"""Every weight-only method at 2, 3, 4 and 8 bits: quality against the original, and time.

    python benchmarks/weight_only.py --model smollm2 --calibration c4.txt \\
        --text wikitext2_valid.txt --work build/weight-only --results benchmarks/results/FILE.md

Each variant (method x bits x calibration) is quantized by `run_recipe`, and scored on the text
with `compress.evaluate`, against the original's logits, which are computed once.  Calibration
tokens are drawn once per source and shared.  A finished variant leaves NAME.json and NAME.npz in
`--work` and is not run again, so the script can be stopped and started; its checkpoint is removed
unless `--keep`.  `--only REGEX` picks variants by name.  `--also NAME=FOLDER` scores a checkpoint
made elsewhere (a peer's) beside those of 4 bits, NAME=FOLDER:BITS beside those of other bits.

Recovered is (ppl_rtn - ppl) / (ppl_rtn - ppl_original) at the same bits.  All intervals are 95%
bootstraps over windows, paired: each resample takes the same windows of every variant.  Without
`--text` the text is sampled from the model (seed 1; `self` calibration uses seed 0), for models
that come without a tokenizer.  Do not time anything beside it.
"""

import argparse
import json
import re
import shutil
import sys
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from compress.calibration import calibration_tokens
from compress.core.device import default_device
from compress.core.errors import InputError
from compress.core.source import ModelSource, read_config, resolve_model
from compress.evaluate import TextEvalConfig, cut_windows, score_logits, summarize
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.recipe import CalibrationConfig, build_recipe

METHODS = ("awq", "gptq", "awq+gptq")
RESAMPLES = 10_000


def main() -> None:
    arguments = parse()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    source = resolve_model(arguments.model)
    sources = {"self": "self"}
    if arguments.calibration:
        sources = {arguments.calibration.stem: str(arguments.calibration), **sources}
    runs: list[dict[str, Any]] = []
    scorer = Scorer(source, arguments)
    for bits in arguments.bits:
        named = {f"rtn w{bits}": {"method": "rtn"}}
        for method, (label, text) in product(METHODS, sources.items()):
            if label not in arguments.calibrations:
                continue
            settings = {"method": method, "calibration": partial(tokens_of, text, label, arguments)}
            named[f"{method} w{bits} {label}"] = settings
        for name, settings in named.items():
            if arguments.only is None or re.search(arguments.only, name):
                runs.append({"name": name, "bits": bits, **variant(name, bits, settings, scorer)})
    for given in arguments.also:
        name, _, rest = given.partition("=")
        folder, _, bits = rest.partition(":")
        scores = scorer.scores(name, Path(folder))
        runs.append({"name": name, "bits": int(bits or 4), "scores": scores, "seconds": None})
    table = to_markdown(runs, scorer.config)
    print(table)
    if arguments.results:
        arguments.results.write_text(table + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", type=Path, help="a text file; `self` is always there too")
    parser.add_argument("--calibrations", nargs="+", default=["c4", "self"], help="which to run")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2, 8])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--set", nargs="*", default=[], help="settings of gptq, as key=value")
    parser.add_argument("--work", type=Path, default=Path("build/weight-only"))
    parser.add_argument("--only", help="a regular expression for names of variants")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=FOLDER[:BITS]")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--results", type=Path, help="write the table to this file too")
    return parser.parse_args()


def tokens_of(text: str, label: str, arguments: argparse.Namespace, seed: int = 0) -> Path:
    """A file of calibration tokens, drawn once."""
    path = arguments.work / f"tokens-{label}-{seed}.safetensors"
    if not path.exists():
        source = resolve_model(arguments.model)
        config = CalibrationConfig(text, arguments.samples, arguments.seq_len, seed)
        vocab = read_config(source.folder)["vocab_size"]
        save_file({"input_ids": calibration_tokens(config, source, vocab, default_device())}, path)
    return path


def variant(name: str, bits: int, settings: dict[str, Any], scorer: "Scorer") -> dict[str, Any]:
    """Quantize and score one variant, or read what an earlier run left."""
    arguments = scorer.arguments
    folder = arguments.work / name.replace(" ", "-")
    kept = folder.with_name(folder.name + ".json")
    if not kept.exists():
        calibration = {"samples": arguments.samples, "seq_len": arguments.seq_len}
        stage = {"method": settings["method"], "bits": bits, "group_size": arguments.group_size}
        if "calibration" in settings:
            calibration["source"] = str(settings["calibration"]())
        if "gptq" in settings["method"]:
            stage |= dict(pair.split("=", 1) for pair in arguments.set)
        recipe = {"model": str(scorer.source.folder), "out": str(folder), "stages": [stage]}
        report = run_recipe(build_recipe({**recipe, "calibration": calibration}), overwrite=True)
        scorer.scores(name, folder)
        kept.write_text(json.dumps({"seconds": report["seconds"]}), encoding="utf-8")
        if not arguments.keep:
            shutil.rmtree(folder)
    print(f"{name}: done", file=sys.stderr)
    seconds = json.loads(kept.read_text(encoding="utf-8"))["seconds"]
    return {"scores": scorer.scores(name, folder), "seconds": seconds}


class Scorer:
    """Scores checkpoints on one text; the original's logits are computed once and kept."""

    def __init__(self, source: ModelSource, arguments: argparse.Namespace) -> None:
        self.source, self.arguments = source, arguments
        text = arguments.text or Path("self")
        seq_len = arguments.seq_len
        self.config = TextEvalConfig(
            text, windows=arguments.windows, seq_len=seq_len, bootstrap=RESAMPLES
        )

    @cache  # noqa: B019 (one scorer lives as long as the process)
    def windows(self) -> list[torch.Tensor]:
        if self.arguments.text is None:
            path = tokens_of("self", "self", self.arguments, seed=1)
            return list(load_file(path)["input_ids"][: self.arguments.windows])
        text = self.arguments.text.read_text(encoding="utf-8")
        cut = cut_windows([self.source.folder], text, self.config)
        return [torch.from_numpy(window) for window in cut]

    @cache  # noqa: B019
    def original_logits(self) -> list[torch.Tensor]:
        model = load_model(self.source.folder)
        with torch.inference_mode():
            return [model(input_ids=w[None, :-1], use_cache=False).logits for w in self.windows()]

    def scores(self, name: str, folder: Path) -> np.ndarray:
        """Scores a token of a checkpoint, fp64 [4, W, T] (see evaluate.summarize)."""
        kept = self.arguments.work / f"{name.replace(' ', '-')}.npz"
        if not kept.exists():
            model: Any = load_model(folder)
            rows = []
            with torch.inference_mode():
                for window, logits in zip(self.windows(), self.original_logits(), strict=True):
                    found = model(input_ids=window[None, :-1], use_cache=False).logits[0]
                    rows.append(score_logits(found, logits[0], window[1:].numpy()))
            np.savez(kept, scores=np.stack(rows, axis=1))
        return np.load(kept)["scores"]


def to_markdown(runs: list[dict[str, Any]], config: TextEvalConfig) -> str:
    """The table, with paired intervals."""
    windows = runs[0]["scores"].shape[1]
    draws = np.random.default_rng(0).integers(0, windows, (RESAMPLES, windows))
    floors = {run["bits"]: run for run in runs if run["name"].startswith("rtn")}
    lines = [
        "| | perplexity | ratio to original (95%) | recovered (95%) | KL mean (95%) | KL p99 | "
        "same top token | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    original = float(np.exp(runs[0]["scores"][1].mean()))
    lines.append(f"| original | {original:.3f} | 1 | 1 | 0 | 0 | 1 | |")
    for run in runs:
        scores, floor = run["scores"], floors.get(run["bits"])
        if scores.shape[1:] != runs[0]["scores"].shape[1:]:
            raise InputError(f"{run['name']} was scored on other windows; use another --work")
        told = summarize(scores, config)
        share = ""
        if floor is not None and floor is not run:
            means = [scores[0].mean(1), floor["scores"][0].mean(1), scores[1].mean(1)]
            found = recovered(*(np.exp(m.mean()) for m in means))
            low, high = np.quantile(
                recovered(*(np.exp(m[draws].mean(1)) for m in means)), (0.025, 0.975)
            )
            share = f"{found:.3f} ({low:.3f} to {high:.3f})"
        ratio_low, ratio_high = told["perplexity_ratio_interval"]
        kl_low, kl_high = told["kl_mean_interval"]
        seconds = "" if run["seconds"] is None else f"{run['seconds']:.0f}"
        lines.append(
            f"| {run['name']} | {told['perplexity']:.3f} | {told['perplexity_ratio']:.4f} "
            f"({ratio_low:.4f} to {ratio_high:.4f}) | {share} | {told['kl_mean']:.4f} "
            f"({kl_low:.4f} to {kl_high:.4f}) | {told['kl_p99']:.3f} | "
            f"{told['top1_agreement']:.3f} | {seconds} |"
        )
    return "\n".join(lines)


def recovered(ppl: Any, floor: Any, original: Any) -> Any:
    """The share of round to nearest's loss that a method makes good."""
    return (floor - ppl) / (floor - original)


if __name__ == "__main__":
    main()
