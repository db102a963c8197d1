"""Prediction against measurement: `compress plan --calibrate` on several checkpoints, as a table.

    python benchmarks/plan_check.py bf16=smollm2-folder W4=smollm2-gptq-w4 --threads 2

Every row is a process of its own.  The machine is measured on random models, the checkpoint by
its own decode, and neither prediction has seen that decode.  A row that misses its bound (a factor
of 2 without calibration, 35% with it, for decode) makes the exit code 1.
"""

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

WITHOUT, WITH = 2.0, 0.35  # largest ratio either way, and largest error


def main() -> None:
    options = parse()
    reports = []
    for batch in options.batch:
        for name, _, model in (one.partition("=") for one in options.models):
            print(f"{name}, batch {batch}", file=sys.stderr, flush=True)
            reports.append({"name": name} | measured(options, model, batch))
    text = table(options, reports)
    options.out.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(0 if all(within(report["compared"]["decode step"]) for report in reports) else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path, default=Path("plan-smollm2.md"))
    return parser.parse_args()


def measured(options: argparse.Namespace, model: str, batch: int) -> dict[str, Any]:
    """One run of the command."""
    command = [sys.executable, "-m", "compress", "plan", model, "--calibrate", "--json"]
    command += ["--threads", str(options.threads), "--context", str(options.context)]
    command += ["--new-tokens", str(options.new_tokens), "--batch", str(batch)]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for note in report["notes"][1:]:
        print(f"{model}, batch {batch}: {note}", file=sys.stderr, flush=True)
    return report


def within(row: dict[str, float]) -> bool:
    """Whether both predictions of a step are as near as they should be."""
    ratio = row["uncalibrated_s"] / row["measured_s"]
    return 1 / WITHOUT <= ratio <= WITHOUT and abs(row["calibrated_error"]) <= WITH


def table(options: argparse.Namespace, reports: list[dict[str, Any]]) -> str:
    """The page in Markdown."""
    first = reports[0]
    head = "| model | batch | measured, ms | uncalibrated | error | calibrated | error |"
    lines = [
        "# Prediction against measurement: SmolLM2-135M on a CPU",
        "",
        f"{options.threads} threads of {processor()}; PyTorch {version('torch')}, kernels: "
        f"{first['kernels']}. {options.context} tokens of prompt, {options.new_tokens} new ones.",
        "",
        "    python benchmarks/plan_check.py "
        + " ".join(one.partition("=")[0] + "=FOLDER" for one in options.models)
        + f" --threads {options.threads} --context {options.context}"
        f" --new-tokens {options.new_tokens} --batch {' '.join(map(str, options.batch))}",
        "",
        f"Uncalibrated: {first['notes'][0].partition(': ')[2]}. Calibrated: what the runtime "
        "reaches on random models of other widths. An error is predicted over measured, less 1.",
    ]
    for name, title in {"decode step": "A decode step", "prefill": "Prefill"}.items():
        lines += ["", f"{title}:", "", head, "|---|---|---|---|---|---|---|"]
        for report in reports:
            row = report["compared"][name]
            cells = [report["name"], str(report["batch"]), milliseconds(row["measured_s"])]
            for which in ("uncalibrated", "calibrated"):
                cells += [milliseconds(row[f"{which}_s"]), f"{row[f'{which}_error']:+.0%}"]
            lines.append("| " + " | ".join(cells) + " |")
    head = "| model | batch | copies | matrix products | a step reads weights | on top | spread |"
    lines += ["", "What calibration measured; the spread is of the model's own steps, their 90th"]
    lines += ["percentile over the 10th:", "", head, "|---|---|---|---|---|---|---|"]
    for report in reports:
        reads = ", ".join(
            f"{kind} {found['bandwidth'] / 1e9:.1f} GB/s"
            for kind, found in report["reached"].items()
        )
        lines.append(
            f"| {report['name']} | {report['batch']} | {report['copy_bytes_per_s'] / 1e9:.1f} GB/s "
            f"| {report['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s | {reads} "
            f"| {report['efficiency']['overhead'] * 1e3:.2f} ms "
            f"| {report['step_spread']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f}" if seconds < 0.1 else f"{1000 * seconds:,.0f}"


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "a CPU")


if __name__ == "__main__":
    main()
