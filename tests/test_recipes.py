"""Every recipe in the repository is valid, and what is wrong in one is named."""

import json
from pathlib import Path

import pytest
import yaml

from compress.chain_recipe import ChainRecipe, build_chain, described_chain
from compress.core.errors import InputError
from compress.quant.methods import METHODS
from compress.recipe import (
    OTHERS,
    build_distillation,
    build_recipe,
    method_of,
)
from compress.recipe_file import load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_is_valid_and_says_its_command(path):
    recipe = load_recipe(path)
    assert recipe.stages
    assert f"compress run recipes/{path.name}" in path.read_text(encoding="utf-8")


def test_every_method_has_a_recipe_of_its_own():
    alone = [recipe for path in RECIPES if not is_chain(recipe := load_recipe(path))]
    assert {method_of(recipe.stages[0]) for recipe in alone} == {*METHODS, *OTHERS}


def is_chain(recipe):
    return isinstance(recipe, ChainRecipe)


GOOD = {"model": "m", "out": "o", "stages": [{"method": "awq"}]}


OF_EVAL = {"method": "prune", "depth": 3, "calibration": {"seed": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle'.*did you mean 'model'"),
        ({"stages": []}, "must list at least one method"),
        ({"stages": [{"bits": 4}]}, "has no 'method'"),
        ({"stages": [{"method": "awq"}, {"method": "rtn"}]}, "2 stages"),
        ({"stages": [{"method": "awq", "bits": 5}]}, "bits"),
        ({"calibration": {"sample": 3}}, "did you mean 'samples'"),
        ({"calibration": 3}, "calibration"),
        ({"dtype": "int4"}, "dtype"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(InputError, match=message):
        build_recipe({**GOOD, **change})


GOOD_DISTILLATION = {"model": "m", "out": "o", "stages": [{"method": "distill", "teacher": "t"}]}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"teecher": "x"}, "unknown key 'teecher' for recipe 'r.yaml': distill.*did you mean 'te"),
        ({"loss": {"forwrd_kl": 1}}, "did you mean 'forward_kl'"),
        ({"loss": {"forward_kl": 0}}, "no loss on logits"),
        ({"loss": {"hidden_mse": 1}}, "no loss on logits"),
        ({"loss": {"forward_kl": -1}}, "forward_kl"),
        ({"train": {"tokens": "2 million"}}, "tokens"),
        ({"train": 3}, "'train' is 3; it must hold keys and values"),
        ({"lora": {"rank": 0}}, "rank"),
        ({"lora": {"targets": []}}, "targets"),
        ({"data": {"held_out": -1}}, "held_out"),
        ({"teacher": ""}, "teacher"),
    ],
)
def test_what_is_wrong_in_a_distillation_is_named(stage, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {**GOOD_DISTILLATION, "stages": [{**GOOD_DISTILLATION["stages"][0], **stage}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=message):
        load_recipe(Path("r.yaml"))


def test_losses_that_are_not_named_have_no_weight():
    def weights(**loss):
        stage = {"method": "distill", "teacher": "t", **({"loss": loss} if loss else {})}
        return build_distillation({**GOOD_DISTILLATION, "stages": [stage]}).stages[0].loss

    assert weights().forward_kl == 1.0
    assert weights(temperature=2.0).forward_kl == 1.0
    assert weights(cross_entropy=0.5).forward_kl == 0.0
    assert weights(cross_entropy=0.5, forward_kl=2.0).forward_kl == 2.0


@pytest.mark.parametrize("method", OTHERS)
def test_these_are_no_methods_of_quantization(method):
    with pytest.raises(InputError, match=f"is the command compress {method}"):
        build_recipe({**GOOD, "stages": [{"method": method}]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [{"method": "prune", "fnn": 3}]}, "did you mean 'ffn'"),
        ({"stages": [{"method": "prune", "damping": 0}]}, "damping"),
        ({"calibration": 3}, "'calibration' is 3; it must hold keys and values"),
        ({"calibration": {"samples": 0}}, "samples"),
        ({"out": ".."}, "not a folder name"),
    ],
)
def test_what_is_wrong_in_a_pruning_is_named(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = {"model": "m", "out": "o", "stages": [{"method": "prune", "ffn": 8}]}
    Path("r.yaml").write_text(yaml.safe_dump({**good, **change}))
    with pytest.raises(InputError, match=message):
        load_recipe(Path("r.yaml"))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"kv_heads": 1}, "'to' is missing; allowed: gqa, mla, windows"),
        ({"to": "gpa", "kv_heads": 1}, "'to' = 'gpa' is unknown; .*did you mean 'gqa'"),
        ({"to": ["gqa"]}, "'to' = "),
        ({"to": "gqa", "kv_head": 1}, "recipe 'r.yaml': to gqa.*did you mean 'kv_heads'"),
        ({"to": "gqa", "kv_heads": 1, "damping": 0}, "damping"),
    ],
)
def test_what_is_wrong_in_a_conversion_is_named(stage, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = [{"method": "convert", **stage}]
    Path("r.yaml").write_text(yaml.safe_dump({"model": "m", "out": "o", "stages": stages}))
    with pytest.raises(InputError, match=message):
        load_recipe(Path("r.yaml"))


def test_a_pruning_looks_at_as_many_samples_as_published(tmp_path):
    path = tmp_path / "r.yaml"
    stage = {"method": "prune", "ffn": 8}
    path.write_text(yaml.safe_dump({"model": "m", "out": "o", "stages": [stage]}))
    assert load_recipe(path).calibration.samples == 1024


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_recipe(tmp_path / "absent.yaml")
    for text in ("a: [", "- 1", ""):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError):
            load_recipe(tmp_path / "bad.yaml")


GOOD_CHAIN = {
    "model": "m",
    "out": "place/o",
    "calibration": {"seq_len": 64, "samples": 8},
    "stages": [
        {"method": "prune", "layers_out": 1, "calibration": {"seed": 3}},
        {"method": "distill", "train": {"tokens": "2k"}},
        {"method": "gptq", "bits": 3},
    ],
}


def test_stages_of_a_chain_are_recipes_of_their_own():
    """Each starts from what the one before gives; what is shared is laid under their own."""
    recipe = build_chain({**GOOD_CHAIN, "dtype": "float16", "propagate_error": False})
    prune, distill, gptq = recipe.stages
    places = [f"place/.o.stages/{name}/model" for name in ("1-prune", "2-distill", "3-gptq")]
    assert [str(stage.out) for stage in recipe.stages] == places
    assert [stage.model for stage in recipe.stages] == ["m", *places[:2]]
    assert (prune.calibration.seq_len, prune.calibration.seed) == (64, 3)
    assert (gptq.calibration.samples, gptq.calibration.seed) == (8, 0)
    assert {stage.dtype for stage in recipe.stages} == {"float16"}
    assert gptq.propagate_error is False
    assert distill.stages[0].teacher == "m"
    assert recipe.eval.text == "self"
    assert (recipe.eval.windows, recipe.eval.seq_len) == (32, 512)
    assert build_chain({**GOOD_CHAIN, "eval": None}).eval is None


def test_samples_of_a_chain_are_each_methods_own():
    prune, _, gptq = build_chain({**GOOD_CHAIN, "calibration": {}}).stages
    assert (prune.calibration.samples, gptq.calibration.samples) == (1024, 64)


def test_the_recipe_that_is_told_is_the_recipe():
    recipe = build_chain({**GOOD_CHAIN, "compute_dtype": "float32"})
    told = yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(described_chain(recipe)))))
    assert told["out"] == "o"
    assert build_chain({**told, "out": "place/o"}) == recipe


def with_stage(number, **changes):
    stages = [dict(stage) for stage in GOOD_CHAIN["stages"]]
    stages[number - 1] |= changes
    return {"stages": stages}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle' for recipe 'r.yaml'.*did you mean 'model'"),
        ({"eval": {"text": "self", "window": 3}}, "recipe 'r.yaml': eval.*did you mean 'windows'"),
        ({"eval": {"windows": 1}}, "recipe 'r.yaml': eval: windows = 1"),
        ({"eval": "self"}, "'eval' is 'self'; it must hold keys and values"),
        ({"eval": {"seed": 3}}, r"eval: seed = 3 is also that .* stage 1 \(prune\)"),
        ({"draft": {"stages": [OF_EVAL]}}, r"draft: eval: seed = 1 is also .* stage 1 \(prune\)"),
        ({"calibration": 3}, "recipe 'r.yaml': 'calibration' is 3"),
        ({"dtype": "int4"}, r"recipe 'r.yaml': stage 1 \(prune\): dtype = 'int4'"),
        (with_stage(1, fnn=3), r"recipe 'r.yaml': stage 1 \(prune\): .*did you mean 'ffn'"),
        (with_stage(1, calibration={"samples": 0}), r"stage 1 \(prune\): calibration: samples = 0"),
        (with_stage(1, calibration=3), r"stage 1 \(prune\): 'calibration' is 3"),
        (with_stage(2, teecher="x"), r"stage 2 \(distill\): .*did you mean 'teacher'"),
        (with_stage(2, train={"tokens": 0}), r"stage 2 \(distill\): train: tokens = 0"),
        (with_stage(2, calibration={}), r"unknown key 'calibration' .*stage 2 \(distill\)"),
        (with_stage(2, teacher="stage 2"), r"stage 2 \(distill\): teacher 'stage 2' .*: stage 1"),
        (with_stage(2, teacher="stage 0"), "teacher 'stage 0' is no stage before this one"),
        (with_stage(2, method="awq", train=3), r"stage 2 \(awq\): .*make it last"),
        (with_stage(2, method="distil"), "stage 2: unknown method 'distil'.*mean 'distill'"),
        (with_stage(3, bits=5), r"recipe 'r.yaml': stage 3 \(gptq\): method gptq: bits = 5"),
        ({"stages": [*GOOD_CHAIN["stages"], 3]}, "stage 4: stage 3 has no 'method'"),
        ({"out": ".."}, "not a folder name"),
        ({"out": 3}, "out = 3"),
        ({"stages": [{"method": "distill"}, {"method": "distill"}]}, "no stage has 'calibration'"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_chain_is_named(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(yaml.safe_dump({**GOOD_CHAIN, **change}))
    with pytest.raises(InputError, match=message):
        load_recipe(Path("r.yaml"))
