"""Every recipe in the repository is valid, and what is wrong in one is named."""

from pathlib import Path

import pytest

from compress.core.errors import InputError
from compress.quant.methods import METHODS
from compress.recipe import build_recipe, load_recipe, method_of

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_is_valid_and_says_its_command(path):
    recipe = load_recipe(path)
    assert recipe.stages
    assert f"compress run recipes/{path.name}" in path.read_text(encoding="utf-8")


def test_every_method_has_a_recipe():
    assert {method_of(load_recipe(path).stages[0]) for path in RECIPES} == set(METHODS)


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


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_recipe(tmp_path / "absent.yaml")
    for text in ("a: [", "- 1", ""):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError):
            load_recipe(tmp_path / "bad.yaml")
