"""Compiling without a GPU: what is found, what is kept, and what is refused.

Kernels are compiled in processes of their own, since tests may run in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOY = """
import triton
import triton.language as tl

FACTOR = tl.constexpr(2)

@triton.jit
def scaled(x):
    return x * FACTOR

@triton.jit
def copy(a, b, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(b + i, scaled(tl.load(a + i, i < count)), i < count)

@triton.jit
def product(a, b, c, steps, M: tl.constexpr, K: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros((M, M), tl.float32)
    for step in range(steps):
        left = tl.load(a + m[:, None] * 4096 + step * K + k[None, :])
        right = tl.load(b + (step * K + k[:, None]) * 4096 + m[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + m[:, None] * M + m[None, :], total)
"""

SCRIPT = """
import json, sys
from dataclasses import asdict
import toy
from compress.kernels.ahead_of_time import check
from compress.kernels.entry import Entry

def copy():
    return Entry("copy", toy.copy, {"a": "*fp16", "b": "*fp16", "count": "i32"}, {"BLOCK": 256})

def product(**options):
    types = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "steps": "i32"}
    return Entry("product", toy.product, types, {"M": 128, "K": 64}, **options)

todo = eval(sys.argv[1])
results = check(todo, jobs=1)
print(json.dumps([asdict(result) | {"violations": result.violations} for result in results]))
"""

COMMAND = """
import toy
from compress.kernels import ahead_of_time
from compress.kernels.entry import Entry

types = {"a": "*fp16", "b": "*fp16", "count": "i32"}
fine = Entry("fine", toy.copy, types, {"BLOCK": 256})
broken = Entry("broken", toy.copy, types, {"BLOCK": 100})
ahead_of_time.all_entries = lambda capability: [fine, broken] if capability == 90 else [fine]
ahead_of_time.main()
"""


@pytest.fixture
def checked(tmp_path):
    """A function that checks a list of (entry, capability), an expression, on the toys' source."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(expression, source=TOY):
        (tmp_path / "toy.py").write_text(source)
        done = started([str(tmp_path / "script.py"), expression], tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def started(command, cache, interpreter="0"):
    settings = {
        "TRITON_INTERPRET": interpreter,
        "COMPRESS_CACHE": str(cache),
        "PYTHONDONTWRITEBYTECODE": "1",  # a source rewritten within a second has its old time
    }
    return subprocess.run(
        [sys.executable, *command], env=os.environ | settings, capture_output=True, text=True
    )


def test_what_has_not_changed_is_not_compiled_again(checked):
    both = "[(copy(), 80), (copy(), 90)]"
    first = checked(both)
    assert [result["cached"] for result in first] == [False, False]
    assert [result["capability"] for result in first] == [80, 90]
    for result in first:
        assert result["violations"] == []
        assert result["registers"] > 4
        assert result["local_bytes"] == 0
    again = checked(both)
    assert [result["cached"] for result in again] == [True, True]
    assert [result["registers"] for result in again] == [result["registers"] for result in first]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("BLOCK + tl.arange(0, BLOCK)", "BLOCK + tl.arange(0, BLOCK) + 1"),  # the kernel
        ("return x * FACTOR", "return x * FACTOR + 1"),  # what it calls
        ("constexpr(2)", "constexpr(3)"),  # a constant that what it calls reads
    ],
)
def test_what_a_kernel_depends_on_makes_it_new(old, new, checked):
    assert old in TOY
    assert not checked("[(copy(), 90)]")[0]["cached"]
    assert checked("[(copy(), 90)]")[0]["cached"]
    assert not checked("[(copy(), 90)]", TOY.replace(old, new))[0]["cached"]


def test_options_and_types_make_an_entry_new(checked):
    assert not checked("[(copy(), 90)]")[0]["cached"]
    for change in ("num_warps=8", "num_stages=1", "aligned=frozenset()",
                   "constants={'BLOCK': 128}", "types=copy().types | {'a': '*bf16'}"):  # fmt: skip
        expression = f"[(__import__('dataclasses').replace(copy(), {change}), 90)]"
        assert not checked(expression)[0]["cached"], change


def test_too_much_shared_memory_is_refused(checked):
    """Two tiles of 128 x 64 halves are 32 KiB: seven stages fit in 227 KiB, and not in 163."""
    small, large = checked("[(product(num_stages=s, num_warps=8), 80) for s in (3, 7)]")
    assert small["violations"] == []
    assert large["shared_bytes"] > 163 * 1024
    assert large["violations"] == [
        f"product, sm_80: {large['shared_bytes']:,} bytes of shared memory, allowed are 166,912"
    ]
    (roomier,) = checked("[(product(num_stages=7, num_warps=8), 90)]")
    assert roomier["shared_bytes"] > 163 * 1024
    assert roomier["violations"] == []


def test_spills_are_refused(checked):
    """128 x 128 sums of float32 are 512 registers for each of 32 threads; they have 255."""
    (result,) = checked("[(product(num_stages=1, num_warps=1), 80)]")
    assert result["local_bytes"] > 1000
    assert result["violations"] == [
        f"product, sm_80: {result['local_bytes']:,} bytes a thread spilled to local memory, "
        "allowed are 32"
    ]


def test_what_does_not_compile_is_refused_and_not_kept(checked):
    broken = "[(copy(), 90)]", TOY.replace("tl.arange(0, BLOCK)", "tl.arange(0, 100)")
    for _ in range(2):
        (result,) = checked(*broken)
        (line,) = result["violations"]
        assert line.startswith("copy, sm_90: does not compile: ValueError: arange's range must be")
        assert not result["cached"]


def test_an_argument_left_out_is_said(checked):
    without = "Entry('copy', toy.copy, {'a': '*fp16', 'b': '*fp16', 'n': 'i32'}, {'BLOCK': 256})"
    (result,) = checked(f"[({without}, 90)]")
    assert "arguments that the kernel has not: ['n']; not given: ['count']" in result["error"]


def test_the_command_in_the_interpreter_says_why_it_cannot(tmp_path):
    command = ["-m", "compress.kernels.ahead_of_time", "--capability", "90"]
    done = started(command, tmp_path, interpreter="1")
    assert done.returncode == 1
    assert done.stderr == "Error: TRITON_INTERPRET is set: kernels are interpreted; unset it\n"


def test_the_command_fails_with_a_line_for_each_violation(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "command.py").write_text(COMMAND)
    command = [str(tmp_path / "command.py"), "--jobs", "1", "--capability"]
    fine = started([*command, "80"], tmp_path)
    assert fine.returncode == 0, fine.stderr
    assert "fine" in fine.stdout
    broken = started([*command, "90"], tmp_path)
    assert broken.returncode == 1
    lines = [line for line in broken.stderr.splitlines() if "does not compile" in line]
    assert len(lines) == 1
    assert lines[0].startswith("broken, sm_90: does not compile: ValueError")
    assert "2 entries, 2 compiled now" in broken.stderr
    everything = json.loads(started([*command, "80", "--json"], tmp_path).stdout)
    assert [result["cached"] for result in everything] == [True]


def test_every_operation_lists_its_entries():
    """The names are those of folders, and the same for all devices but in what they hold."""
    from compress.kernels.ahead_of_time import OPERATIONS, all_entries

    kernels = Path(__file__).parents[2] / "kernels"
    assert {path.parent.name for path in kernels.glob("*/triton.py")} == set(OPERATIONS)
    for capability in (80, 90, 100):
        entries = all_entries(capability)
        names = [entry.name for entry in entries]
        assert len(set(names)) == len(names)
        assert 20 <= len(names) <= 150, "the dispatch table was meant to be short"
