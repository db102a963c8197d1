"""Every recipe in the repository is valid, and what is wrong in one is named."""

from pathlib import Path

import pytest
import yaml

from compress.core.errors import InputError
from compress.quant.methods import METHODS
from compress.recipe import (
    DISTILL,
    PRUNE,
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


def test_every_method_has_a_recipe():
    assert {method_of(load_recipe(path).stages[0]) for path in RECIPES} == {
        *METHODS,
        DISTILL,
        PRUNE,
    }


GOOD = {"model": "m", "out": "o", "stages": [{"method": "awq"}]}


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


@pytest.mark.parametrize("method", ["distill", "prune"])
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
