"""Chains with a draft and with timing: what comes of them, what is kept, and bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from compress import chain
from compress.chain import run_chain
from compress.chain_recipe import build_chain
from compress.cli import main
from compress.core.errors import InputError
from compress.core.source import ModelSource
from compress.evaluate import TextEvalConfig, evaluate_text
from tests.compress.chains import DISTILL, GPTQ, TRAIN, noting_runs, three_stages
from tests.compress.test_chain_resume import change_weight
from tests.compress.test_resume import kill

SPEED = {"prompt_tokens": 8, "new_tokens": 3, "batch": 2, "rounds": 1}


@pytest.fixture
def values(model_folder, text_file, tmp_path):
    """Two stages, and a draft of two from what the first gave."""
    values = three_stages(model_folder(layers=4), text_file, tmp_path / "out")
    prune, distill, gptq = values["stages"]
    values["stages"] = [prune, gptq]
    values["draft"] = {"stages": [{"method": "prune", "depth": 1}, distill]}
    return values


@pytest.fixture
def ran(monkeypatch):
    return noting_runs(monkeypatch)


def test_the_draft_that_comes_of_it(values, tmp_path, text_file):
    """It starts from the last result in float, learns from it, and is measured on the output."""
    report = run_chain(build_chain(values))
    out = tmp_path / "out"
    draft = out / "draft"
    assert AutoModelForCausalLM.from_pretrained(draft).config.num_hidden_layers == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    told = json.loads((draft / "compress.json").read_text())
    assert told["recipe"]["model"] == told["recipe"]["stages"][1]["teacher"] == "stage 1 of out"
    assert told["recipe"]["out"] == "draft"
    found = evaluate_text(
        ModelSource("d", draft), TextEvalConfig(text_file, 32, 4), ModelSource("o", out)
    )
    row = json.loads((out / "compress.json").read_text())["draft"]
    assert row == report["draft"]
    assert row["parameters"] == told["sizes"]["parameters"]
    for key in ("kl_mean", "top1_agreement", "top1_agreement_interval"):
        assert row[key] == found[key]
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert f'<data value="{row["top1_agreement"]}">' in page
    assert f"{row['parameters']:,} parameters that proposes" in card
    for path in out.rglob("*"):  # whatever a file says, it says no place of this machine
        if path.is_file() and path.suffix in (".json", ".md", ".html", ".jsonl"):
            assert str(tmp_path.parent) not in path.read_text(), path.name


def test_the_original_writes_the_text_of_a_draft_too(values, tmp_path):
    """Not what the draft starts from, which is not there before the chain begins."""
    values["calibration"] = {"source": "self", "samples": 3, "seq_len": 32}
    del values["stages"][1]["calibration"]
    recipe = build_chain(values)
    prune, _ = recipe.draft.recipe.stages
    assert prune.calibration.writer == values["model"]
    first, _ = run_chain(recipe)["stages"]
    told = json.loads((tmp_path / "out" / "draft" / "compress.json").read_text())
    assert told["stages"][0]["calibration_sha256"] == first["calibration_sha256"]
    described = json.loads((tmp_path / "out" / "compress.json").read_text())["recipe"]
    assert described["draft"]["stages"][0]["calibration"]["source"] == "self"


def test_a_draft_of_the_original_is_made_of_it(values, tmp_path, ran):
    """And a chain without measurements measures no draft."""
    values["draft"] |= {"start": "original"}
    values["eval"] = None
    report = run_chain(build_chain(values))
    assert ran == ["prune", "gptq", "prune", "distill"]
    assert set(report["draft"]) == {"parameters", "bytes"}
    told = json.loads((tmp_path / "out" / "draft" / "compress.json").read_text())["recipe"]
    assert told["model"] == told["stages"][1]["teacher"] == Path(values["model"]).name
    assert "first choice" not in (tmp_path / "out" / "README.md").read_text()


def test_the_runtime_uses_it(values, tmp_path):
    """By default, with the same text; `none` does without."""
    run_chain(build_chain(values))
    ask = ["generate", str(tmp_path / "out"), "--prompt", "w1 w2", "--max-tokens", "12"]
    ask += ["--dtype", "float32", "--temperature", "0", "--num-speculative-tokens", "2", "--json"]
    drafted = CliRunner().invoke(main, ask)
    assert drafted.exit_code == 0, drafted.output
    found = json.loads(drafted.stdout)
    assert found["speculation"]["drafted_tokens"] > 0
    plain = CliRunner().invoke(main, [*ask[:-3], "--json", "--draft", "none"])
    told = json.loads(plain.stdout)
    assert "speculation" not in told
    assert told["text"] == found["text"]
    refused = CliRunner().invoke(main, [*ask, "--draft", "none"])
    assert refused.exit_code == 2
    assert "--num-speculative-tokens goes with --draft" in refused.stderr
    refused = CliRunner().invoke(main, ["generate", values["model"], *ask[2:]])
    assert "num_speculative_tokens = 2 without a draft" in refused.stderr


def test_timed(values, tmp_path):
    """The original and each result; keys and values of half the heads take half the bytes."""
    values["speed"] = SPEED
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    shown = CliRunner().invoke(main, ["run", str(tmp_path / "r.yaml")])
    assert shown.exit_code == 0, shown.output
    out = tmp_path / "out"
    speed = json.loads((out / "run.json").read_text())["speed"]
    rows = {row["name"]: row for row in speed["rows"]}
    assert list(rows) == ["original", "1. prune", "2. gptq"]
    for row in rows.values():
        assert row["seconds_per_token"] > 0 < row["time_to_first_token_s"]
        assert (
            f'<data value="{row["seconds_per_token"] * 1000}">' in (out / "report.html").read_text()
        )
    blocks = [row["kv_bytes_per_token"] for row in rows.values()]
    assert blocks == [blocks[0], blocks[0] * 3 / 4, blocks[0] * 3 / 4]  # one of four was removed
    assert "speed" not in json.loads((out / "compress.json").read_text())
    assert "Speed: prompts of 8 tokens" in shown.stdout
    assert f"{blocks[0]:,} B" in shown.stdout
    assert "the same most likely token at" in shown.stdout


class BrokenOff(BaseException):
    """In the place of a kill."""


def broken_off(values, monkeypatch, name):
    """A chain that ended at a function of chain.py."""

    def refuse(*_, **__):
        raise BrokenOff

    with monkeypatch.context() as patched:
        patched.setattr(chain, name, refuse)
        with pytest.raises(BrokenOff):
            run_chain(build_chain(values))


def test_what_is_done_is_not_done_again(values, tmp_path, monkeypatch):
    broken_off(values, monkeypatch, "run_distillation")
    ran = noting_runs(monkeypatch)
    broken_off(values, monkeypatch, "place_draft")
    assert ran == ["distill", "measure"]
    run_chain(build_chain(values))
    assert ran == ["distill", "measure"]
    whole = values | {"out": str(tmp_path / "whole")}
    run_chain(build_chain(whole))
    for name in ("model.safetensors", "draft/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("place", ["run_distillation", "place_draft"])
def test_another_draft_is_refused(values, monkeypatch, place, tmp_path):
    """While it is made, and when it is done."""
    broken_off(values, monkeypatch, place)
    values["draft"]["stages"][0]["depth"] = 2
    with pytest.raises(InputError, match=r"another (recipe|stages\.0\.recipe)\.depth \(1, now 2\)"):
        run_chain(build_chain(values))
    shutil.rmtree(tmp_path / ".out.stages" / "draft")
    run_chain(build_chain(values))
    assert not (tmp_path / ".out.stages").exists()


@pytest.mark.parametrize("restart", [False, True])
def test_a_draft_of_another_original_is_not_kept(values, monkeypatch, restart, tmp_path):
    """It starts from the original itself, so no stage of the chain tells."""
    values["model"] = str(shutil.copytree(values["model"], tmp_path / "model"))
    values["draft"] |= {"start": "original"}
    broken_off(values, monkeypatch, "place_draft")
    stages = tmp_path / ".out.stages"
    change_weight(values)
    if not restart:
        shutil.rmtree(stages / "1-prune")
        with pytest.raises(InputError, match="has a draft with another model"):
            run_chain(build_chain(values))
        return
    ran = noting_runs(monkeypatch)
    run_chain(build_chain(values), restart=True)
    assert ran.count("distill") == 1


def test_a_draft_goes_with_what_it_was_made_from(values, monkeypatch, tmp_path):
    """Another quantization leaves it, and is measured anew; another pruning does not."""
    broken_off(values, monkeypatch, "place_draft")
    ran = noting_runs(monkeypatch)
    shutil.rmtree(tmp_path / ".out.stages" / "2-gptq")
    values["stages"][1]["bits"] = 3
    broken_off(values, monkeypatch, "place_draft")
    assert ran == ["gptq", "measure", "measure"]
    ran.clear()
    shutil.rmtree(tmp_path / ".out.stages" / "1-prune")
    run_chain(build_chain(values))
    assert ran == ["prune", "measure", "gptq", "measure", "prune", "distill", "measure"]


def test_killed_at_20_random_moments(values, tmp_path):
    (tmp_path / "place").mkdir()
    values["draft"]["stages"][1]["train"] = TRAIN | {"save_every": 1, "tokens": 4 * 32 * 2}
    values["speed"] = SPEED
    del values["out"]
    found = kill(values, tmp_path / "place" / "out", "random")
    assert found["killed"] == 20
    assert {"model.safetensors", "draft/model.safetensors"} < set(found["files"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft": 3}, "'draft' is 3; it must hold keys and values"),
        ({"draft": {"stats": 1}}, "unknown key 'stats' for .*: draft; allowed: start, stages"),
        ({"draft": {"stages": []}}, "draft: 'stages' must list at least one method"),
        ({"draft": {"stages": [3]}}, "draft: stage 1: stage 3 has no 'method'"),
        ({"draft": {"stages": [{"method": "prune", "depht": 1}]}}, "did you mean 'depth'"),
        ({"draft": {"start": "stage 2", "stages": [{"method": "prune", "depth": 1}]}},
         "draft: start = 'stage 2' is nothing that .*; allowed: original, stage 1$"),
        ({"draft": {"start": 1, "stages": [{"method": "prune", "depth": 1}]}}, "start = 1 is not"),
        ({"speed": {"round": 1}}, "unknown key 'round' for .*: speed.*did you mean 'rounds'"),
        ({"speed": {"rounds": 0}}, "speed: rounds = 0"),
        ({"speed": {"prompt_tokens": 4096}}, "speed: prompt and new tokens are 4160; .* allows"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(values, change, message, tmp_path, ran):
    with pytest.raises(InputError, match=message):
        run_chain(build_chain(values | change))
    assert ran == []
    assert list(tmp_path.iterdir()) == []


def test_a_draft_s_stages_are_checked_before_any_work(values, ran):
    values["draft"]["stages"][1]["data"] = {"source": "no.txt"}
    with pytest.raises(InputError, match=r"draft: stage 2 \(distill\): training file 'no.txt'"):
        run_chain(build_chain(values))
    values["draft"]["stages"] = [{"method": "prune", "ffn": 4096}]
    values["draft"]["start"] = "original"
    with pytest.raises(InputError, match=r"draft: stage 1 \(prune\): ffn = 4096 is not possible"):
        run_chain(build_chain(values))
    assert ran == []


def test_a_small_model_can_be_its_own_draft_s_start(values, tmp_path):
    """A draft may be quantized in the end, and shares what the chain's stages share."""
    values["draft"]["stages"] = [{"method": "gptq", "group_size": 16}]
    values["dtype"] = "float32"
    run_chain(build_chain(values))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "draft")
    assert model.lm_head.weight.dtype == torch.float32
    assert values["stages"][GPTQ - DISTILL]["method"] == "gptq"
