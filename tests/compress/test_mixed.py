"""`--target-bits`: from a model folder to a checkpoint with bits of its own for each linear."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from compress.cli import main
from compress.core.activations import Activations
from compress.core.blocks import BlockModel, linears_of
from compress.core.commits import Commits
from compress.core.errors import InputError
from compress.core.source import resolve_model
from compress.engines import load_predictor
from compress.inspection import inspect_folder
from compress.pipeline import run_recipe
from compress.probe import Probe
from compress.quant.config import Grid
from compress.quant.packed import PackedFolder
from compress.quant.sensitivity import LinearSensitivity
from compress.recipe import build_recipe
from compress.runtime.scoring import Span
from tests.compress.test_pipeline import TOKENS, dense_logits, quantization_of

CHOICES = {"choose_bits": [3, 4, 8], "choose_group_sizes": [16]}
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "cohere", "granite"]


def values(folder, text_file, method="gptq", dtype="bfloat16", **settings):
    return {
        "model": str(folder),
        "compute_dtype": "float32",
        "dtype": dtype,
        "calibration": {"source": str(text_file), "samples": 8, "seq_len": 64},
        "stages": [{"method": method, "target_bits": 5.4, **CHOICES, **settings}],
    }


def quantize(folder, out, text_file, **settings):
    return run_recipe(build_recipe(values(folder, text_file, **settings) | {"out": out}))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_follows_the_blocks_is_that_of_the_class(family, model_folder):
    """`BlockModel.predicting` against the whole model: the same operations, so nearly its bits."""
    folder = model_folder(family)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(3, 120, (2, 30), generator=torch.Generator().manual_seed(1))
    model = BlockModel(resolve_model(str(folder)), torch.device("cpu"), torch.float32)
    before = {name: id(parameter) for name, parameter in model.skeleton.named_parameters()}
    last = {}
    blocks = whole.get_submodule(model.blocks_name)
    blocks[-1].register_forward_hook(lambda _m, _a, out: last.update(out=out))
    with torch.no_grad():
        logits = whole(tokens).logits
        states = last["out"][0] if isinstance(last["out"], tuple) else last["out"]
        with model.predicting() as predict:
            found = predict(states)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    after = {name: id(parameter) for name, parameter in model.skeleton.named_parameters()}
    assert after == before
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_probe_against_the_gradients_of_the_whole_model(family, model_folder, tmp_path):
    """Block by block from files, and autograd through the whole model with the same draws."""
    folder = model_folder(family, layers=3)
    model = BlockModel(resolve_model(str(folder)), torch.device("cpu"), torch.float32)
    tokens = torch.randint(3, 120, (6, 40), generator=torch.Generator().manual_seed(1))
    names = [
        f"{model.block_name(i)}.{n}" for i in range(3) for n in linears_of(model.meta_block(i))
    ]
    grids = [Grid(3, 16), Grid(8, 16)]
    commits = Commits(tmp_path / "commits")
    commits.begin({})
    probe = Probe(model, tokens, commits, tmp_path / "hidden")
    found = probe.losses(dict.fromkeys(names, grids), torch.float32)
    assert list((tmp_path / "hidden").iterdir()) == []

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    whole.get_input_embeddings().weight.requires_grad_(True)
    seen = {}

    def watch(name):
        def hook(_module, args, output):
            output.register_hook(
                lambda g: seen.setdefault(name, []).append((args[0][0].detach(), g[0]))
            )

        return hook

    for name in names:
        whole.get_submodule(name).register_forward_hook(watch(name))
    generator = torch.Generator().manual_seed(0)
    for row in tokens:
        predicted = F.log_softmax(whole(row[None]).logits[0].float(), dim=-1)
        drawn = torch.multinomial(predicted.detach().exp(), 1, generator=generator)
        predicted.gather(1, drawn).sum().backward()
    for name in names:
        expected = LinearSensitivity(whole.get_submodule(name))
        for x, gradient in seen[name]:
            expected.add(x, gradient)
        weight = whole.get_submodule(name).weight.data
        prices = expected.increases(weight, grids, torch.float32, tokens.numel())
        # float32, in another order of sums; where two scales of a group are nearly as good the
        # other one may be taken, which moved a price by 0.4%
        assert found[name] == pytest.approx(prices, rel=2e-2), name


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq", "rtn"])
def test_it_is_the_recipe_that_names_the_grids(method, model_folder, text_file, tmp_path):
    """The same bytes as with overrides for each linear, and the bits that were asked for."""
    folder = model_folder("llama", layers=3)
    report = quantize(folder, tmp_path / "mixed", text_file, method=method)
    allocation = report["allocation"]
    assert len({layer["bits"] for layer in report["layers"] if layer["method"]}) > 1
    parts = inspect_folder(tmp_path / "mixed")["bytes_by_part"]
    assert allocation["bytes"] == parts["quantized linears"] <= allocation["budget_bytes"]
    weights = report["sizes"]["quantized_weights"]
    assert allocation["bits"] == pytest.approx(8 * allocation["bytes"] / weights)
    assert 5.0 < allocation["bits"] <= 5.4

    named = {
        layer["name"]: {"bits": layer["bits"], "group_size": layer["group_size"]}
        for layer in report["layers"]
        if layer["method"]
    }
    by_hand = values(folder, text_file, method)
    by_hand["stages"] = [{"method": method, "group_size": 16, "overrides": named}]
    run_recipe(build_recipe(by_hand | {"out": tmp_path / "named"}))
    weights = "model.safetensors"
    assert (tmp_path / "mixed" / weights).read_bytes() == (
        tmp_path / "named" / weights
    ).read_bytes()
    assert quantization_of(tmp_path / "mixed") == quantization_of(tmp_path / "named")


def test_what_was_chosen_loses_least_of_what_is_reported(model_folder, text_file, tmp_path):
    report = quantize(model_folder("llama", layers=3), tmp_path / "out", text_file)
    allocation = report["allocation"]
    assert allocation["gap"] < 1e-5
    for group in allocation["groups"]:
        chosen = group["chosen"]
        assert chosen in group["options"]
        better = [o for o in group["options"] if o["predicted_kl"] < chosen["predicted_kl"]]
        assert all(option["bytes"] > chosen["bytes"] for option in better)
        losses = [option["predicted_kl"] for option in group["options"]]
        assert losses == sorted(losses, reverse=True)  # 3, 4 and 8 bits
    taken = [group["chosen"] for group in allocation["groups"]]
    assert sum(option["bytes"] for option in taken) == allocation["bytes"]
    assert sum(o["predicted_kl"] for o in taken) == pytest.approx(allocation["predicted_kl"])
    smaller = [u for u in allocation["uniform"] if u["bits"] <= allocation["bits"]]
    assert smaller
    assert all(u["predicted_kl"] > allocation["predicted_kl"] for u in smaller)
    assert (tmp_path / "out" / "allocation.png").stat().st_size > 1000
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="allocation"' in page
    assert all(f"all {u['choice']}" in page for u in allocation["uniform"])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_loads_in_transformers_and_in_the_runtime(family, model_folder, text_file, tmp_path):
    """Both give the logits of the de-quantized weights, in float32."""
    folder, out = model_folder(family), tmp_path / "out"
    quantize(folder, out, text_file, dtype="float32")
    assert len(quantization_of(out)["config_groups"]) > 1
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = loaded(TOKENS).logits
    expected = dense_logits(folder, out)
    # scales are float32, so all three multiply the same weights, and sum in other orders: some 1e-6
    # of the largest logit, as in tests/runtime/test_logits.py
    close = {"rtol": 0.0, "atol": 2e-5 * float(expected.abs().max())}
    torch.testing.assert_close(logits, expected, **close)
    spans = [Span(row.numpy(), 1) for row in TOKENS]
    pieces = list(load_predictor("runtime", resolve_model(str(out)), "float32")(spans))
    for index in range(len(TOKENS)):
        ours = torch.cat([piece.logits for piece in pieces if piece.index == index])
        torch.testing.assert_close(ours, expected[index, :-1], **close)


@pytest.mark.parametrize("method", ["gptq", "qat"])
def test_it_loads_from_the_gptq_format(method, model_folder, text_file, tmp_path):
    """Of which each module's bits are in `dynamic`; and training starts from the same grids."""
    folder, out = model_folder(), tmp_path / "out"
    settings = {"method": method, "format": "gptq", "dtype": "float32", "target_bits": 7.4}
    if method == "qat":
        settings |= {"block_epochs": 0, "tokens": 1024}
    report = quantize(folder, out, text_file, **settings)
    chosen = {
        name: group["chosen"]["choice"]
        for group in report["allocation"]["groups"]
        for name in group["linears"]
    }
    packed = PackedFolder(resolve_model(str(out)))
    grids = {name: packed.grid(name) for name in packed.linears}
    assert len(set(chosen.values())) > 1
    assert {name: f"{g.bits}g{g.group_size}" for name, g in grids.items()} == chosen
    state = {name: packed.reader.load(name) for name in packed.others}
    for name in packed.linears:
        weight = packed.weight(name)  # scales are float16, products of the runtime float32
        state[f"{name}.weight"] = replace(weight, scale=weight.scale.float()).dequantize()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name == "lm_head.weight" for name in missing)  # tied
    with torch.no_grad():
        expected = model(TOKENS).logits
    spans = [Span(row.numpy(), 1) for row in TOKENS]
    pieces = list(load_predictor("runtime", resolve_model(str(out)), "float32")(spans))
    # as in the test above
    close = {"rtol": 0.0, "atol": 2e-5 * float(expected.abs().max())}
    for index in range(len(TOKENS)):
        ours = torch.cat([piece.logits for piece in pieces if piece.index == index])
        torch.testing.assert_close(ours, expected[index, :-1], **close)


def test_only_allocate_prints_and_keeps_what_it_found(model_folder, text_file, tmp_path):
    folder, out = model_folder("llama", layers=3), tmp_path / "out"
    command = ["quantize", str(folder), "--method", "rtn", "--target-bits", "5.4"]
    command += ["--set", "choose_bits=[3,4,8],choose_group_sizes=[16]", "--dtype", "bfloat16"]
    command += ["--calibration", str(text_file), "--samples", "8", "--seq-len", "64"]
    command += ["--out", str(out)]
    done = CliRunner().invoke(main, [*command, "--only-allocate", "--json"])
    assert done.exit_code == 0, done.output
    first = json.loads(done.stdout)["allocation"]
    assert not out.exists()
    shown = CliRunner().invoke(main, [*command, "--only-allocate"])
    assert "Bits and group size by block" in shown.stdout
    assert "q+k+v" in shown.stdout
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert "Probing blocks" not in done.stderr  # what was found is not found again
    assert json.loads(done.stdout)["allocation"] == first
    assert json.loads((out / "compress.json").read_text())["allocation"] == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target-bits", "1.5"], "target_bits 1.5 is out of reach: the choices take"),
        (["--target-bits", "4.75", "--bits", "4"], "bits 4 beside target_bits, which chooses it"),
        (["--target-bits", "5", "--group-size", "64"], "group_size '64' beside target_bits"),
        (["--set", "choose_bits=[4,8]"], "narrows what target_bits chooses from"),
        (["--target-bits", "5", "--set", "choose_bits=[4,5]"], "choose_bits.1 = 5"),
        (["--target-bits", "-1"], "target_bits = -1"),
        (["--only-allocate"], "only a target has an allocation"),
        (
            ["--target-bits", "6", "--format", "awq", "--set", "choose_group_sizes=[8,16]"],
            "target_bits mixes grids, and format awq cannot hold",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    words, message, model_folder, text_file, tmp_path
):
    command = ["quantize", str(model_folder("llama")), "--method", "rtn", *words]
    command += ["--calibration", str(text_file), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_dry_run(model_folder, text_file, tmp_path):
    """The output is as large as the target allows, and no larger when it is there."""
    command = ["quantize", str(model_folder("llama", layers=3)), "--method", "rtn"]
    command += ["--target-bits", "5.4", "--set", "choose_group_sizes=[16]", "--dtype", "bfloat16"]
    command += ["--calibration", str(text_file), "--samples", "8", "--seq-len", "64"]
    command += ["--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(main, [*command, "--dry-run"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["output_note"] == "at most"
    done = CliRunner().invoke(main, command)
    report = json.loads(done.stdout)
    slack = report["allocation"]["budget_bytes"] - report["allocation"]["bytes"]
    assert plan["output_bytes"] == report["sizes"]["bytes"] + slack


def test_a_linear_that_no_token_reaches_is_refused(model_folder, tmp_path, monkeypatch):
    folder = model_folder("llama", layers=3)
    model = BlockModel(resolve_model(str(folder)), torch.device("cpu"), torch.float32)
    load = BlockModel.load_block

    def with_another(self, index):
        block = load(self, index)
        block.unused = torch.nn.Linear(4, 4)
        return block

    monkeypatch.setattr(BlockModel, "load_block", with_another)
    commits = Commits(tmp_path / "commits")
    commits.begin({})
    tokens = torch.randint(3, 120, (2, 16), generator=torch.Generator().manual_seed(1))
    probe = Probe(model, tokens, commits, tmp_path / "hidden")
    name = f"{model.block_name(2)}.unused"
    with pytest.raises(InputError, match=f"no token .* reaches {name}.*leave it in float"):
        probe.losses({name: [Grid(4, 4)]}, torch.float32)


@pytest.mark.parametrize(
    "broken",
    ["probe-inputs-00001", "probe-gradients-00002", "probe-00001", "allocation", "apply-00001"],
)
def test_broken_off_and_taken_up_again(broken, model_folder, text_file, tmp_path, monkeypatch):
    """On the way forward, back, and after it: the same bytes, and nothing is probed twice."""
    given = values(model_folder(layers=3), text_file, "rtn")
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_recipe(build_recipe(given | {"out": whole}))
    put, store, visit = Commits.put, Activations.store.__func__, Probe._visit
    visited = []

    def full(place):
        if broken in str(place):
            raise OSError(28, "No space left on device")

    def put_or_fail(self, name, value):
        full(name)
        put(self, name, value)

    def store_or_fail(cls, folder, batches, memory):
        full(folder)
        return store(cls, folder, batches, memory)

    def visit_and_note(self, index, *how):
        visited.append(index)
        return visit(self, index, *how)

    monkeypatch.setattr(Probe, "_visit", visit_and_note)
    with monkeypatch.context() as patched:
        patched.setattr(Commits, "put", put_or_fail)
        patched.setattr(Activations, "store", classmethod(store_or_fail))
        with pytest.raises(InputError, match="No space left"):
            run_recipe(build_recipe(given | {"out": out}))
    run_recipe(build_recipe(given | {"out": out}))
    twice = {"probe-gradients-00002": [2], "probe-00001": [1]}.get(broken, [])
    assert sorted(visited) == sorted([0, 1, 2, *twice])
    for name in ("model.safetensors", "config.json", "allocation.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    told = json.loads((out / "compress.json").read_text())
    expected = json.loads((whole / "compress.json").read_text())
    assert told | {"recipe": None} == expected | {"recipe": None}  # but the name of the output
