"""The kernels' own tests on real launches, a few files at a time.

As a plugin of pytest (`-p gpu.kernel_tests`) it leaves only a few tests of each file, for the
interpreter's run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu.place import ROOT, Place, environment
from gpu.stages import Skip

FEW = "GPU_CHECK_FEW"  # how many tests of a file are left
COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def files() -> list[Path]:
    """Test files of Triton kernels."""
    return sorted((ROOT / "tests" / "kernels").glob("test_*_triton.py"))


def measure(place: Place, path: Path) -> dict[str, Any]:
    """Run one file; its counts, and the names of tests that failed."""
    if find_spec("pytest") is None:
        raise Skip("pytest is not installed; pip install pytest")
    settings = environment(place.stand_in)
    command = [sys.executable, "-m", "pytest", str(path), "--tb=short"]
    if place.stand_in:
        settings[FEW] = "2"
        settings["PYTHONPATH"] = str(ROOT / "benchmarks")
        command += ["-p", "gpu.kernel_tests"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    last = done.stdout.strip().rpartition("\n")[2]
    counts = {kind: int(count) for count, kind in COUNTS.findall(last)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    problems = failed or ([] if done.returncode == 0 else [f"pytest: {last or done.stderr[-300:]}"])
    if not problems and not counts.get("passed"):
        problems = [f"{path.name}: no test ran"]
    return {"file": path.name, "counts": counts, "problems": problems}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leave a few tests, from all over the file."""
    few = int(os.environ.get(FEW, len(items)))
    items[:] = items[:: max(1, len(items) // few)][:few]
