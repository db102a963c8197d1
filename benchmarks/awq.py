"""AWQ against round to nearest and llm-compressor's AWQ: quality and time on one machine.

    python benchmarks/awq.py --model smollm2 --calibration c4.txt --text wikitext2_valid.txt \\
        --work build/awq --peer-python /path/to/venv-with-llmcompressor/bin/python

Everything runs one after the other in processes of its own: RTN, AWQ calibrated on the text, AWQ
calibrated on the model's own samples, llm-compressor's AWQ on the same tokens (with
`--peer-python`), then `compress eval --against` on each.  A finished step leaves a JSON file in
`--work` and is not run again, so the script can be stopped and started.  Prints a table in
Markdown; `--results` writes it to a file too.

Recovered is (ppl_rtn - ppl) / (ppl_rtn - ppl_original).  Times are each tool's own: from the start
of the pipeline to the last file written, without the start of Python and imports; llm-compressor's
is that of `oneshot` alone, without loading and saving.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from compress.calibration import calibration_tokens
from compress.core.source import read_config, resolve_model
from compress.loading import default_device
from compress.recipe import CalibrationConfig

PEER = Path(__file__).parent / "peers" / "llmcompressor_awq.py"
GRID = ["--bits", "4", "--group-size", "64", "--symmetric"]
SAMPLES, SEQ_LEN = 64, 512


def main() -> None:
    arguments = parse()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    source = resolve_model(arguments.model)
    sampled = ["--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN)]
    variants = {
        "rtn": ["--method", "rtn", *GRID],
        "awq": ["--method", "awq", *GRID, "--calibration", str(arguments.calibration), *sampled],
        "awq, self-calibrated": ["--method", "awq", *GRID, "--calibration", "self", *sampled],
    }
    runs: dict[str, dict[str, Any]] = {}
    for name, flags in variants.items():
        out = work / name.replace(", ", "-")
        command = ["quantize", str(source.folder), "--out", str(out), "--overwrite", *flags]
        report = step(out, compress_command(*command))
        runs[name] = {"folder": out, "seconds": report["seconds"]}
    if arguments.peer_python:
        tokens = work / "tokens.safetensors"
        config = CalibrationConfig(str(arguments.calibration), SAMPLES, SEQ_LEN)
        vocab = read_config(source.folder)["vocab_size"]
        ids = calibration_tokens(config, source, vocab, default_device())
        save_file({"input_ids": ids}, tokens)
        out = work / "llm-compressor"
        peer = [arguments.peer_python, str(PEER), str(source.folder), str(tokens), str(out)]
        runs["llm-compressor awq"] = {"folder": out, "seconds": step(out, peer)["seconds"]}
    for name, run in runs.items():
        folder = run["folder"]
        against = ["--text", str(arguments.text), "--against", str(source.folder)]
        command = compress_command("eval", str(folder), *against)
        run |= step(folder.with_name(f"{folder.name}.eval"), command)
        print(f"{name}: done", file=sys.stderr)
    table = to_markdown(runs)
    print(table)
    if arguments.results:
        arguments.results.write_text(table + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/awq"))
    parser.add_argument("--peer-python", help="an interpreter with llmcompressor installed")
    parser.add_argument("--results", type=Path, help="write the table to this file too")
    return parser.parse_args()


def compress_command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("compress")), *arguments, "--json"]


def step(name: Path, command: list[str]) -> dict[str, Any]:
    """Run a command that ends its standard output with a JSON object; keep the result."""
    kept = name.with_name(f"{name.name}.json")
    if not kept.exists():
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        lines = done.stdout.strip().splitlines()
        start = max(i for i, line in enumerate(lines) if line.startswith("{"))
        kept.write_text("\n".join(lines[start:]), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def to_markdown(runs: dict[str, dict[str, Any]]) -> str:
    floor = runs["rtn"]
    original = floor["perplexity_original"]
    lines = [
        "| | perplexity | ratio to original (95%) | recovered | KL mean (95%) | KL p99 | "
        "same top token | seconds |",
        "|---|---|---|---|---|---|---|---|",
        f"| original | {original:.2f} | 1 | 1 | 0 | 0 | 1 | |",
    ]
    for name, run in runs.items():
        recovered = (floor["perplexity"] - run["perplexity"]) / (floor["perplexity"] - original)
        low, high = run["perplexity_ratio_interval"]
        kl_low, kl_high = run["kl_mean_interval"]
        lines.append(
            f"| {name} | {run['perplexity']:.2f} | {run['perplexity_ratio']:.3f} "
            f"({low:.3f} to {high:.3f}) | {recovered:.2f} | {run['kl_mean']:.3f} "
            f"({kl_low:.3f} to {kl_high:.3f}) | {run['kl_p99']:.2f} | "
            f"{run['top1_agreement']:.3f} | {run['seconds']:.0f} |"
        )
    if peer := runs.get("llm-compressor awq"):
        ratio = peer["seconds"] / runs["awq"]["seconds"]
        lines += ["", f"Time of llm-compressor's AWQ over ours: {ratio:.1f}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
