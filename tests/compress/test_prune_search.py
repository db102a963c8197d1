"""`compress prune` towards a target: the shape it takes, and what it says of the others."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress import prune_search
from compress.cli import main
from compress.core.errors import InputError
from compress.core.source import resolve_model
from compress.prune.shape import shape_of
from compress.prune_preflight import check_class, preflight
from compress.pruning import run_pruning
from compress.recipe import build_pruning
from tests.compress.test_pruning import FAMILIES
from tests.compress.test_resume import kill

TARGET = {"target_params": 45_000}  # of 57,264, tiny Llama with four blocks


def run(given, **how):
    return run_pruning(build_pruning(given), **how)


def shape_without(found):
    return {name: found["shape"][name] for name in ("depth", "hidden", "ffn", "heads", "kv_heads")}


def test_the_target_is_met_by_the_best_of_the_shapes_made(stage_values, tmp_path):
    report = run(stage_values(**TARGET))
    search = report["pruning"]["search"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) <= 45_000
    made = search["measured"]
    assert [found["kl"] for found in made] == sorted(found["kl"] for found in made)
    assert made[0]["shape"] == report["pruning"]["shape"]
    assert made[0]["parameters"] == report["sizes"]["parameters"]
    assert len(made) == 3
    assert {found["shape"]["depth"] for found in search["alone"]} == {3, 4}
    assert len(search["alone"]) == 4
    assert all(found["parameters"] <= 45_000 for found in made + search["others"])
    ranked = [found["predicted"] for found in search["others"]]
    assert ranked == sorted(ranked)


def test_the_model_is_that_of_the_numbers_it_found(stage_values, tmp_path):
    """As `compress prune` with these numbers on the same sequences gives it, byte for byte."""
    report = run(stage_values(**TARGET))
    run(stage_values(out="again", **shape_without(report["pruning"]["search"]["measured"][0])))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_losses_are_those_of_transformers(stage_values, tmp_path):
    """KL by hand, on the sequences that no score was computed from."""
    given = stage_values(**TARGET)
    report = run(given)
    job = preflight(build_pruning(given))
    from compress.pruning import _tokens

    held_out = _tokens(job)[8:]
    assert len(held_out) == prune_search.HELD_OUT
    with torch.inference_mode():
        original, pruned = (
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(held_out)
            .logits[:, :-1]
            .log_softmax(-1)
            for place in (given["model"], tmp_path / "out")
        )
    kl = (original.exp() * (original - pruned)).sum(-1).mean()
    # float32 logits of two engines; the divergence is a sum over 128 tokens
    assert report["pruning"]["search"]["measured"][0]["kl"] == pytest.approx(float(kl), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_a_shape(family, stage_values):
    """As the stock class of that shape counts them."""
    job = preflight(build_pruning(stage_values(family, **TARGET)))
    for found in (job.stage.target, job.stage.shape):
        expected = check_class(job.model, job.stage.parts, job.stage.shape, found)
        assert job.parameters_of(found) == expected


def test_numbers_that_are_given_stay(stage_values, tmp_path):
    report = run(stage_values(**TARGET, ffn=64, layers_out=0))
    for found in report["pruning"]["search"]["measured"] + report["pruning"]["search"]["others"]:
        assert (found["shape"]["depth"], found["shape"]["ffn"]) == (4, 64)
    assert report["pruning"]["shape"]["ffn"] == 64


def test_bytes_of_weights(stage_values, tmp_path):
    report = run(stage_values(target_memory="180kB"))
    assert report["sizes"]["bytes"] <= 180_000
    assert report["pruning"]["search"]["measured"][0]["parameters"] > 170_000 / 4


@pytest.fixture
def clock(monkeypatch):
    """Latencies by a formula in place of a clock, and the shapes that were timed."""
    timed = []

    def milliseconds(config, place):
        place.mkdir(parents=True)
        timed.append(shape_of(config))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return config.num_hidden_layers + 1e-4 * model.num_parameters()

    monkeypatch.setattr(prune_search, "time_decoding", milliseconds)
    return timed


def test_a_latency(stage_values, clock, tmp_path):
    report = run(stage_values(target_latency=8.5, hidden=48, heads=6))
    taken = report["pruning"]["search"]["measured"][0]
    assert 8 < taken["milliseconds"] <= 8.5
    assert taken["milliseconds"] == pytest.approx(
        taken["shape"]["depth"] + 1e-4 * taken["parameters"]
    )
    assert all(found["milliseconds"] <= 8.5 for found in report["pruning"]["search"]["measured"])
    assert len(set(clock)) == len(clock)  # each shape once


def test_a_latency_that_shapes_do_not_keep(stage_values, monkeypatch, tmp_path):
    """What looks best is timed, and where it takes too long, what was timed teaches the next round:
    here blocks cost as their square, which the fit does not know."""

    def milliseconds(config, place):
        place.mkdir(parents=True)
        return float(config.num_hidden_layers**2)

    monkeypatch.setattr(prune_search, "time_decoding", milliseconds)
    report = run(stage_values(target_latency=9.5, hidden=48, heads=6))
    assert report["pruning"]["shape"]["depth"] <= 3
    with pytest.raises(InputError, match="is not possible: the smallest shape looked at"):
        run(stage_values(out="other", target_latency=3, hidden=48, heads=6))
    assert not (tmp_path / "other").exists()


def test_as_many_are_made_as_asked_for(stage_values, clock, monkeypatch):
    """Of shapes that should keep the time, the first one timed does not."""
    given = stage_values(target_latency=8.5, finalists=2)
    search = run(given)["pruning"]["search"]
    slow = search["measured"][0]["shape"]
    assert slow not in [found["shape"] for found in search["alone"]]
    right = prune_search.time_decoding

    def slower(config, place):
        taken = asdict(shape_of(config)) == slow
        return right(config, place) + 5 * taken

    monkeypatch.setattr(prune_search, "time_decoding", slower)
    search = run(given | {"out": given["out"].with_name("two")})["pruning"]["search"]
    assert len(search["measured"]) == 2
    assert slow not in [found["shape"] for found in search["measured"] + search["others"]]


def test_a_clock_gives_a_time(stage_values, model_folder, tmp_path):
    config = resolve_model(str(model_folder())).folder
    from transformers import AutoConfig

    found = prune_search.time_decoding(AutoConfig.from_pretrained(config), tmp_path / "timed")
    assert 0 < found < 1000
    assert math.isfinite(found)


def test_only_the_ranking(stage_values, tmp_path, text_file):
    """It writes no model; what was measured is there for the run that does."""
    given = stage_values(**TARGET)
    command = ["prune", given["model"], "--target-params", "45k", "--calibration", str(text_file)]
    command += ["--samples", "8", "--seq-len", "32", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*command, "--only-rank", "--json"])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out").exists()
    ranked = json.loads(done.stdout)["search"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "Scoring blocks" not in done.stderr
    assert "KL " not in done.stderr  # nothing was measured again
    assert "taken" in done.stdout
    assert (
        json.loads((tmp_path / "out" / "compress.json").read_text())["pruning"]["search"] == ranked
    )
    assert not (tmp_path / ".out.progress").exists()
    assert 'id="search"' in (tmp_path / "out" / "report.html").read_text()


def test_killed_before_every_step(stage_values, model_folder, tmp_path):
    (tmp_path / "place").mkdir()
    stage = {"method": "prune", "target_params": 38_000, "hidden": 48, "heads": 6, "finalists": 2}
    given = stage_values(folder=model_folder(layers=2)) | {"stages": [stage]}
    given.pop("out")
    found = kill(given, tmp_path / "place" / "out", "every")
    assert found["killed"] > 30
    assert {"model.safetensors", "compress.json", "config.json"} < set(found["files"])


def test_only_blocks_of_unknown_parts(stage_values, tmp_path, capsys):
    """Phi 3 has fused projections; what cannot be cut is said, and depth is left to choose."""
    report = run(stage_values("phi3", target_params=70_000))
    assert {found["shape"]["ffn"] for found in report["pruning"]["search"]["measured"]} == {80}
    assert report["pruning"]["shape"]["depth"] == 3
    assert "Leaving hidden, ffn, heads as they are: the blocks of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--target-params", "1k"],
            "target_params = 1,000 parameters is not possible: the smallest shape",
        ),
        (["--target-params", "1B"], "asks for nothing: depth 4, hidden 48"),
        (["--target-params", "few"], "not a number; write it as"),
        (["--target-memory", "lots"], "'lots' is no size"),
        (["--target-memory", "1kB"], "target_memory = 1 kB is not possible"),
        (["--target-latency", "0"], "target_latency"),
        (["--target-params", "45k", "--target-memory", "1MB"], "are given; give one"),
        (
            [
                "--target-params",
                "45k",
                "--depth",
                "3",
                "--hidden",
                "40",
                "--ffn",
                "64",
                "--heads",
                "4",
            ],
            "no number is left to choose",
        ),
        (["--ffn", "64", "--only-rank"], "only a target has a ranking"),
        (["--target-params", "45k", "--finalists", "0"], "finalists"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(more, message, stage_values, tmp_path):
    command = ["prune", stage_values()["model"], "--out", str(tmp_path / "out"), *more]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
