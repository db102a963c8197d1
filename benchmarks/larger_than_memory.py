"""How much memory `compress quantize` holds for a model of any size, made of random weights.

    python benchmarks/larger_than_memory.py WORK_FOLDER
    python benchmarks/larger_than_memory.py WORK_FOLDER --method gptq --layers 8

By default a Llama of 3.0B parameters in bfloat16 (28 blocks, hidden 3072, vocabulary 32,000, not
tied), to 4 bits on 16 x 256 random tokens.  What counts is RssAnon of /proc/PID/status, sampled
ten times a second: memory that no file stands behind.  Pages of mapped checkpoint files (RssFile)
are the system's to drop.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from compress.core.shards import ShardWriter, StreamedTensor

ROWS = 4096  # of a random tensor that are made at once


def make_model(folder: Path, config: PreTrainedConfig) -> int:
    """Write a model of random weights in bfloat16, one part a block; returns its parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parts: dict[str, dict[str, StreamedTensor]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        part = "block-" + name.split(".")[2] if ".layers." in name else "outer"
        stream = StreamedTensor(shape, torch.bfloat16, partial(random_rows, name, shape))
        parts.setdefault(part, {})[name] = stream
    folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    for part, tensors in parts.items():
        writer.write(part, tensors)
    writer.finish(list(parts))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def random_rows(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Normal weights of standard deviation 0.02, norms of 1."""
    if len(shape) == 1:
        yield torch.ones(shape, dtype=torch.bfloat16)
        return
    generator = torch.Generator().manual_seed(hash_of(name))
    for start in range(0, shape[0], ROWS):
        rows = min(ROWS, shape[0] - start)
        yield (torch.randn(rows, shape[1], generator=generator) * 0.02).bfloat16()


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "little") % (1 << 31)


def watched(command: list[str]) -> dict[str, float]:
    """Run a command; its seconds and its greatest RssAnon and RssFile in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = {"RssAnon": 0, "RssFile": 0}
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = (line.split() for line in status.read_text().splitlines())
        fields = {words[0].rstrip(":"): words[1:] for words in lines if words}
        for name in most:
            if name in fields:
                most[name] = max(most[name], 1024 * int(fields[name][0]))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return {"seconds": time.monotonic() - started, **most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--method", default="awq")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    options, more = parser.parse_known_args()
    model = options.work / f"llama-{options.layers}"
    if not model.exists():
        config = LlamaConfig(
            vocab_size=32_000, hidden_size=3072, intermediate_size=8192,
            num_hidden_layers=options.layers, num_attention_heads=24, num_key_value_heads=8,
            dtype=torch.bfloat16,
        )  # fmt: skip
        make_model(model, config)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    tokens = torch.randint(0, 32_000, (options.samples, options.seq_len))
    save_file({"input_ids": tokens}, options.work / "tokens.safetensors")
    out = options.work / f"{model.name}-{options.method}"
    command = ["compress", "quantize", str(model), "--method", options.method, "--out", str(out)]
    command += ["--calibration", str(options.work / "tokens.safetensors"), "--overwrite"]
    command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len), *more]
    planned = subprocess.run(
        [*command, "--dry-run", "--json"], stdout=subprocess.PIPE, check=True, text=True
    )
    plan = json.loads(planned.stdout)
    found = watched(command)
    output = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(
        f"| {options.method} | {options.layers} blocks, {size / 1e9:.2f} GB "
        f"| {output / 1e9:.3f} GB, planned {plan['output_bytes'] / 1e9:.3f} "
        f"| RssAnon {found['RssAnon'] / 1e9:.2f} GB, planned {plan['memory_bytes'] / 1e9:.2f} "
        f"| {found['seconds']:.0f} s, planned {plan['seconds']:.0f} |"
    )


if __name__ == "__main__":
    main()
