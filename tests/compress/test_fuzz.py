"""Mutated input either works or is refused in one line: model folders, indexes and recipes.

Everything else that could come out (another exception, a crash) fails.  The examples are the same
at each run; `FUZZ_EXAMPLES=3000 pytest tests/compress/test_fuzz.py` draws that many new ones a
test.
"""

import json
import os
import shutil
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from compress.core.errors import InputError
from compress.pipeline import run_recipe
from compress.recipe import build_recipe
from compress.recipe_file import load_recipe

MORE = os.environ.get("FUZZ_EXAMPLES")
FAMILIES = ["llama", "gemma2", "qwen3", "mistral", "phi3", "cohere"]


def fuzz(examples):
    return settings(
        max_examples=int(MORE or examples),
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


numbers = st.one_of(
    st.sampled_from(
        [0, 1, -1, 2, 3, 7, 64, 10**6, 10**9, 10**12, 2**63, 2**64, -(2**70), 10**4000]
    ),
    st.integers(-5, 300),
    st.sampled_from(
        [0.0, 0.5, -0.5, 2.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")]
    ),
)
words = st.sampled_from(
    [
        "",
        " ",
        "x",
        "auto",
        "float32",
        "int8",
        "null",
        "4",
        "../x",
        "a\nb",
        "\x00",
        "\ud800",
        "é" * 300,
    ]
)
scalars = st.one_of(st.none(), st.booleans(), numbers, words, st.text(max_size=8))
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
where = st.integers(0, 9999).map(lambda part: part / 10000)
# (what to do, where, with what)
byte_edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "truncate"]),
        where,
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.text(st.characters(codec="ascii"), min_size=1, max_size=4).map(str.encode),
        ),
    ),
    min_size=1,
    max_size=3,
)


def edit_bytes(data: bytes, edits, start: int = 0, stop: int | None = None) -> bytes:
    """Flip, insert, delete or truncate between start and stop."""
    for kind, place, new in edits:
        at = start + int(place * ((stop or len(data)) - start))
        if kind == "flip":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + len(new) :]
        else:
            data = data[:at]
    return data


def paths_of(value, path=()):
    """The paths of all values in nested lists and dictionaries."""
    entries = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        entries = enumerate(value)
    for key, inner in entries:
        yield (*path, key)
        yield from paths_of(inner, (*path, key))


@st.composite
def mutated(draw, value, extra=()):
    """A copy of nested lists and dictionaries with one to three values replaced, gone or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        paths = list(paths_of(value)) + [(key,) for key in extra]
        if not paths:
            break
        *owners, key = draw(st.sampled_from(paths))
        place = value
        for owner in owners:
            place = place[owner]
        action = draw(st.sampled_from(["replace", "replace", "delete", "move", "add", "near"]))
        if action == "replace":
            place[key] = draw(junk)
        elif action == "near" and (isinstance(place, list) or key in place):
            old = place[key] if isinstance(place[key], int | float) else 1
            place[key] = draw(
                st.sampled_from([old + 1, old - 1, 2 * old, -old, old * 10**9, old // 2])
            )
        elif action == "delete" and (isinstance(place, list) or key in place):
            del place[key]
        elif action == "move" and isinstance(place, dict):
            place[key] = place[draw(st.sampled_from(sorted(place)))]
        elif action == "add" and isinstance(place, dict):
            place[draw(words)] = draw(junk)
    return value


@contextmanager
def copy_of(folder: Path):
    """A folder of its own for one example, with a copy of the model in `model`."""
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(folder, Path(name, "model"))
        save_file(
            {"input_ids": torch.arange(32).view(2, 16) + 3}, str(Path(name, "ids.safetensors"))
        )
        yield Path(name)


def quantize(work: Path, method="rtn"):
    values = {
        "model": str(work / "model"),
        "out": work / "out",
        "calibration": {"source": str(work / "ids.safetensors"), "samples": 2, "seq_len": 16},
        "stages": [{"method": method, "group_size": 16}],
    }
    run_recipe(build_recipe(values))


def check(call, *arguments):
    """Call, and accept success or an InputError of one printable line."""
    try:
        call(*arguments)
    except InputError as error:
        message = str(error)
        assert message
        assert message.isprintable(), ascii(message)  # no line breaks either
        event("refused")
    else:
        event("works")


@fuzz(100)
@given(st.data())
def test_config(model_folder, data):
    folder = model_folder(data.draw(st.sampled_from(FAMILIES)))
    config = json.loads((folder / "config.json").read_text())
    extra = [
        "quantization_config",
        "num_labels",
        "text_config",
        "rope_scaling",
        "n_layer",
        "auto_map",
    ]
    config = data.draw(mutated(config, extra))
    if data.draw(st.integers(0, 9)) == 0:
        config["model_type"] = data.draw(st.sampled_from(sorted(CONFIG_MAPPING)))
    with copy_of(folder) as work:
        (work / "model" / "config.json").write_text(json.dumps(config))
        check(quantize, work, data.draw(st.sampled_from(["rtn", "gptq"])))


@fuzz(60)
@given(edits=byte_edits, name=st.sampled_from(["config.json", "tokenizer.json"]))
def test_bytes_of_json_files(model_folder, edits, name):
    with copy_of(model_folder()) as work:
        path = work / "model" / name
        path.write_bytes(edit_bytes(path.read_bytes(), edits))
        check(quantize, work)


@fuzz(200)
@given(edits=byte_edits, in_header=st.booleans())
def test_bytes_of_safetensors(model_folder, edits, in_header):
    with copy_of(model_folder()) as work:
        path = work / "model" / "model.safetensors"
        data = path.read_bytes()
        stop = 8 + struct.unpack("<Q", data[:8])[0] if in_header else None
        path.write_bytes(edit_bytes(data, edits, stop=stop))
        check(quantize, work, "gptq")


@fuzz(120)
@given(st.data())
def test_header_of_safetensors(model_folder, data):
    """The header changed as a structure: names, dtypes, shapes and offsets, the data as it was."""
    with copy_of(model_folder()) as work:
        path = work / "model" / "model.safetensors"
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        entry = header[name]
        action = data.draw(st.sampled_from(["dtype", "shape", "swap", "rename", "junk"]))
        if action == "dtype":
            # of half, equal or double the size; half and double need another shape to be valid
            entry["dtype"], factor = data.draw(
                st.sampled_from([("I32", 1), ("U32", 1), ("BF16", 2), ("F64", 0.5), ("F8_E4M3", 4)])
            )
            entry["shape"][0] = int(entry["shape"][0] * factor)
        elif action == "shape":
            entry["shape"] = data.draw(
                st.sampled_from(
                    [entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]], []]
                )
            )
        elif action == "swap":
            other = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
            header[name], header[other] = header[other], entry
        elif action == "rename":
            header[data.draw(words)] = header.pop(name)
        else:
            header = data.draw(mutated(header))
        encoded = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + size :])
        check(quantize, work)


@fuzz(120)
@given(st.data())
def test_index(model_folder, data):
    with copy_of(model_folder()) as work:
        model = work / "model"
        tensors = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        names = sorted(tensors)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file_name, inside in shards.items():
            save_file({name: tensors[name] for name in inside}, model / file_name)
        weight_map = {name: file for file, inside in shards.items() for name in inside}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        path = model / "model.safetensors.index.json"
        if data.draw(st.booleans()):
            path.write_text(json.dumps(data.draw(mutated(index))))
        else:
            path.write_bytes(edit_bytes(json.dumps(index).encode(), data.draw(byte_edits)))
        check(quantize, work)


RECIPE = {
    "model": "model",
    "out": "out",
    "dtype": "auto",
    "calibration": {"source": "ids.safetensors", "samples": 2, "seq_len": 16, "seed": 0},
    "stages": [
        {
            "method": "gptq",
            "bits": 4,
            "group_size": 16,
            "symmetric": True,
            "sweeps": 1,
            "clip_points": 3,
            "damping": 0.01,
            "format": "compressed-tensors",
            "ignore": ["o_proj"],
            "overrides": {"down_proj": {"bits": 8}},
        }
    ],
}


def dump(recipe) -> str:
    dumper = type("NoAliases", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    return yaml.dump(recipe, Dumper=dumper)


def run_file(work: Path):
    recipe = load_recipe(work / "recipe.yaml")
    small = recipe.calibration.samples * recipe.calibration.seq_len < 1000
    inside = (work / recipe.out).resolve().is_relative_to(work.resolve())
    if small and inside and recipe.model == "model":
        run_recipe(recipe)


def check_recipe(text: str | bytes, folder: Path, monkeypatch: pytest.MonkeyPatch):
    with copy_of(folder) as work, monkeypatch.context() as patch:
        patch.chdir(work)
        path = work / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        check(run_file, work)


@fuzz(150)
@given(recipe=mutated(RECIPE, ["compute_dtype", "propagate_error"]))
def test_recipe(recipe, model_folder, monkeypatch):
    check_recipe(dump(recipe), model_folder(), monkeypatch)


TOKENS = [
    "*a", "&a", "!!python/object:os.system", "!!timestamp", "!!int", "!!set", "<<: *a", "? ",
    "- ", "{", "}", "[", "]", ": ", "\n", "\n  ", "'", '"', "|", ">", "%YAML 9", "---", "~",
    ".nan", "0x" + "f" * 5000, "9" * 5000, "2020-99-99", "1:60", "\t", "#", "=", "!!binary x",
]  # fmt: skip


@fuzz(200)
@given(
    edits=st.lists(st.tuples(where, st.sampled_from(TOKENS)), max_size=3),
    more=st.one_of(st.just([]), st.just([]), byte_edits),
)
def test_text_of_a_recipe(edits, more, model_folder, monkeypatch):
    text = dump(RECIPE)
    for place, token in edits:
        at = int(place * len(text))
        text = text[:at] + token + text[at:]
    check_recipe(edit_bytes(text.encode(), more), model_folder(), monkeypatch)
