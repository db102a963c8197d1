"""Compiling the AVX-512 kernels, once a machine.

The kernels come as C++ beside each operation (`kernels/<op>/avx512.h`) and are compiled at first
use by the machine's own compiler for its own processor; the library stays in the cache, under a
name that holds a hash of the sources, the compiler and the processor.  Without a compiler, or on
another processor, `reason_against` says so and PyTorch's operations serve instead.

The library is linked without an OpenMP of its own: it finds the one that PyTorch loaded, and so
shares its threads. Two pools would wait for each other's cores.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch  # noqa: F401 - its OpenMP must be in the process before the library

from compress.core.progress import say
from compress.core.source import cache_root

KERNELS = Path(__file__).resolve().parent.parent
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-fno-math-errno"]
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16")  # as /proc/cpuinfo spells them


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels; RuntimeError when `reason_against` gives a reason."""
    if reason := reason_against():
        raise RuntimeError(reason)
    loaded = ctypes.CDLL(str(_compiled()))
    loaded.program_new.restype = ctypes.c_void_p
    loaded.program_new.argtypes = [ctypes.c_int]
    loaded.program_free.argtypes = [ctypes.c_void_p]
    loaded.program_add.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    loaded.program_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return loaded


def reason_against() -> str | None:
    """Why the AVX-512 kernels do not run here, or None when they can."""
    if os.environ.get("COMPRESS_CPU_KERNELS") == "torch":
        return "COMPRESS_CPU_KERNELS=torch asks for PyTorch's"
    return _obstacle()


def processor_has(flag: str) -> bool:
    """Whether the processor, and so the compiled kernels, have an instruction set."""
    return flag in _processor_flags()


@cache
def _obstacle() -> str | None:
    lacking = [flag for flag in NEEDED if flag not in _processor_flags()]
    if lacking:
        return f"the processor lacks {', '.join(lacking)}"
    if _compiler() is None:
        return "no C++ compiler (g++ or clang++) is installed"
    try:
        ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"the kernels do not compile here: {lines[0] if lines else error}"
    return None


def _compiler() -> str | None:
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@cache
def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), ()))


@cache
def _compiled() -> Path:
    """The library's place; compiled now if it is not there."""
    compiler = _compiler()
    assert compiler is not None, "asked before"
    sources = sorted(path for ending in ("*.h", "*.cpp") for path in KERNELS.glob(f"*/{ending}"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    identity = hashlib.sha256(version.stdout.encode())
    identity.update(" ".join([*FLAGS, platform.machine(), *sorted(_processor_flags())]).encode())
    for path in sources:
        identity.update(path.read_bytes())
    target = cache_root() / "kernels" / f"avx512-{identity.hexdigest()[:16]}.so"
    if not target.is_file():
        say("Compiling the CPU kernels (once, some 10 seconds)")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
            source = str(KERNELS / "program" / "program.cpp")
            for command in (
                [compiler, *FLAGS, "-c", source, "-o", str(made)],
                [compiler, "-shared", str(made), "-o", str(linked)],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True)
            linked.replace(target)
    return target
