"""`compress plan --fit`: the order of recipes, what they are said to cost, and what makes them."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from compress.cli import main
from compress.core.errors import InputError
from compress.devices import DEVICES
from compress.planning.case import Load
from compress.planning.fit import MOST_SEQUENCES, STANDINGS, Recipe, propose, repository
from compress.planning.quality import CALIBRATION, measured, measurements
from compress.recipe import CalibrationConfig, build_recipe
from compress.roofline import kv_bytes_per_token, memory, parameters, precision
from compress.shapes import find_shape

ROOT = Path(__file__).parents[2]
LLAMA = find_shape("llama-2-7b")


def fit(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def fitted(*arguments):
    done = fit(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_measured_quality_is_what_the_results_say():
    """Every row of quality.json stands in the table that it names, with these numbers."""
    known = measurements()
    table = (ROOT / known["results"]).read_text(encoding="utf-8")
    first = table.split("\n## ")[0]  # further on are other models, with rows of the same names
    rows = {}
    for line in first.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 6:
            rows[cells[0]] = cells
    assert len(known["rows"]) == 28
    for row in known["rows"]:
        cells = rows[row["row"]]
        numbers = [float(number) for number in re.findall(r"[\d.]+", cells[2])]
        assert [row["perplexity_ratio"], *row["interval"]] == numbers
        assert cells[4].split()[0] == f"{row['kl_mean']:.4f}"
        assert cells[6] == f"{row['same_top_token']:.3f}"
        calibration = f" {row['calibration']}" if row["calibration"] else ""
        assert row["row"] == f"{row['method']} w{row['bits']}{calibration}"
    assert f"groups of {known['group_size']}" in first.splitlines()[0]
    assert known["model"] in first.splitlines()[0]
    assert known["text"].split(",")[0] in " ".join(first.split())


def test_quality_is_of_what_the_commands_do():
    """`compress quantize` without flags calibrates as the row was measured."""
    assert CalibrationConfig().source == CALIBRATION
    assert (CalibrationConfig().samples, CalibrationConfig().seq_len) == (64, 512)
    assert "64 x 512 tokens" in (ROOT / measurements()["results"]).read_text(encoding="utf-8")
    four = measured(4, 64)
    assert four is not None
    assert (four.method, four.perplexity_ratio) == ("gptq", 1.0723)
    assert measured(4, 128) is None
    assert measured(5, 64) is None


@pytest.mark.real_model
def test_the_measured_shape_is_the_models():
    shape = find_shape("smollm2")
    assert measurements()["shape"] == {key: getattr(shape, key) for key in measurements()["shape"]}


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_the_order(objective):
    found = propose(LLAMA, DEVICES["l4"], Load(1, 8192), objective, 1.1)
    keys = []
    for one in found:
        assert one.case.fits
        assert one.case.load.batch <= min(MOST_SEQUENCES, one.case.largest_batch)
        best = one.case.token if objective == "latency" else -one.case.throughput
        keys.append((STANDINGS.index(one.standing), len(one.recipe.unmeasured), best))
    assert keys == sorted(keys)
    assert {one.standing for one in found} == set(STANDINGS)
    assert {one.case.load.batch for one in found} == {1} or objective == "throughput"
    assert found[0].recipe.words == "int4-g64"
    costly = {one.recipe.bits for one in found if one.standing == "costly"}
    assert costly == {2, 3}


def test_what_is_allowed_to_be_lost():
    def ready(most_loss):
        found = propose(LLAMA, DEVICES["h100"], Load(1, 1024), "latency", most_loss)
        return {one.recipe.weights for one in found if one.standing == "ready"}

    assert ready(1.0) == {"bf16"}
    assert ready(1.05) == {"bf16", "int8-g64"}
    assert ready(1.5) == {"bf16", "int8-g64", "int4-g64", "int3-g64"}


def test_what_recipes_do_to_a_shape():
    def changed(**choices):
        plain = {"bits": 16, "group": 0, "kv": "bf16", "attention": "as it is"}
        recipe = Recipe(**plain | {"pruning": "none", "draft": None} | choices)
        return recipe.applied_to(LLAMA)

    bf16 = precision()
    per_token = kv_bytes_per_token(LLAMA, bf16)
    assert changed() == LLAMA
    assert kv_bytes_per_token(changed(attention="GQA"), bf16) == per_token / 8
    latents = 32 * (512 + 64) * 2  # DeepSeek-V2's, for heads of 128
    assert kv_bytes_per_token(changed(attention="MLA"), bf16) == latents
    assert changed(pruning="1/4 of the layers").layers == 24
    half = parameters(changed(pruning="1/2 of the MLP"))
    assert half.mlp == parameters(LLAMA).mlp / 2
    grouped = find_shape("llama-2-70b")  # 64 heads on 8 already
    plain = Recipe(16, 0, "bf16", "GQA", "none", None)
    assert plain.applied_to(grouped) is None


def test_every_change_has_its_command(tmp_path, monkeypatch):
    found = fitted("llama-2-7b", "--fit", "24GB", "--top", 1000)
    assert found["fitting"] == len(found["recipes"])
    monkeypatch.chdir(tmp_path)
    commands = 0
    for recipe in found["recipes"]:
        assert recipe["memory_bytes"] <= 24e9
        # a draft asks for nothing else to be made
        changes = sum(recipe[what] != same for what, same in UNCHANGED.items())
        assert len(recipe["commands"]) == changes
        made = "meta-llama/Llama-2-7b-hf"
        for command in recipe["commands"]:
            commands += 1
            made = check_command(command, recipe, made)
    assert commands > 100


UNCHANGED = {"weights": "bf16", "kv": "bf16", "attention": "as it is", "pruning": "none"}


def check_command(line, recipe, model):
    """The real command line takes it, for what was made before and as the recipe says.

    Returns the name of what it makes.
    """
    program, name, *arguments = shlex.split(line)
    assert program == "compress"
    command = main.get_command(main.make_context("compress", [], resilient_parsing=True), name)
    assert command is not None
    given = command.make_context(name, arguments).params
    assert given["model"] == model
    if name == "serve":
        assert given["kv_cache_dtype"] == recipe["kv"]
        return None
    if name == "prune":
        flag = "depth" if recipe["pruning"] == "1/4 of the layers" else "ffn"
        assert given[flag] == {"depth": 24, "ffn": 5504}[flag]  # of Llama 2's 32 and 11,008
        return str(given["out"])
    if name == "convert":
        asked = given["to"], given["kv_heads"], given["kv_rank"], given["rope_dim"]
        sizes = {"GQA": ("gqa", 4, None, None), "MLA": ("mla", None, 512, 64)}
        assert asked == sizes[recipe["attention"]]
        return str(given["out"])
    bits, group = re.fullmatch(r"int(\d)-g(\d+)", recipe["weights"]).groups()
    assert given["bits"] == int(bits)
    stage = {key: given[key] for key in ("method", "bits", "group_size")}
    built = build_recipe({"model": given["model"], "out": given["out"], "stages": [stage]})
    assert built.stages[0].group_size == int(group)
    return str(given["out"])


def test_names_in_commands_are_safe(tmp_path):
    recipe = Recipe(4, 64, "bf16", "as it is", "none", None)
    (line,) = recipe.commands("./my models/a b.gguf", LLAMA)
    words = shlex.split(line)
    assert words[2] == "./my models/a b.gguf"
    assert words[-1] == "a-b-w4-g64"


def test_models_by_name_become_repositories():
    assert repository("llama-2-7b") == "meta-llama/Llama-2-7b-hf"
    assert repository("./folder") == "./folder"
    assert repository(None) is None


def test_a_shape_has_no_commands_and_quality_names_its_model():
    found = fitted("--shape", "hidden=4096,layers=32", "--fit", "24GB")
    assert all(recipe["commands"] == [] for recipe in found["recipes"])
    four = next(one for one in found["recipes"] if one["recipe"] == "int4-g64")
    assert four["quality"] == "perplexity x1.072, on SmolLM2-135M"
    assert four["measured_on"] == "SmolLM2-135M"
    shape = "hidden=576,ffn=1536,layers=30,heads=9,kv-heads=3,vocab=49152,tied=yes"
    found = fitted("--shape", shape, "--fit", "1GB")
    four = next(one for one in found["recipes"] if one["recipe"] == "int4-g64")
    assert four["quality"] == "perplexity x1.072"
    assert not any("g128" in one["recipe"] for one in found["recipes"])  # 128 is no part of 576


def test_quality_that_nobody_measured_is_unknown():
    found = fitted("llama-2-7b", "--fit", "24GB", "--top", 1000)["recipes"]
    by_name = {one["recipe"]: one for one in found}
    assert by_name["bf16"]["quality"] == "as it is"
    assert by_name["int4-g128"]["quality"] == "int4-g128: unknown"
    assert by_name["int4-g128"]["standing"] == "unknown"
    both = by_name["int4-g64 + KV int8 + MLA"]
    assert both["quality"] == "perplexity x1.072, on SmolLM2-135M; KV int8 and MLA: unknown"
    assert by_name["bf16 + speculation"]["quality"] == "as it is"
    assert by_name["bf16 + speculation"]["standing"] == "unknown"  # what it accepts is assumed
    assert by_name["bf16"]["standing"] == by_name["int4-g64"]["standing"] == "ready"


def test_more_context_fits_less():
    short, long = (
        fitted("llama-2-7b", "--fit", "16GB", "--min-context", context)["fitting"]
        for context in (1024, 16384)
    )
    assert 0 < long < short


def test_the_smallest_that_does_not_fit_is_named():
    little = replace(DEVICES["l4"], memory=10**9)
    with pytest.raises(InputError, match=r"takes 1\.\d\d GB with one sequence of 64 tokens"):
        propose(LLAMA, little, Load(1, 64), "latency", 1.1)


def test_a_quantized_checkpoint_is_refused(tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100,
        "num_attention_heads": 4, "num_hidden_layers": 2,
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = fit(tmp_path, "--fit", "1GB")
    assert done.exit_code == 2
    assert "quantized already" in done.stderr


def test_the_tables_say_it():
    done = fit("llama-2-7b", "--fit", "24GB", "--min-context", 8192, "--top", 250)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if line[:1] in "┃│┏") <= 80
    assert "1:  compress quantize meta-llama/Llama-2-7b-hf --method gptq --bits 4" in done.stdout
    assert "--to mla --kv-rank 512 --rope-dim 64" in " ".join(done.stdout.split())
    assert measurements()["results"] in done.stdout


def test_devices_share_the_load():
    found = fitted("llama-2-70b", "--fit", "80GB", "--tensor-parallel", 4, "--device", "h100")
    whole = memory(find_shape("llama-2-70b"), precision("int4-g64"), 1, 1024).weights
    int4 = next(one for one in found["recipes"] if one["recipe"] == "int4-g64")
    assert int4["weight_bytes"] == pytest.approx(whole / 4, rel=0.001)  # norms are on all
