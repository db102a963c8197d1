"""Disks that are full or may not be written to, memory that is short, weights that are broken."""

import hashlib
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import preflight
from compress.core import resources
from compress.core.blocks import BlockModel
from compress.core.errors import InputError
from compress.core.shards import ShardReader
from compress.pipeline import run_recipe
from compress.recipe import build_recipe


def recipe_for(folder, out, source):
    return build_recipe(
        {
            "model": str(folder),
            "out": out,
            "calibration": {"source": str(source), "samples": 8, "seq_len": 64},
            "stages": [{"method": "awq", "group_size": 16, "scale_points": 2, "clip_points": 2}],
        }
    )


# A file system of its own, of $SIZE, on $PLACE; what the arguments say runs on it.
MOUNTED = 'mount -t tmpfs -o size="$SIZE" none "$PLACE" && exec "$@"'
QUANTIZE = """
import sys
from compress import pipeline
from compress.cli import main
if sys.argv.pop(1) == "unchecked":
    pipeline.check_resources = lambda *_: None
main()
"""
FULL = """
{ "$@"; echo "code $?"; ls -A "$PLACE"; } 2>&1
mount -o remount,size=50m "$PLACE"
{ "$@"; echo "code $?"; ls -A "$PLACE"; } 2>&1
sha256sum "$PLACE"/out/model.safetensors
"""


@pytest.fixture
def on_a_small_disk(tmp_path):
    """A function that runs a shell script, with a command, in a small file system of its own."""
    place = tmp_path / "place"
    place.mkdir()
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(place)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a file system")

    def run(size, script, *command):
        environment = os.environ | {"SIZE": size, "PLACE": str(place)}
        inner = ["unshare", "-rm", "sh", "-c", MOUNTED, "sh", "sh", "-c", script, "sh", *command]
        done = subprocess.run(
            inner, env=environment, stdout=subprocess.PIPE, text=True, timeout=300
        )
        return done.stdout

    return run, place / "out"


def command_for(folder, out, text_file, checked):
    return [
        sys.executable, "-c", QUANTIZE, checked, "quantize", str(folder), "--method", "awq",
        "--group-size", "16", "--calibration", str(text_file), "--samples", "8", "--seq-len", "64",
        "--set", "scale_points=2,clip_points=2", "--out", str(out),
    ]  # fmt: skip


def test_a_disk_that_fills_up_in_the_middle(on_a_small_disk, model_folder, text_file, tmp_path):
    """One line, what was done is kept, and with room the same command ends in the same bytes."""
    run, out = on_a_small_disk
    folder = model_folder(layers=6)
    said = run("220k", FULL, *command_for(folder, out, text_file, "unchecked"))
    before, _, after = said.partition("code 2\n")
    assert f"Error: cannot write output '{out}': No space left on device; what was done" in before
    assert "Traceback" not in said
    assert "Compressing blocks 1/6" in before
    assert after.startswith(".out.progress\n")
    assert "Going on after block" in after
    assert "code 0\nout\n" in after
    run_recipe(recipe_for(folder, tmp_path / "whole", text_file))
    whole = hashlib.sha256((tmp_path / "whole" / "model.safetensors").read_bytes()).hexdigest()
    assert whole in after


def test_too_small_a_disk_is_seen_at_once(on_a_small_disk, model_folder, text_file):
    run, out = on_a_small_disk
    script = '"$@" 2>&1; echo "code $?"; ls -A "$PLACE"'
    said = run("220k", script, *command_for(model_folder(layers=6), out, text_file, "checked"))
    assert f"Error: output '{out}' takes up to" in said
    assert "has 225 kB free; free some, or put --out elsewhere" in said
    assert said.endswith("code 2\n")


def test_a_disk_that_may_not_be_written_to(on_a_small_disk, model_folder, text_file):
    run, out = on_a_small_disk
    script = 'mount -o remount,ro "$PLACE"; "$@" 2>&1; echo "code $?"'
    said = run("50m", script, *command_for(model_folder(), out, text_file, "checked"))
    assert said.endswith(f"Error: cannot write output '{out}': Read-only file system\ncode 2\n")


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_broken_weights_are_named_before_the_first_block(
    broken, name, model_folder, text_file, tmp_path, capsys
):
    folder = shutil.copytree(model_folder("qwen2", torch.bfloat16), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 7] = broken
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"tensor {name} in .* holds NaN or infinite values"):
        run_recipe(recipe_for(folder, tmp_path / "out", text_file))
    assert "Compressing" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_activations_that_overflow_are_named(method, model_folder, text_file, tmp_path):
    """Finite weights whose products float16 does not hold, in the second of two blocks."""
    folder = shutil.copytree(model_folder("qwen2"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = {
        "model": str(folder),
        "out": tmp_path / "out",
        "compute_dtype": "float16",
        "calibration": {"source": str(text_file), "samples": 8, "seq_len": 64},
        "stages": [{"method": method, "group_size": 16}],
    }
    message = "what enters mlp.down_proj of model.layers.1 is NaN or infinite in float16; try"
    with pytest.raises(InputError, match=message):
        run_recipe(build_recipe(values))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    run_recipe(build_recipe(values | {"compute_dtype": "float32"}))


def test_digest_sees_every_element_and_every_dtype(tmp_path):
    """One element changed, two exchanged, or a tensor renamed: another hash."""
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.int64)}
    changed = {
        "as it was": tensors,
        "element": tensors
        | {"a": tensors["a"].clone().index_put_((torch.tensor(2),), torch.ones(4))},
        "order": tensors | {"a": tensors["a"].flip(0)},
        "shape": tensors | {"a": tensors["a"].view(4, 3)},
        "integers": tensors | {"b": torch.zeros(5, dtype=torch.int64)},
        "name": {"c": tensors["a"], "b": tensors["b"]},
    }
    digests = set()
    for name, given in changed.items():
        folder = tmp_path / name
        folder.mkdir()
        save_file(given, folder / "model.safetensors")
        reader = ShardReader(folder)
        digests.add(reader.digest(reader.names))
    assert len(digests) == len(changed)


@pytest.mark.parametrize(
    ("source", "free", "message"),
    [
        ("text", 10_000_000, "takes about 5.. MB of memory, and 10 MB are free"),
        (
            "self",
            10_000,
            "loads the whole model, .* kB, and 10 kB of memory are free",
        ),
    ],
)
def test_short_memory_is_seen_at_once(
    source, free, message, model_folder, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(preflight, "free_memory", lambda: free)
    source = text_file if source == "text" else source
    with pytest.raises(InputError, match=message):
        run_recipe(recipe_for(model_folder(), tmp_path / "out", source))
    assert not list(tmp_path.iterdir())


def test_out_of_memory_keeps_what_was_done(model_folder, text_file, tmp_path, monkeypatch, capsys):
    """What PyTorch says where the system gives it no memory, here in the second block."""
    load = BlockModel.load_block

    def hungry(self, index):
        if index == 1:
            torch.empty(1 << 60, dtype=torch.uint8)
        return load(self, index)

    recipe = recipe_for(model_folder(), tmp_path / "out", text_file)
    with monkeypatch.context() as patched:
        patched.setattr(BlockModel, "load_block", hungry)
        with pytest.raises(InputError, match=r"^out of memory .*; what was done is kept"):
            run_recipe(recipe)
    run_recipe(recipe)
    assert "Going on after block 1 of 2" in capsys.readouterr().err


def test_free_memory_heeds_a_cgroup(tmp_path, monkeypatch):
    """Of a limit of 1000 bytes 700 are used, 300 of them page cache: 600 are free."""
    own = resources.Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
    group = tmp_path / own.lstrip("/")
    group.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    before = resources.free_memory()
    assert before > 1000
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("700\n")
    (group / "memory.stat").write_text("anon 400\nfile 300\n")
    assert resources.free_memory() == 600
    (group / "memory.max").write_text("max\n")
    assert resources.free_memory() > 1000


def test_planned_size_is_the_written_one(model_folder, text_file, tmp_path):
    """Exactly, in every format, with a grid that differs and a linear in float."""
    for format_name in ("compressed-tensors", "gptq", "awq"):
        values = {
            "model": str(model_folder("qwen2", torch.float16)),
            "out": tmp_path / format_name,
            "stages": [
                {"method": "rtn", "group_size": 16, "format": format_name, "ignore": ["o_proj"]}
            ],
        }
        if format_name == "gptq":
            values["stages"][0]["overrides"] = {"down_proj": {"bits": 8}}
        recipe = build_recipe(values)
        needs = preflight.needs_of(preflight.preflight(recipe), 0)
        report = run_recipe(recipe)
        assert needs.output == report["sizes"]["bytes"]
        names = ShardReader(tmp_path / format_name).names
        assert sum(map(ShardReader(tmp_path / format_name).tensor_bytes, names)) == needs.output
