"""Where a check runs: the device, the dtype, and how large things are there."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What the results of a stage depend on.
SOURCES = ("compress", "kernels", "quant", "runtime", "tests", "benchmarks/gpu")
INTERPRETER = {"TRITON_INTERPRET": "1", "COMPRESS_CPU_KERNELS": "triton"}
COLD_L2 = 3  # times the L2 cache that data must be, so that nothing of it is found there again


@dataclass(frozen=True)
class Place:
    """A GPU, or Triton's interpreter on the CPU, where everything is tiny and times mean nothing.

    Torch is imported by what needs it, since the interpreter is chosen by the environment before.
    """

    stand_in: bool

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu" if self.stand_in else "cuda")

    @property
    def dtype(self) -> Any:
        """Of activations: bfloat16; the interpreter is wrong in that, so float16 there."""
        import torch

        return torch.float16 if self.stand_in else torch.bfloat16

    @property
    def processors(self) -> int:
        """Multiprocessors."""
        import torch

        if self.stand_in:
            return 4
        return torch.cuda.get_device_properties(0).multi_processor_count

    @property
    def cache_bytes(self) -> int:
        """Of the L2 cache."""
        import torch

        return 0 if self.stand_in else torch.cuda.get_device_properties(0).L2_cache_size

    def copies(self, size: int) -> int:
        """How many copies of `size` bytes, used in turn, are never found in the L2 cache."""
        return 2 + COLD_L2 * self.cache_bytes // size

    @property
    def slug(self) -> str:
        """The device's name as a file's."""
        name = self.facts["device"].removeprefix("NVIDIA ")
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a table says of where it was made."""
        import torch
        import triton

        facts = {
            "device": "Triton's interpreter",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "gemlite": _version("gemlite"),
            "transformers": _version("transformers"),
        }
        if not self.stand_in:
            properties = torch.cuda.get_device_properties(0)
            facts |= {
                "device": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "processors": properties.multi_processor_count,
                "cache_bytes": self.cache_bytes,
                "driver": _driver(),
                "cuda": torch.version.cuda,
            }
        return facts

    @cached_property
    def key(self) -> str:
        """What the results of a check are valid for."""
        return self.key_of(*SOURCES)

    def key_of(self, *folders: str, endings: tuple[str, ...] = (".py", ".json", ".h")) -> str:
        """A hash of the sources in some folders, the device and the versions."""
        digest = hashlib.sha256(repr(sorted(self.facts.items())).encode())
        for folder in folders:
            for path in sorted((ROOT / folder).rglob("*")):
                if path.suffix in endings:
                    digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
        return digest.hexdigest()[:12]


def revision() -> str | None:
    """The commit that is checked out, with a `+` where files differ from it."""
    try:
        commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def environment(stand_in: bool) -> dict[str, str]:
    """The environment of a process that is to compute with Triton's kernels."""
    settings = dict(os.environ)
    for name in INTERPRETER:
        settings.pop(name, None)
    return settings | (INTERPRETER if stand_in else {})


def _driver() -> str | None:
    try:
        return _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()
