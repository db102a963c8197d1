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
import shutil
import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from gpu import kernel_tests
from gpu.place import ROOT, Place, revision
from gpu.stages import Outcome, Stage, read, run_here, run_in_children


def call(module: str, function: str, place: Place, **settings: Any) -> dict[str, Any]:
    """Import a module of gpu/ only where it runs: in a child, whose environment is right."""
    return getattr(import_module(f"gpu.{module}"), function)(place, **settings)


def all_stages() -> list[Stage]:
    """In the order in which they run."""
    decode = {"batches": (1, 16, 64)}
    return [
        Stage("bandwidth", partial(call, "timing", "bandwidth"), 60),
        *(
            Stage(kernel_tests.name_of(path), partial(kernel_tests.measure, path=path))
            for path in kernel_tests.files()
        ),
        Stage("parity-families", partial(call, "parity", "families"), 120),
        Stage("parity-itself", partial(call, "parity", "itself"), 60),
        Stage("parity-real", partial(call, "parity", "real"), 120),
        Stage("lowbit-w4", partial(call, "lowbit", "measure", bits=4), 120),
        Stage("attention", partial(call, "attention", "measure"), 90),
        Stage("model", partial(call, "model", "measure", **decode), 120),
        Stage("speculation", partial(call, "speculation", "texts"), 120),
        Stage("speculation-real", partial(call, "speculation", "real"), 120),
        Stage("verify", partial(call, "speculation", "steps", batches=(1, 4, 16, 64)), 120),
        Stage("model-gemlite", partial(call, "peers", "gemlite"), 150),
        Stage("model-dense", partial(call, "peers", "dense"), 90),
        *(
            Stage(f"lowbit-w{bits}", partial(call, "lowbit", "measure", bits=bits, few=True), 90)
            for bits in (2, 3, 8)
        ),
        *(
            Stage(f"rounded-{kind}", partial(call, "rounded", "measure", kind=kind), 120)
            for kind in ("int8", "llm.int8", "fp8")
        ),
        Stage("small", partial(call, "small", "measure"), 60),
    ]


@click.command()
@click.option("--restart", is_flag=True, help="Forget what earlier calls have found.")
@click.option(
    "--stand-in", type=click.Choice(["interpreter"]),
    help="Run without a GPU, on tiny sizes; no time means anything then.",
)  # fmt: skip
@click.option("--only", help="Names of stages, with commas.  [default: all]")
@click.option(
    "--work", type=click.Path(path_type=Path), default=ROOT / "build" / "gpu-check",
    help="Where results of stages are kept.  [default: build/gpu-check]",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path),
    help="Folder for the record.  [default: benchmarks/results; a temporary one for a stand-in]",
)  # fmt: skip
@click.option(
    "--minutes", type=click.FloatRange(0), default=8.5, show_default=True,
    help="No stage goes on longer; what is left is for the next call.",
)  # fmt: skip
@click.option("--child", hidden=True, help="Names of stages to run in this process.")
def main(
    restart: bool, stand_in: str | None, only: str | None, work: Path, output: Path | None,
    minutes: float, child: str | None,
) -> None:  # fmt: skip
    """Test, compare and time the kernels and the runtime on this machine's GPU."""
    place = Place(stand_in is not None)
    known = {stage.name: stage for stage in all_stages()}
    if child:
        return run_here([known[name] for name in child.split(",")], place, work)
    names = only.split(",") if only else list(known)
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"stage '{unknown[0]}' is unknown; there are {', '.join(known)}")
    _check(place)
    started = time.monotonic()
    folder = work / f"{place.slug}-{place.key}"
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    kept = [name for name in names if (outcome := read(folder, name)) and outcome.settled]
    click.echo(f"{place.facts['device']}: {len(names)} stages, {len(kept)} of them done before")
    todo = [known[name] for name in names if name not in kept]
    script, deadline = Path(__file__).resolve(), started + 60 * minutes
    left = run_in_children(todo, place, folder, script, deadline, click.echo)
    outcomes = [outcome for name in known if (outcome := read(folder, name))]
    path = _write(place, outcomes, output)
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    click.echo(f"{path} after {time.monotonic() - started:.0f} s, {len(failed)} stages failed")
    if left:
        click.echo(f"No time for {', '.join(stage.name for stage in left)}: call again to go on")
    sys.exit(1 if failed or left else 0)


def _check(place: Place) -> None:
    """UsageError where the check cannot run at all."""
    if find_spec("compress") is None:
        raise click.UsageError("compress is not installed; pip install -e . in the repository")
    import torch

    if not place.stand_in and not torch.cuda.is_available():
        raise click.UsageError(
            "torch finds no GPU here; --stand-in interpreter proves the command without one"
        )


def _write(place: Place, outcomes: list[Outcome], output: Path | None) -> Path:
    """The record as JSON and Markdown; returns the latter's path."""
    from gpu import report

    if output is None:
        output = ROOT / "benchmarks" / "results"
        if place.stand_in:
            output = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    output.mkdir(parents=True, exist_ok=True)
    facts = place.facts | {"revision": revision(), "date": time.strftime("%Y-%m-%d")}
    record = report.collected(facts | {"stand_in": place.stand_in}, outcomes)
    path = output / f"{place.slug}.md"
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.write_text(report.markdown(record), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
