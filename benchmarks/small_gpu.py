"""recipes/small-gpu.yaml on random weights: does each stage take the memory that was planned?

    python benchmarks/small_gpu.py WORK_FOLDER --text c4.txt [--blocks 6] [--out FILE.md]

The model has Qwen3-8B's widths and vocabulary and fewer blocks, and the recipe fewer samples and
tokens; all else is as it stands in the file.  Memory of a stage is the most that the process held
(RssAnon, ten times a second) while it ran, beside what `--dry-run` said a minute before.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from larger_than_memory import make_model
from transformers import Qwen3Config

from compress.core.source import resolve_model

RECIPE = Path(__file__).parent.parent / "recipes" / "small-gpu.yaml"
SHAPE: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40_960,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to calibrate and train on")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--layers-out", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="[default: small-gpu.md in WORK_FOLDER]")
    options = parser.parse_args()
    model = options.work / f"qwen3-{options.blocks}"
    if not model.exists():
        config = Qwen3Config(num_hidden_layers=options.blocks, dtype=torch.bfloat16, **SHAPE)
        make_model(model, config)
        with_tokenizer_of("smollm2", model)
    recipe = shortened(options, model)
    command = [sys.executable, "-m", "compress", "run", str(recipe)]
    plan = json.loads(
        subprocess.run([*command, "--dry-run", "--json"], stdout=subprocess.PIPE, check=True).stdout
    )
    found = watched(command, options.work / "run.log")
    text = page(options, plan, found)
    (options.out or options.work / "small-gpu.md").write_text(text, encoding="utf-8")
    print(text)


def with_tokenizer_of(name: str, folder: Path) -> None:
    """A tokenizer with fewer tokens than the model has is as good as its own here."""
    for path in resolve_model(name).folder.glob("tokenizer*"):
        shutil.copy(path, folder)


def shortened(options: argparse.Namespace, model: Path) -> Path:
    """The recipe, on the model that was made and little text."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe |= {"model": str(model), "out": str(options.work / "out")}
    recipe["calibration"] |= {"source": str(options.text), "samples": options.samples}
    prune, distill, _ = recipe["stages"]
    prune["layers_out"] = options.layers_out
    distill["data"]["source"] = str(options.text)
    distill["train"] |= {"tokens": options.tokens, "batch_size": 2}
    path = options.work / RECIPE.name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def watched(command: list[str], log: Path) -> list[int]:
    """Run a command; the greatest RssAnon in bytes of each stage."""
    stages: list[int] = []
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            begun = len(re.findall(r"^Stage \d+ of", log.read_text(encoding="utf-8"), re.M))
            if begun > len(stages):
                stages.append(0)
            held = re.search(r"RssAnon:\s+(\d+)", status.read_text())
            if stages and held is not None:
                stages[-1] = max(stages[-1], 1024 * int(held[1]))
            time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed; {log} says why")
    return stages


def page(options: argparse.Namespace, plan: dict[str, Any], found: list[int]) -> str:
    """Planned and found, stage by stage."""
    size = sum(path.stat().st_size for path in (options.work / "out").glob("*.safetensors"))
    lines = [
        "# recipes/small-gpu.yaml on random weights",
        "",
        f"Qwen3-8B's widths, {options.blocks} blocks, of which {options.layers_out} goes; "
        f"{options.samples} x 512 tokens to calibrate, {options.tokens:,} to train. On a CPU, "
        "where weights that are not trained stay in mapped files and are not counted.",
        "",
        "| stage | memory, GB | planned |",
        "|---|---|---|",
    ]
    for stage, held in zip(plan["stages"], found, strict=True):
        planned = stage["memory_bytes"] / 1e9
        lines.append(f"| {stage['method']} | {held / 1e9:.2f} | {planned:.2f} |")
    command = f"python benchmarks/small_gpu.py WORK_FOLDER --text {options.text.name} "
    command += f"--blocks {options.blocks} --samples {options.samples} --tokens {options.tokens}"
    lines += ["", f"The output is {size / 1e9:.2f} GB.", "", f"    {command}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
