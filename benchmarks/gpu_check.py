"""Everything that only a GPU can show, in one command that can be broken off and called again.

    python benchmarks/gpu_check.py                           # or: make gpu-check
    python benchmarks/gpu_check.py --stand-in interpreter    # no GPU: proves the command itself

Stages: the kernels' tests on real launches; the runtime beside transformers on the same GPU; tables
of times.  Each is kept in the work folder for these sources, this device and these versions, so a
second call goes on where the first stopped, and runs again what failed.  The record goes to
benchmarks/results/DEVICE.json and .md; with the interpreter standing in, to a folder of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import click

from gpu import kernel_tests, stages
from gpu.place import INTERPRETER, ROOT, Place, revision
from gpu.stages import Outcome, Stage


def all_stages() -> list[Stage]:
    """In the order in which they run: what is short and shows most comes first."""

    def late(module: str, function: str, **settings: object) -> partial[dict[str, object]]:
        return partial(_imported, module=module, function=function, settings=settings)

    rows = {"rows": _rows("ROWS")}
    few = {"rows": _rows("FEW_ROWS")}
    return [
        Stage("bandwidth", late("timing", "bandwidth"), 60),
        *(
            Stage(f"tests-{path.stem[5:-7]}", partial(kernel_tests.measure, path=path))
            for path in kernel_tests.files()
        ),
        Stage("parity-families", late("parity", "families"), 120),
        Stage("parity-itself", late("parity", "itself"), 60),
        Stage("parity-real", late("parity", "real"), 120),
    ]
