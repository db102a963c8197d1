"""The kernels' own tests on real launches, file by file.

Most of their time is the compiler's, so a file's tests are shared out over several processes.  For
that this module is a plugin of pytest (`-p gpu.kernel_tests`), which leaves each process its part;
in the interpreter, only a few tests of each file.
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

PART = "GPU_CHECK_PART"  # "i/n": of the tests only every n-th, from the i-th on
FEW = "GPU_CHECK_FEW"  # at most so many tests, 1 or more
FEW_TESTS = "2"  # the last of a file may be for a GPU alone
MOST_PROCESSES = 6  # each has a context on the GPU, of some 500 MB
COUNTS = re.compile(r"(\d+) (passed|failed|error|skipped)")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
LAUNCHING = ("device_queue", "gpu_decoder")  # in tests/runtime
NO_TESTS = 5  # pytest's exit status


def files() -> list[Path]:
    """Test files of the Triton kernels, and of what launches them."""
    kernels = sorted((ROOT / "tests" / "kernels").glob("test_*_triton.py"))
    return [*kernels, *(ROOT / "tests" / "runtime" / f"test_{name}.py" for name in LAUNCHING)]


def name_of(path: Path) -> str:
    """Of a file's stage."""
    return f"tests-{path.stem.removeprefix('test_').removesuffix('_triton')}"


def measure(place: Place, path: Path) -> dict[str, Any]:
    """Run one file; its counts, and the names of tests that failed."""
    if find_spec("pytest") is None:
        raise Skip("pytest is not installed; pip install pytest")
    count = 1 if place.stand_in else max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    processes = [_started(place, path, f"{index}/{count}") for index in range(count)]
    counts: dict[str, int] = {}
    problems: list[str] = []
    for process in processes:
        said, _ = process.communicate()
        print(said, flush=True)
        last = said.strip().rpartition("\n")[2]
        for number, kind in COUNTS.findall(last):
            counts[kind] = counts.get(kind, 0) + int(number)
        failed = FAILED.findall(said)
        if process.returncode not in (0, NO_TESTS) and not failed:
            failed = [f"pytest ended with status {process.returncode}: {last}"]
        problems += failed
    if not problems and not counts.get("passed"):
        problems = [f"{path.name}: no test ran"]
    return {"file": path.name, "counts": counts, "problems": problems}


def _started(place: Place, path: Path, part: str) -> subprocess.Popen[str]:
    settings = environment(place.stand_in)
    settings[PART] = part
    settings["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # of none that is needed, and slow to import
    if place.stand_in:
        settings[FEW] = FEW_TESTS
    folders = [str(ROOT / "benchmarks"), settings.get("PYTHONPATH", "")]
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    command = [sys.executable, "-m", "pytest", str(path), "--tb=short", "-p", "gpu.kernel_tests"]
    return subprocess.Popen(
        command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leave this process its part of the tests, or the last few of the file."""
    index, count = map(int, os.environ.get(PART, "0/1").split("/"))
    items[:] = items[index::count]
    items[:] = items[-int(os.environ.get(FEW, len(items))) :]
