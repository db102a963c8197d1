"""Checkpoints whose activations are rounded: what others make of them, and what we read back."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.cli import main
from compress.core.errors import InputError
from compress.core.shards import BESIDE, ShardReader, ShardWriter
from compress.core.source import ModelSource
from compress.export import export_model
from compress.inspection import inspect_folder
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.planning.inputs import stored_weights
from compress.quant.packed import PackedFolder
from compress.recipe import build_recipe
from compress.runtime.stored import StoredModel
from compress.targets import check_target

METHODS = ["llm-int8", "smoothquant", "fp8"]
TOKENS = torch.randint(3, 120, (2, 40), generator=torch.Generator().manual_seed(3))


def quantize(folder, out, text_file, method, **settings):
    values = {
        "model": str(folder),
        "out": out,
        "compute_dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 4, "seq_len": 64},
        "stages": [{"method": method, **settings}],
    }
    return run_recipe(build_recipe(values))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.float()


def packed(folder):
    return PackedFolder(ModelSource("out", folder))


def rounded_by_hand(x, inputs):
    """Rounded inputs as the format's definition says, for one token after another: [in] each."""
    rows = []
    for row in x:
        exact = torch.zeros(len(row), dtype=torch.bool)
        if inputs.threshold is not None:
            exact |= row.abs() >= inputs.threshold
        if inputs.outlier_index is not None:
            exact[inputs.outlier_index] = True
        step = row[~exact].abs().max() / inputs.largest
        codes = row / step
        if inputs.kind == "int8":
            codes = codes.round().clamp(-128, 127)
        else:
            codes = codes.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        rows.append(torch.where(exact, row, codes * step))
    return torch.stack(rows)


def by_hand(original, out):
    """The original class with our weights, whose linears round what enters them."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    folder = packed(out)
    for name in folder.others:
        if name.removesuffix(".weight") not in folder.linears:
            model.get_parameter(name).data = folder.load(name).float()
    for name in folder.linears:
        weight = folder.weight(name)
        linear = model.get_submodule(name)
        linear.weight.data = weight.dequantize().float()

        def before(_module, args, inputs=weight.inputs):
            x = args[0]
            return (rounded_by_hand(x.flatten(0, -2), inputs).view_as(x),)

        linear.register_forward_pre_hook(before)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_computes_what_the_format_defines(
    method, family, model_folder, text_file, tmp_path
):
    """compressed-tensors, through transformers, for two of them; our own hooks for LLM.int8."""
    folder, out = model_folder(family), tmp_path / "out"
    quantize(folder, out, text_file, method)
    expected, ours = logits(by_hand(folder, out)), logits(load_model(out))
    original = logits(load_model(folder))
    # The same float32 operations, but for the order of sums: a code on the edge between two could
    # fall to the other side, which moves logits by some 1e-3 of what rounding in all moves them.
    error = (expected - original).norm()
    assert error > 0
    assert (ours - expected).norm() <= 0.05 * error


def test_bitsandbytes_computes_the_same_linears(model_folder, text_file, tmp_path):
    """For one token, on inputs that float16 holds, which bitsandbytes turns them into."""
    pytest.importorskip("bitsandbytes")
    folder, out = model_folder("llama", torch.float16), tmp_path / "out"
    quantize(folder, out, text_file, "llm-int8", outlier_columns=0, outlier_threshold=50.0)
    assert all(packed(out).weight(n).inputs.outlier_index is None for n in packed(out).linears)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 6.0  # nothing is stored: all at run time
    (out / "config.json").write_text(json.dumps(config))
    ours = load_model(out)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for name in packed(out).linears:
        linear = theirs.get_submodule(name)
        assert type(linear).__name__ == "Linear8bitLt"
        for outliers in (0, 3):
            x = torch.randn(1, linear.in_features, generator=generator).half().float()
            x[0, 5 : 5 + outliers] = 9.25
            with torch.no_grad():
                expected, found = linear(x), ours.get_submodule(name)(x)
            # bitsandbytes' constant for 1 / 127² is off by 2e-5
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_bitsandbytes_loads_the_folder(family, model_folder, text_file, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder, out = model_folder(family, torch.float16), tmp_path / "out"
    quantize(folder, out, text_file, "llm-int8", ignore=["layers.1.self_attn.k_proj"])
    theirs, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float16, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kinds = {name: type(module).__name__ for name, module in theirs.named_modules()}
    assert kinds["model.layers.0.self_attn.k_proj"] == "Linear8bitLt"
    assert kinds["model.layers.1.self_attn.k_proj"] == "Linear"
    assert kinds["lm_head"] == "Linear"
    original = logits(load_model(folder))
    ours, found = logits(load_model(out)), logits(theirs.eval())
    # It rounds inputs to float16 first, finds other outliers, and has their weights in int8: of the
    # order of the rounding itself, where a wrong scale or row would be of the order of the logits.
    error = (ours - original).norm()
    assert (found - ours).norm() <= 4 * error
    assert error <= 0.05 * original.norm()


def test_a_folder_that_bitsandbytes_wrote_is_read(model_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    folder, out = model_folder("qwen2", torch.float16), tmp_path / "out"
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float16
    )
    theirs.save_pretrained(out)
    assert packed(out).beside is None
    for name in packed(out).linears:
        weight, stored = packed(out).weight(name), theirs.get_submodule(name).weight
        assert weight.inputs.outlier_index is None
        assert weight.inputs.threshold is None
        torch.testing.assert_close(
            weight.dequantize(), stored.CB * stored.SCB.unsqueeze(1) / 127, rtol=1e-6, atol=0
        )
    original = logits(load_model(folder))
    assert 0 < (logits(load_model(out)) - original).norm() < 0.05 * original.norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_runtimes_form_holds_the_same(method, model_folder, text_file, tmp_path):
    """LinearWeight's fields, put into its own formula, give what evaluation gives."""
    folder, out = model_folder("qwen2"), tmp_path / "out"
    quantize(folder, out, text_file, method)
    stored, evaluated = StoredModel(ModelSource("out", out)), load_model(out)
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    x[2, 11] = 30.0
    name = "model.layers.1.self_attn.q_proj"
    linear = stored.linear(name)
    inputs = linear.inputs
    assert (linear.bits, linear.group_size, linear.shift) == (8, 48, None)
    assert linear.scale.shape == (48, 1)
    assert linear.scale.dtype == torch.float32
    rounded = rounded_by_hand(x, inputs)
    index = inputs.outlier_index if inputs.outlier_index is not None else torch.empty(0).long()
    others = [i for i in range(48) if i not in set(index.tolist())]
    y = rounded[:, others] @ (linear.codes.float() * linear.scale)[:, others].T + linear.bias
    if len(index):
        y += x[:, index] @ inputs.outlier_weight.float().T
    with torch.no_grad():  # compressed-tensors takes a matrix for one token, hence x[None]
        found = evaluated.get_submodule(name)(x[None])[0]
    # float32 sums in another order, of outputs up to 30
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)


def test_outlier_columns_are_stored_as_they_were(model_folder, text_file, tmp_path):
    folder, out = model_folder("llama", torch.bfloat16), tmp_path / "out"
    report = quantize(folder, out, text_file, "llm-int8")
    plain, beside = ShardReader(folder), ShardReader(out / BESIDE)
    for name in packed(out).linears:
        index = beside.load(f"{name}.outlier_index")
        assert len(index)
        exact = beside.load(f"{name}.outlier_weight")
        assert exact.dtype == torch.bfloat16
        assert torch.equal(exact, plain.load(f"{name}.weight")[:, index.long()])
    stored = sum(
        reader.tensor_bytes(name) for reader in (ShardReader(out), beside) for name in reader.names
    )
    assert report["sizes"]["bytes"] == stored == inspect_folder(out)["bytes"]
    q, k = ("model.layers.0.self_attn." + part for part in ("q_proj", "k_proj"))
    shared = [beside.load(f"{name}.outlier_index") for name in (q, k)]
    assert torch.equal(*shared)


def test_a_broken_off_run_gives_the_same_bytes(model_folder, text_file, tmp_path, monkeypatch):
    """Broken off while the second block's outliers are written."""
    quantize(model_folder(), tmp_path / "whole", text_file, "llm-int8")
    write = ShardWriter.write

    def failing(self, part, tensors):
        if self.folder.name == BESIDE and part.endswith("1"):
            raise KeyboardInterrupt
        write(self, part, tensors)

    monkeypatch.setattr(ShardWriter, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize(model_folder(), tmp_path / "out", text_file, "llm-int8")
    monkeypatch.undo()
    quantize(model_folder(), tmp_path / "out", text_file, "llm-int8")
    for name in ("model.safetensors", f"{BESIDE}/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [path.name for path in (tmp_path / "out" / BESIDE).iterdir()] == ["model.safetensors"]


WORDS = {"llm-int8": "w8a8", "smoothquant": "w8a8", "fp8": "fp8"}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_said_of_it(method, model_folder, text_file, tmp_path):
    out = tmp_path / "out"
    quantize(model_folder("llama", torch.float16), out, text_file, method)
    kind = "fp8" if method == "fp8" else "int8"
    inspected = inspect_folder(out)["quantization"]
    (group,) = inspected["groups"].values()
    assert (group["num_bits"], group["group_size"], group["inputs"]) == (8, None, kind)
    assert inspected["quantized_linears"] == 14
    assert inspected["bits_per_weight"] >= 8
    printed = CliRunner().invoke(main, ["inspect", str(out)]).output
    assert f"inputs rounded to {kind}" in " ".join(printed.replace("│", " ").split())
    html = (out / "report.html").read_text()
    assert f"<td>{kind}</td>" in html
    assert "one scale a row" in html
    card = (out / "README.md").read_text()
    assert f"Activations are rounded to {kind}" in card
    assert "one scale a row" in card
    assert ("bitsandbytes" in card) == (method == "llm-int8")
    assert stored_weights(json.loads((out / "config.json").read_text())) == WORDS[method]
    verdict = check_target(packed(out), "transformers")
    assert verdict["loads"] is True
    assert check_target(packed(out), "vllm")["loads"] is (None if method == "llm-int8" else True)
    with pytest.raises(InputError, match="rounds inputs as well"):
        export_model(str(out), "gptq", tmp_path / "exported")


def test_weights_alone_are_not_exported_to_bitsandbytes(model_folder, text_file, tmp_path):
    quantize(model_folder(), tmp_path / "out", text_file, "rtn", bits=8, group_size="channel")
    with pytest.raises(InputError, match="llm-int8"):
        export_model(str(tmp_path / "out"), "bitsandbytes", tmp_path / "exported")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "llm-int8", "--bits", "4"], "bits = 4: Input should be 8"),
        (["--method", "fp8", "--group-size", "64"], "unknown key 'group_size'"),
        (["--method", "gptq", "--outlier-threshold", "6"], "unknown key 'outlier_threshold'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message, model_folder, tmp_path):
    command = ["quantize", str(model_folder()), "--out", str(tmp_path / "out"), *flags]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_the_threshold_is_a_flag(model_folder, text_file, tmp_path):
    out = str(tmp_path / "out")
    command = ["quantize", str(model_folder()), "--out", out, "--method", "llm-int8"]
    result = CliRunner().invoke(main, [*command, "--outlier-threshold", "0"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_threshold"] == 0.0
    assert config["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"input_activations": {"num_bits": 8, "dynamic": False}}, "quantized activations other"),
        ({"output_activations": {"num_bits": 8}}, "quantized activations other"),
        ({"input_activations": None}, "fp8 weights without quantized activations"),
    ],
)
def test_other_schemes_of_activations_are_refused(
    damage, message, model_folder, text_file, tmp_path
):
    out = tmp_path / "out"
    quantize(model_folder(), out, text_file, "fp8")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"] |= damage
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        packed(out)


def test_a_copy_without_outlier_columns_loads_and_says_so(
    model_folder, text_file, tmp_path, capsys
):
    """The same codes without any stored column, as bitsandbytes' own files are."""
    out = tmp_path / "out"
    quantize(model_folder(), out, text_file, "llm-int8", outlier_threshold=2.0)
    shutil.rmtree(out / BESIDE)
    model = load_model(out)
    assert "has no folder outliers" in capsys.readouterr().err
    for name in packed(out).linears:
        codes = packed(out).reader
        expected = codes.load(f"{name}.weight") * codes.load(f"{name}.SCB")[:, None] / 127
        found = model.get_submodule(name).weight
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # SCB * (1 / 127)
    linear = StoredModel(ModelSource("out", out)).linear("model.layers.0.mlp.down_proj")
    assert "has no folder outliers" in capsys.readouterr().err
    assert linear.inputs is not None
    assert linear.inputs.outlier_index is None


def test_a_part_of_the_outlier_columns_is_refused(model_folder, text_file, tmp_path):
    out = tmp_path / "out"
    quantize(model_folder(), out, text_file, "llm-int8", outlier_threshold=2.0)
    stored = load_file(out / BESIDE / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    left = {key: value for key, value in stored.items() if not key.startswith(name)}
    save_file(left, out / BESIDE / "model.safetensors")
    with pytest.raises(InputError, match=f"{name} .* outliers has no outlier_index and no outlier"):
        packed(out).weight(name)


def test_a_dry_run_says_what_it_does_not_count(model_folder, text_file, tmp_path):
    """Which columns are outliers only calibration tells; without a threshold there are none."""
    command = ["quantize", str(model_folder()), "--method", "llm-int8", "--out"]
    command += [str(tmp_path / "out"), "--calibration", str(text_file), "--samples", "4"]
    command += ["--seq-len", "64", "--json"]

    def told(*more):
        return json.loads(CliRunner().invoke(main, [*command, *more]).stdout)

    assert told("--dry-run")["output_note"] == "outlier columns not counted"
    none = told("--dry-run", "--outlier-threshold", "0")
    assert none["output_note"] is None
    assert none["output_bytes"] == told("--outlier-threshold", "0")["sizes"]["bytes"]
