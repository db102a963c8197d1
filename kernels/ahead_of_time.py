# pyright: reportAttributeAccessIssue=false, reportFunctionMemberAccess=false
"""Compile every kernel that dispatch can choose, without a GPU, and look at what came out.

    python -m compress.kernels.ahead_of_time [--capability 90] [--json] [--jobs N]

For compute capabilities 8.0, 9.0 and 10.0: does it compile, does its shared memory fit in a
multiprocessor, do its values stay in registers.  Registers and local memory are read from the
compiled code (by cuobjdump, which Triton brings); shared memory is what a launch would ask for.
A result is kept in `$COMPRESS_CACHE/kernels/ahead_of_time` under a hash of all that it depends on,
so what has not changed is not compiled again.  Each violation is one line, and then the exit status
is 1.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import triton
from rich.console import Console
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.core.progress import say, track
from compress.core.source import cache_root
from compress.kernels.entry import INTERPRETED, Entry

OPERATIONS = (
    "embed", "latent_attention", "lowbit_matmul", "paged_attention", "rms_norm", "rope", "sampling",
    "silu_mul", "w8a8_matmul",
)  # fmt: skip
# What one program may have of a multiprocessor's shared memory (CUDA C Programming Guide, table
# "Technical Specifications per Compute Capability"); beyond it, a launch fails.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# Tensor memory of a multiprocessor has that many columns (PTX ISA, tcgen05); Triton refuses more.
TENSOR_COLUMNS = 512
# Bytes a thread keeps in local memory.  Spilled values are written to and read from the caches,
# mostly in the inner loop, so none are wanted.  What is allowed are the 7 words, rounded up, of an
# intermediate product that CUDA's sine and cosine keep there for arguments above 105,615: in
# practice they are never touched.
LOCAL_BYTES = 32
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
FORMAT = 1  # of the kept results


@dataclass(frozen=True)
class Result:
    """What the compiler made of an entry; all zero where `error` says that it made nothing.

    registers     of a thread
    local_bytes   of a thread: spilled registers, and arrays that are not in registers
    shared_bytes  of a program
    columns       of tensor memory, of a program
    seconds       that compiling took, when it was done
    """

    name: str
    capability: int
    registers: int = 0
    local_bytes: int = 0
    shared_bytes: int = 0
    columns: int = 0
    seconds: float = 0.0
    error: str = ""
    cached: bool = False

    @property
    def violations(self) -> list[str]:
        """One line for each limit that it breaks."""
        found = [f"does not compile: {self.error}"] if self.error else []
        for count, limit, what in (
            (self.shared_bytes, SHARED_BYTES[self.capability], "bytes of shared memory"),
            (self.local_bytes, LOCAL_BYTES, "bytes a thread spilled to local memory"),
            (self.columns, TENSOR_COLUMNS, "columns of tensor memory"),
        ):
            if count > limit:
                found.append(f"{count:,} {what}, allowed are {limit:,}")
        return [f"{self.name}, sm_{self.capability}: {line}" for line in found]


def all_entries(capability: int) -> list[Entry]:
    """All specialisations that dispatch can choose on a device, over all operations."""
    found = []
    for operation in OPERATIONS:
        module = importlib.import_module(f"compress.kernels.{operation}.triton")
        found += module.entries(capability)
    return found


def check(todo: Sequence[tuple[Entry, int]], jobs: int | None = None) -> list[Result]:
    """Compile each (entry, capability) that is not known yet, in `jobs` processes.

    The results are in the order of `todo`; jobs None takes as many as there are processors.
    Raises RuntimeError in Triton's interpreter, where kernels are not compiled.
    """
    if INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET is set, and Triton's interpreter compiles nothing; unset it"
        )
    folder = cache_root() / "kernels" / "ahead_of_time"
    folder.mkdir(parents=True, exist_ok=True)
    places = [folder / f"{identity(*pair)}.json" for pair in todo]
    results = {index: known for index, path in enumerate(places) if (known := _read(path))}
    missing = [index for index in range(len(todo)) if index not in results]
    if missing:
        made = _compiled([todo[index] for index in missing], jobs or os.cpu_count() or 1)
        for index, result in track(made, "Compiling", len(missing)):
            place = places[missing[index]]
            if not result.error:
                _write(place, result)
            results[missing[index]] = result
    return [results[index] for index in range(len(todo))]


def identity(entry: Entry, capability: int) -> str:
    """A hash of all that the compiled code depends on.

    Triton's `cache_key` covers the source of the kernel, of all functions it calls, and the global
    constants that they read.
    """
    constants = {
        name: getattr(value, "cache_key", repr(value)) for name, value in entry.constants.items()
    }
    facts = [
        FORMAT, triton.__version__, capability, entry.name, entry.kernel.cache_key,
        sorted(entry.types.items()), sorted(constants.items()), entry.num_warps,
        entry.num_stages, sorted(_aligned(entry)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def compile_entry(entry: Entry, capability: int) -> Result:
    """Compile one entry now, whatever is known; an error of the compiler is in the result."""
    started = time.perf_counter()
    try:
        compiled = _compile(entry, capability)
    except Exception as error:  # of any stage of the compiler
        return Result(entry.name, capability, error=_first_line(error))
    seconds = round(time.perf_counter() - started, 2)
    registers, local = _resources(compiled.asm["cubin"])
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    shared = compiled.metadata.shared
    return Result(entry.name, capability, registers, local, shared, columns, seconds)


def _compile(entry: Entry, capability: int) -> Any:
    names = entry.kernel.arg_names
    unknown = sorted({*entry.types, *entry.constants} - set(names))
    absent = [name for name in names if name not in entry.types and name not in entry.constants]
    if unknown or absent:
        raise ValueError(f"arguments that the kernel has not: {unknown}; not given: {absent}")
    signature = {name: entry.types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in _aligned(entry)}
    source = ASTSource(entry.kernel, signature, dict(entry.constants), aligned)
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _aligned(entry: Entry) -> frozenset[str]:
    if entry.aligned is not None:
        return entry.aligned
    return frozenset(name for name, kind in entry.types.items() if kind.startswith("*"))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = RESOURCES.findall(said)
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump speaks of {len(found)} kernels, not one: {said}")
    registers, stack, local = map(int, found[0])
    return registers, stack + local


def _first_line(error: BaseException) -> str:
    """An error in one line: Triton nests them, and writes the kernel's source in between."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(dict.fromkeys([*lines[:1], *lines[-1:]]))[:300]}"


_todo: Sequence[tuple[Entry, int]] = ()  # inherited by the processes: kernels do not pickle


def _compile_one(index: int) -> Result:
    with tempfile.TemporaryDirectory() as scratch:  # results are kept here, not Triton's files
        knobs.cache.dir = scratch
        return compile_entry(*_todo[index])


def _compiled(todo: Sequence[tuple[Entry, int]], jobs: int) -> Iterator[tuple[int, Result]]:
    """(index, result) as they come."""
    global _todo
    _todo = todo
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=fork) as pool:
        waiting: dict[Future[Result], int] = {
            pool.submit(_compile_one, index): index for index in range(len(todo))
        }
        for future in as_completed(waiting):
            entry, capability = todo[waiting[future]]
            try:
                yield waiting[future], future.result()
            except BrokenProcessPool:
                error = "the compiler crashed, on this entry or another; try --jobs 1"
                yield waiting[future], Result(entry.name, capability, error=error)


def _read(path: Path) -> Result | None:
    try:
        return Result(**json.loads(path.read_text()) | {"cached": True})
    except (FileNotFoundError, ValueError):  # not there, or cut off by a full disk
        return None


def _write(path: Path, result: Result) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(result)))
    partial.replace(path)


def _print_table(results: Sequence[Result]) -> None:
    table = Table(title="Kernels compiled ahead of time", title_justify="left")
    for column in ("entry", "sm", "registers", "spilled", "shared", "seconds", "cached"):
        table.add_column(column, justify="left" if column == "entry" else "right")
    for result in results:
        numbers = (result.registers, result.local_bytes, result.shared_bytes)
        cells = ["-"] * 3 if result.error else [f"{number:,}" for number in numbers]
        cells += [f"{result.seconds:.1f}", "yes" if result.cached else ""]
        table.add_row(result.name, str(result.capability), *cells)
    # a log has no width: names are not to be cut there
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)


@click.command()
@click.option(
    "--capability", "capabilities", type=click.Choice([str(c) for c in SHARED_BYTES]),
    multiple=True, help="Compute capability times 10; may be given again.  [default: all]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list on standard output.")
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: processors]")
def main(capabilities: tuple[str, ...], as_json: bool, jobs: int | None) -> None:
    """Compile every kernel of the dispatch table and check shared memory and spills."""
    if INTERPRETED:
        raise click.ClickException("TRITON_INTERPRET is set: kernels are interpreted; unset it")
    started = time.monotonic()
    chosen = [int(text) for text in capabilities] or list(SHARED_BYTES)
    results = check([(entry, sm) for sm in chosen for entry in all_entries(sm)], jobs)
    if as_json:
        click.echo(json.dumps([asdict(result) for result in results], indent=2))
    else:
        _print_table(results)
    violations = [line for result in results for line in result.violations]
    for line in violations:
        say(line)
    compiled = sum(not result.cached for result in results)
    say(
        f"{len(results)} entries, {compiled} compiled now in {time.monotonic() - started:.0f} s, "
        f"{len(violations)} violations"
    )
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
