"""`make gpu-check` and `benchmarks/tune.py` run to their ends, with the interpreter standing in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
# Not run without a GPU, each for a reason that it gives.
SKIPPED = {"parity-real", "speculation-real", "model-gemlite"}
STATUSES = {"passed", "failed", "skipped"}


def run(*command, expected=0):
    settings = dict(os.environ)
    for name in ("TRITON_INTERPRET", "COMPRESS_CPU_KERNELS"):
        settings.pop(name, None)  # the command sets what it needs
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=settings | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def gpu_check(tmp_path):
    """A function that runs the command in folders of the test's own; its lines, by stage."""

    def check(*options, expected=0):
        folders = ["--work", tmp_path / "work", "--output", tmp_path / "out"]
        command = [BENCHMARKS / "gpu_check.py", "--stand-in", "interpreter", *folders, *options]
        lines = run(*command, expected=expected).splitlines()
        words = [line.split()[:2] for line in lines]
        return {name: status for name, status in words if status in STATUSES}, lines[0]

    return check


def test_every_stage_runs_to_its_end(gpu_check, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}
    said, _ = gpu_check()
    assert len(said) >= 14
    assert {name for name, status in said.items() if status == "skipped"} == SKIPPED
    assert {status for name, status in said.items() if name not in SKIPPED} == {"passed"}
    record = json.loads((tmp_path / "out" / "triton-s-interpreter.json").read_text())
    text = (tmp_path / "out" / "triton-s-interpreter.md").read_text()
    assert set(record["stages"]) == set(said)
    timed = {"lowbit-w4": "linears", "attention": "cases", "small": "launches"}
    timed |= {"speculation": "rows", "verify": "rows"}
    timed |= {f"rounded-{kind}": "linears" for kind in ("int8", "llm.int8", "fp8")}
    for stage, key in timed.items():
        rows = record["data"][stage][key]
        assert rows
        assert all(row["seconds"] > 0 for row in rows)
    assert record["data"]["model"]["prefill_tokens_per_s"] > 0
    assert "no time or share below means anything" in text
    assert "met" not in text.split("## Targets")[1].split("##")[0]
    for title in (
        "Low-bit products", "Paged decode", "Other launches", "Greedy answers",
        "Verifying drafts", "Speculative decoding", "Products that round their inputs",
    ):  # fmt: skip
        assert f"## {title}" in text
    # and where records of real devices lie, nothing has changed
    after = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}
    assert after == before


def test_a_second_call_goes_on_where_the_first_stopped(gpu_check, tmp_path):
    both = ("--only", "bandwidth,lowbit-w8")
    assert gpu_check(*both, "--minutes", "0", expected=1)[0] == {}  # no time: nothing is begun
    assert gpu_check("--only", "bandwidth")[0] == {"bandwidth": "passed"}
    (kept,) = (tmp_path / "work").glob("*/bandwidth.json")
    measured = kept.read_text()
    # one that failed is run again, and one that passed is not
    other = kept.with_name("lowbit-w8.json")
    other.write_text(json.dumps({"name": "lowbit-w8", "status": "failed"}))
    said, first = gpu_check(*both)
    assert "1 of them done before" in first
    assert said == {"lowbit-w8": "passed"}
    assert kept.read_text() == measured
    said, first = gpu_check("--only", "bandwidth", "--restart")
    assert "0 of them done before" in first
    assert kept.read_text() != measured
    assert not other.exists()


def test_targets_are_judged_only_where_all_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import lowbit, report, rounded
    from gpu.stages import Outcome

    def outcomes(**changes):
        def products(rows):
            sizes = {"bytes": 4.5e6, "seconds": 1.25e-6, "dense_seconds": 5e-6, "error": 0.001}
            return [{"linear": name, "rows": rows} | sizes for name in ("qkv", "down")]

        linears = [row for rows in lowbit.ROWS for row in products(rows)]
        outliers = [row | {"operations": 1e9} for rows in rounded.ROWS for row in products(rows)]
        case = {"context": 32768, "batch": 1, "bytes": 4e8, "torch_seconds": 1e-3, "error": 0.001}
        decode = {"batch": 1, "bytes": 4e9}
        data = {
            "bandwidth": {"copy_bytes_per_s": 4e12, "read_bytes_per_s": 4e12},
            "lowbit-w4": {"bits": 4, "linears": linears},
            "rounded-llm.int8": {"kind": "llm.int8", "linears": outliers},
            "attention": {"cases": [case | {"seconds": 2e-4}]},
            "model": {"decode": [decode | {"seconds": 1e-3}]},
            "model-gemlite": {"decode": [decode | {"seconds": 2e-3}]},
        } | changes
        return [Outcome(name, "passed", 1.0, data=value) for name, value in data.items()]

    def judged(**changes):
        record = report.collected({"device": "a GPU"}, outcomes(**changes))
        assert "## Targets" in report.markdown(record)
        return [(round(row["found"] or 0, 2), row["met"]) for row in record["targets"]]

    # 4.5 MB in 1.25 microseconds are 90% of 4 TB/s, and a quarter of cuBLAS's time
    everything = judged()
    assert everything == [
        (0.9, True), (4, True), (4, True), (4, True), (4, True), (0.5, False), (1, True), (2, True)
    ]  # fmt: skip
    products = outcomes()[1].data["linears"]
    del products[4]["seconds"]  # at 4 rows, where the result was wrong
    wrong = judged(**{"lowbit-w4": {"bits": 4, "linears": products}})
    assert wrong[:4] == [(0.9, True), (0, None), (0, None), (4, True)]
    few = {"kind": "llm.int8", "linears": outcomes()[2].data["linears"][:-2]}  # without 4,096 rows
    assert judged(**{"rounded-llm.int8": few})[4] == (0, None)
    assert judged(**{"model-gemlite": {}})[7] == (0, None)
    assert judged(bandwidth={}) == [(0, None)] * 7 + [(2, True)]


STAGES = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from gpu.stages import Skip, Stage, run_here

def good(place): return {{"number": 1}}
def wrong(place): return {{"problems": ["off by 2"]}}
def raises(place): raise ArithmeticError("bad")
def dies(place): os._exit(9)
def hangs(place): time.sleep(60)
def skips(place): raise Skip("not here")

stages = [Stage(f.__name__, f, 2) for f in (wrong, raises, dies, hangs, skips, good)]
if "--child" in sys.argv:
    names = sys.argv[sys.argv.index("--child") + 1].split(",")
    folder = Path(sys.argv[sys.argv.index("--work") + 1])
    run_here([stage for stage in stages if stage.name in names], None, folder)
"""


def test_a_stage_that_breaks_costs_itself_only(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(STAGES.format(benchmarks=str(BENCHMARKS)))
    code = (
        f"import sys, time; sys.path.insert(0, {str(tmp_path)!r}); import script\n"
        "from pathlib import Path\n"
        "from gpu.place import Place\n"
        "from gpu.stages import read, run_in_children\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "deadline = time.monotonic() + 60\n"
        "left = run_in_children(\n"
        "    script.stages, Place(False), folder, folder / 'script.py', deadline, str\n"
        ")\n"
        "assert not left\n"
        "for stage in script.stages:\n"
        "    outcome = read(folder, stage.name)\n"
        "    print(outcome.name, outcome.status, outcome.reason.partition(';')[0], sep='|')\n"
    )
    said = [line.split("|") for line in run("-c", code).splitlines()]
    assert said == [
        ["wrong", "failed", "off by 2"],
        ["raises", "failed", "ArithmeticError: bad"],
        ["dies", "failed", "exit status 9"],
        ["hangs", "failed", "stopped after 2 s"],
        ["skips", "skipped", "not here"],
        ["good", "passed", ""],
    ]


def test_tuning_runs_to_its_end_and_goes_on(tmp_path):
    command = [BENCHMARKS / "tune.py", "--stand-in", "interpreter", "--bits", "4"]
    command += ["--work", tmp_path]
    run(*command, "--minutes", "0", expected=1)
    first, _, table = run(*command).partition("\n")
    assert first.startswith("w4, 8 rows: ")
    rows = [] if "de-quantizing is faster" in first else [(80, 4, 8)]
    found = json.loads(table or "[]")
    assert [(row["capability"], row["bits"], row["most_tokens"]) for row in found] == rows
    (kept,) = tmp_path.glob("*.json")
    times = kept.read_text()
    assert all(json.loads(times).values())
    assert run(*command) == table
    assert kept.read_text() == times
    first, *shapes = run(*command, "--attention").strip().splitlines()
    assert first.endswith("2 of 2 candidates are right")
    assert len(shapes) == 3
    refused = [BENCHMARKS / "tune.py", "--stand-in", "interpreter", "--write"]
    run(*refused, expected=2)
