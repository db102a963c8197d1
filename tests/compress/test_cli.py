"""The command line: results on standard output, one clear line and exit code 2 for bad input."""

import json
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.calibration import calibration_tokens
from compress.cli import COMMANDS, main
from compress.cli.quantize import quantize_command
from compress.core.source import resolve_model
from compress.recipe import CalibrationConfig


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def model(model_folder, tmp_path):
    """A copy of the tiny Llama that a test may break."""
    return shutil.copytree(model_folder(), tmp_path / "model")


def quantize(model, out, text_file, *more):
    return run(
        "quantize", model, "--method", "awq", "--bits", 4, "--group-size", 16, "--symmetric",
        "--calibration", text_file, "--samples", 4, "--seq-len", 64, "--out", out, *more,
    )  # fmt: skip


def test_quantize_eval_inspect_generate(model, text_file, tmp_path):
    out = tmp_path / "out"
    done = quantize(model, out, text_file, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)  # one object and nothing else
    assert report["sizes"]["bytes"] < report["sizes"]["original_bytes"]
    assert "Compressing blocks" in done.stderr

    done = run(
        "eval",
        out,
        "--text",
        text_file,
        "--seq-len",
        64,
        "--windows",
        4,
        "--against",
        model,
        "--json",
    )
    scores = json.loads(done.stdout)
    assert scores["perplexity"] > 1
    assert {"kl_mean", "kl_p99", "top1_agreement"} <= set(scores)

    found = json.loads(run("inspect", out, "--json").stdout)
    assert found["quantization"]["quantized_linears"] == 14
    # 4 bits, a 32-bit scale for each 16, the two-number shapes of 14 small matrices
    assert found["quantization"]["bits_per_weight"] == pytest.approx(6, abs=0.15)
    assert "4 bits, symmetric, group size 16" in run("inspect", out).stdout

    said = json.loads(run("generate", out, "--prompt", "w5 w7", "--max-tokens", 5, "--json").stdout)
    assert 1 <= said["tokens"] <= 5

    assert quantize(model, out, text_file).exit_code == 2  # exists
    done = quantize(model, out, text_file, "--overwrite")
    assert done.exit_code == 0
    assert "left in float" in done.stdout


def test_recipe_file_and_flags_give_the_same_bytes(model, text_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {model}
out: {tmp_path / "from-recipe" / "out"}
calibration: {{source: {text_file}, samples: 4, seq_len: 64}}
stages:
  - {{method: awq, bits: 4, group_size: 16, symmetric: true}}
"""
    )
    done = run("run", recipe, "--json")
    assert done.exit_code == 0, done.output
    assert quantize(model, tmp_path / "from-flags" / "out", text_file).exit_code == 0
    one, two = (tmp_path / name / "out" for name in ("from-recipe", "from-flags"))
    for file in ("model.safetensors", "compress.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_doctor_says_what_is_missing(monkeypatch):
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["packages"]["torch"] == torch.__version__
    monkeypatch.setitem(__import__("compress.cli.doctor").cli.doctor.PACKAGES, "no-such", "a test")
    monkeypatch.setenv("COMPRESS_CPU_KERNELS", "torch")
    assert "PyTorch's, slower: COMPRESS_CPU_KERNELS" in run("doctor").stdout
    assert "missing: a test" in run("doctor").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"compress {command} " in done.stdout or command == "doctor"


def test_help_states_the_dataclasses_defaults():
    """Help must not import torch to read the defaults, so this holds the two together."""
    from dataclasses import fields

    from compress.quant.awq import AwqConfig
    from compress.quant.llm_int8 import LlmInt8Config
    from compress.recipe import CalibrationConfig, Recipe

    of = (LlmInt8Config, Recipe, CalibrationConfig, AwqConfig)  # the later ones count
    defaults = {f.name: f.default for cls in of for f in fields(cls)}
    defaults["outlier_threshold"] = f"{LlmInt8Config().outlier_threshold:g}"
    defaults |= {"calibration": CalibrationConfig().source}
    defaults |= {"activation_memory": "a quarter of what is free"}  # kept_in_memory
    for name in ("samples", "seq_len", "seed"):
        defaults[name] = getattr(CalibrationConfig(), name)
    words = {("symmetric", True): "symmetric", ("clip", True): "clip"}
    checked = 0
    for option in quantize_command.params:
        stated = re.search(r"\[default: (.*?)\]", getattr(option, "help", None) or "")
        if stated:
            value = defaults[option.name]
            assert stated[1] == words.get((option.name, value), str(value)), option.name
            checked += 1
    assert checked == 12


BAD_FLAGS = [
    (["--method", "awk"], "unknown method 'awk'"),
    (["--bits", "5"], "bits"),
    (["--bits", "four"], "not a valid integer"),
    (["--format", "ggml"], "format = 'ggml'"),
    (
        ["--format", "awq", "--bits", "8"],
        "format awq cannot hold model.layers.0.self_attn.q_proj: ",
    ),
    (["--format", "gptq", "--bits", "3"], "48 outputs of 3 bits do not fill words of 32 bits"),
    (["--ignore", "dwn_proj"], "did you mean 'down_proj'"),
    (["--group-size", "some"], "group_size"),
    (["--calibration", "absent.txt"], "calibration file 'absent.txt' does not exist"),
    (["--calibration", "no/such-data-set"], "no/such-data-set"),
    (["--samples", "1000"], "1000 samples of 64 need 64000"),
    (["--samples", "0"], "samples"),
    (["--dtype", "float8"], "dtype"),
    (["--method", "rtn", "--set", "clip=true"], "unknown key 'clip' for quantize: method rtn"),
    (["--set", "down_proj:bits=5"], "bits"),
    (["--set", "down_proj:bit=8"], "did you mean 'bits'"),
    (["--set", "dwn_proj:bits=8"], "did you mean 'down_proj'"),
    (["--set", "bits"], "--set 'bits' is not"),
    (["--no-such-flag"], "No such option"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS)
def test_bad_flags_give_one_line_and_leave_nothing(flags, message, model, text_file, tmp_path):
    out = tmp_path / "results" / "out"
    check_refused(quantize(model, out, text_file, *flags), message)
    left = list(out.parent.iterdir()) if out.parent.exists() else []
    assert [path.name for path in left if not path.name.endswith(".lock")] == []


def check_refused(done, message):
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def poison(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reshape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN_MODELS = [
    (drop_tensor, "no tensor model.layers.1.mlp.up_proj.weight"),
    (poison, "tensor model.layers.1.mlp.up_proj.weight"),
    (reshape, "model.norm.weight"),
    (truncate, "truncated or corrupt"),
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json"),
    (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors"),
    (lambda f: set_config(f, model_type="no-such"), "config.json"),
    (lambda f: set_config(f, model_type="bert"), "config.json calls for|causal|no tensor"),
    (lambda f: set_config(f, quantization_config={"quant_method": "awq"}), "already quantized"),
    (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "tokenizer"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN_MODELS)
def test_broken_models_are_refused(damage, message, model, text_file, tmp_path):
    damage(model)
    done = quantize(model, tmp_path / "out", text_file)
    if "|" in message:
        message = next((m for m in message.split("|") if m in done.stderr), message)
    check_refused(done, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("./absent", "model folder './absent' does not exist"),
        ("smolm2", "did you mean 'smollm2'"),
        ("nobody/no-such-model", "nobody/no-such-model"),
    ],
)
def test_missing_models_are_refused(ref, message, text_file, tmp_path):
    check_refused(quantize(ref, tmp_path / "out", text_file), message)


def test_empty_and_binary_calibration_files(model, tmp_path):
    for content, message in ((b"", "has 0 tokens"), (b"\xff\xfe\x00\x01", "not UTF-8")):
        path = tmp_path / "text.txt"
        path.write_bytes(content)
        check_refused(quantize(model, tmp_path / "out", path), message)


def test_calibration_from_token_ids(model, text_file, tmp_path):
    """The tokens of a text run, handed in as ids, give the same weights."""
    config = CalibrationConfig(str(text_file), samples=4, seq_len=64)
    ids = calibration_tokens(config, resolve_model(str(model)), 128, torch.device("cpu"))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    reports = [
        json.loads(quantize(model, tmp_path / f"{source.name}-out", source, "--json").stdout)
        for source in (text_file, tmp_path / "ids.safetensors")
    ]
    assert reports[0]["calibration_sha256"] == reports[1]["calibration_sha256"]
    save_file({"input_ids": ids[:, :63].contiguous()}, tmp_path / "few.safetensors")
    few = quantize(model, tmp_path / "out", tmp_path / "few.safetensors")
    check_refused(few, "holds token ids [4, 63], fewer than 4 samples of 64")
    save_file({"ids": ids}, tmp_path / "other.safetensors")
    other = quantize(model, tmp_path / "out", tmp_path / "other.safetensors")
    check_refused(other, "no readable tensor 'input_ids'")


def test_settings_of_some_linears(model, text_file, tmp_path):
    out = tmp_path / "out"
    flags = ["--set", "down_proj:bits=8,group_size=40", "--set", "sweeps=1", "--method", "gptq"]
    done = quantize(model, out, text_file, *flags)
    assert done.exit_code == 0, done.stderr
    recipe = json.loads((out / "compress.json").read_text())["recipe"]["stages"][0]
    assert recipe["overrides"] == {"down_proj": {"bits": 8, "group_size": 40}}
    assert (recipe["sweeps"], recipe["bits"]) == (1, 4)
    layers = json.loads((out / "compress.json").read_text())["layers"]
    found = {(la["bits"], la["group_size"]) for la in layers if la["name"].endswith("down_proj")}
    assert found == {(8, 40)}
    # transformers and compressed-tensors read both grids
    AutoModelForCausalLM.from_pretrained(out)


def test_calibration_from_jsonl_and_parquet_equals_text(model, text_file, tmp_path):
    import pyarrow
    import pyarrow.parquet

    row = {"text": text_file.read_text()}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    prints = set()
    for path in (text_file, tmp_path / "rows.jsonl", tmp_path / "rows.parquet"):
        done = quantize(model, tmp_path / path.suffix[1:], path, "--json")
        prints.add(json.loads(done.stdout)["calibration_sha256"])
    assert len(prints) == 1
    (tmp_path / "bad.jsonl").write_text('{"content": "x"}\n')
    check_refused(quantize(model, tmp_path / "out", tmp_path / "bad.jsonl"), "no text field 'text'")
    (tmp_path / "bad.jsonl").write_text("{")
    check_refused(quantize(model, tmp_path / "out", tmp_path / "bad.jsonl"), "cannot read")


def test_calibration_from_a_data_set(model, text_file, tmp_path):
    """A local folder goes the way of a data set id: streamed through `datasets`."""
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text(json.dumps({"text": text_file.read_text()}) + "\n")
    done = quantize(model, tmp_path / "out", f"{rows}::train", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["recipe"]["calibration"]["source"] == f"{rows}::train"
    check_refused(quantize(model, tmp_path / "no", f"{rows}::test"), "as a data set failed")


def test_values_too_large_for_the_dtype_are_refused(model, text_file, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][5] = 1e6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    done = quantize(model, tmp_path / "out", text_file, "--dtype", "float16")
    check_refused(done, "tensor model.norm.weight has values up to 1e+06, too large for float16")


def test_two_runs_on_one_output(model, text_file, tmp_path):
    from compress.core.outfolder import OutputFolder

    with OutputFolder(tmp_path / "out", overwrite=False) as work:
        work.begin({})
        check_refused(quantize(model, tmp_path / "out", text_file), "another run")
        (work.output / "file").write_text("done")
    assert (tmp_path / "out" / "file").read_text() == "done"


def test_an_interrupt_keeps_what_was_done(model, text_file, tmp_path, monkeypatch):
    from compress.core.shards import ShardWriter

    def interrupt(self, parts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "finish", interrupt)
        done = quantize(model, tmp_path / "out", text_file)
    assert done.exit_code == 130
    assert "Interrupted" in done.stderr
    assert "What was done is kept: run the same command again" in done.stderr
    assert not (tmp_path / "out").exists()
    done = quantize(model, tmp_path / "out", text_file)
    assert done.exit_code == 0
    assert "Going on after block 2 of 2" in done.stderr
    assert [path.name for path in tmp_path.glob(".out*")] == []


def test_dry_run_writes_nothing_and_foretells_sizes(model, text_file, tmp_path):
    out = tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    plan = quantize(model, out, text_file, "--dry-run", "--json")
    shown = quantize(model, out, text_file, "--dry-run")
    assert plan.exit_code == shown.exit_code == 0, plan.output
    assert sorted(tmp_path.rglob("*")) == before
    assert "nothing was written" in shown.stdout
    plan = json.loads(plan.stdout)
    report = json.loads(quantize(model, out, text_file, "--json").stdout)
    assert plan["output_bytes"] == report["sizes"]["bytes"]
    assert (
        plan["activation_bytes"]
        == 4 * 64 * 48 * {"bfloat16": 2, "float32": 4}[report["compute_dtype"]]
    )
    assert plan["disk_bytes"] >= 2 * plan["output_bytes"]
    assert plan["seconds"] > 0
    assert plan["linears"] == 14


@pytest.mark.parametrize(
    ("given", "bytes_"), [("500MB", 5e8), ("2 GiB", 2 << 30), ("1.5k", 1500), ("7", 7)]
)
def test_sizes(given, bytes_):
    from compress.cli.options import Size

    assert Size()(given) == bytes_


def test_no_size(model, text_file, tmp_path):
    done = quantize(model, tmp_path / "out", text_file, "--activation-memory", "much")
    check_refused(done, "'much' is no size; give a number and a unit, such as 500MB")
