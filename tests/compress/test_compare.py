"""`compress compare`: its numbers are eval's and inspect's, and nothing is measured twice."""

import contextlib
import json
import re
import shutil
from itertools import combinations

import pytest
from click.testing import CliRunner
from filelock import FileLock

from compress.cli import main
from compress.cli.compare import print_comparison
from compress.comparing import comparison as comparing
from compress.comparing.comparison import mark_frontier, medians
from compress.comparing.page import table_of
from compress.comparing.plot import label_points, write_plot
from compress.core.errors import InputError
from compress.core.source import ModelSource
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.inspection import inspect_folder
from compress.pipeline import run_recipe
from compress.recipe import build_recipe

SHORT = ("--seq-len", "32", "--windows", "4")
SPEED = ("--repeat", "1", "--prompt-tokens", "8", "--new-tokens", "3", "--batch", "2")


@pytest.fixture(scope="module")
def models(model_folder, tmp_path_factory):
    """A tiny model and two that were made from it, as strings."""
    original = model_folder("llama")
    made = [str(original)]
    for bits in (8, 3):
        out = tmp_path_factory.mktemp("made") / f"w{bits}"
        stage = {"method": "rtn", "bits": bits, "group_size": 16}
        run_recipe(build_recipe({"model": str(original), "out": out, "stages": [stage]}))
        made.append(str(out))
    return made


def run(*arguments):
    result = CliRunner().invoke(main, ["compare", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_every_number_is_what_its_own_command_says(models, text_file, tmp_path):
    original, *made = models
    options = ("--against", original, "--text", text_file, *SHORT, *SPEED, "--json")
    rounded = [f"{made[0]}+{marks}" for marks in ("int8", "head8", "head8+int8")]
    result = run(*made, *rounded, *options, "--out", tmp_path / "out")
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"] for row in rows][1:] == [
        *("w8", "w3", "w8+int8", "w8+head8", "w8+head8+int8")
    ]
    config = TextEvalConfig(text_file, seq_len=32, windows=4)
    for row, folder in zip(rows, [original, *made], strict=False):
        source = ModelSource(folder, comparing.resolve_model(folder).folder)
        assert row["bytes"] == inspect_folder(source.folder)["bytes"]
        assert row["perplexity"] == evaluate_text(source, config)["perplexity"]
        assert row["seconds_per_token"] > 0
        assert row["tokens_per_s"] > 0
    assert "kl_mean" not in rows[0]
    assert 0 < rows[1]["kl_mean"] < rows[2]["kl_mean"]
    # heads of 8 numbers: 2 bytes or 4 each, against 8 codes and a scale of 4 bytes
    assert rows[3]["kv_bytes_per_token"] < rows[1]["kv_bytes_per_token"]
    assert len({row["kl_mean"] for row in (rows[1], *rows[3:])}) == 4
    # a head of one byte a weight and a float32 scale a row, for one of float32
    assert rows[4]["weight_bytes"] < rows[1]["weight_bytes"] == rows[3]["weight_bytes"]
    assert rows[5]["weight_bytes"] == rows[4]["weight_bytes"]
    assert rows[5]["kv_bytes_per_token"] == rows[3]["kv_bytes_per_token"]


def test_the_page_has_the_table_and_nothing_from_elsewhere(models, text_file, tmp_path):
    options = ("--against", models[0], "--text", text_file, *SHORT, "--repeat", "0")
    run(*models[1:], *options, "--out", tmp_path)
    page = (tmp_path / "comparison.html").read_text()
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert len(cells) == 4  # headings, the original and two
    for line in cells:
        assert all(cell in page for cell in line)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_not_measured_again(models, text_file, tmp_path, monkeypatch):
    """Until files or settings change; a run that ends in the middle keeps what it has."""
    measured = []

    def counted(source, config, against=None):
        measured.append(source.folder.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return evaluate_text(source, config, against)

    monkeypatch.setattr(comparing, "evaluate_text", counted)
    options = ("--against", models[0], "--text", text_file, "--repeat", "0", "--out", tmp_path)
    stopped = CliRunner().invoke(main, ["compare", *models[1:], *map(str, options), *SHORT])
    assert stopped.exit_code == 130
    first = measured[0]
    run(*models[1:], *options, *SHORT)
    assert measured == [first, "w8", "w8", "w3"]
    run(*models[1:], *options, *SHORT)
    assert len(measured) == 4
    run(*models[1:], *options, "--seq-len", "32", "--windows", "5")
    assert len(measured) == 7
    run(*models[1:], *options, "--seq-len", "32", "--windows", "5", "--restart")
    assert len(measured) == 10


def test_all_are_timed_in_turn(models, tmp_path, monkeypatch):
    order = []

    def timed(entry, config):
        order.append(entry.name)
        return {"seconds_per_token": float(len(order))}

    monkeypatch.setattr(comparing, "time_once", timed)
    options = ("--against", models[0], *SPEED[2:], "--out", tmp_path, "--json")
    run(*models[1:], *options, "--repeat", "2")
    assert order[1:3] == ["w8", "w3"]
    assert order[:3] == order[3:]
    rows = json.loads(run(*models[1:], *options, "--repeat", "3").stdout)["rows"]
    assert len(order) == 9  # one round more
    assert [row["seconds_per_token"] for row in rows] == [4, 5, 6]  # medians
    run(models[1], *options, "--repeat", "1")
    assert order[9:] == [order[0], "w8"]  # beside others than before, so both anew


def test_who_is_on_the_frontier():
    rows = [{}, {"x": 1, "y": 3}, {"x": 2, "y": 2}, {"x": 2, "y": 3}, {"x": 3, "y": 2}, {"x": 3}]
    assert mark_frontier(rows, "x", "y") == [False, True, True, False, False, False]
    alike = [{"x": 1, "y": 1}, {"x": 1, "y": 1}]
    assert mark_frontier(alike, "x", "y") == [True, True]


def test_medians_of_rounds():
    rounds = [{"a": 3.0}, {"a": 1.0}, {"a": 2.0}]
    assert medians(rounds) == {"a": 2.0, "rounds": 3}


def test_tasks_have_their_intervals():
    metrics = {"samples": 100, "acc,none": 0.5, "acc_stderr,none": 0.05, "word_acc": None}
    headings, cells = table_of([{"name": "m", "bytes": 2_000_000, "tasks": {"quiz": metrics}}])
    assert headings == ["model", "size, MB", "quiz, acc,none"]
    assert cells == [["m", "2.0", "0.500 ± 0.098"]]


def test_recall_is_that_of_eval(models, tmp_path):
    """On models whose context has room for a question."""
    roomy = [shutil.copytree(folder, tmp_path / f"m{n}") for n, folder in enumerate(models[:2])]
    for folder in roomy:
        config = json.loads((folder / "config.json").read_text())
        config["max_position_embeddings"] = 1024
        (folder / "config.json").write_text(json.dumps(config))
    asked = ("--recall", "--distances", "32")
    options = ("--against", roomy[0], "--repeat", "0", "--out", tmp_path / "out", "--json")
    rows = json.loads(run(roomy[1], *options, *asked).stdout)["rows"]
    for row, folder in zip(rows, map(str, roomy), strict=True):
        alone = CliRunner().invoke(main, ["eval", folder, *asked, "--json"])
        assert row["recall"] == json.loads(alone.stdout)["recall"]
    headings, cells = table_of(rows)
    assert headings[-2:] == ["passkey 32 back", "key-value 32 back"]
    assert all(re.fullmatch(r"\d+% \(\d+% to \d+%\)", line[-1]) for line in cells)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{w8}", "{w8}"), "names two of the models"),
        (("{w8}+int8+fp8",), "says twice what one thing is rounded to"),
        (("{w8}+int8", "--text", "{text}", *SHORT, "--engine", "transformers"), "for the runtime"),
        (("{w8}/nowhere",), "does not exist"),
        (("{w8}", "--prompt-tokens", "100000"), "allows at most"),
        (("{w8}", "--text", "{text}", "--seq-len", "100000"), "allows at most"),
        (("{w8}", "--recall", "--distances", "100000"), "none leaves room"),
        (("{w8}", "--distances", "64"), "is for --recall"),
        (("{w8}", "--out", "{text}"), "is a file"),
        (("{w8}", "--out", "{w8}"), "holds something else"),
    ],
)
def test_bad_input_is_one_line(arguments, message, models, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "time_once", None)  # nothing is measured
    monkeypatch.chdir(tmp_path)
    filled = [one.format(w8=models[1], text=text_file) for one in arguments]
    result = CliRunner().invoke(main, ["compare", *filled, "--against", models[0]])
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_marks_are_for_what_the_runtime_serves(models, model_folder, tmp_path):
    folder = tmp_path / "unserved"
    shutil.copytree(model_folder("phi"), folder)
    for marks, refused in (("", False), ("+head8", True)):
        entries = comparing.entries_of([f"{folder}{marks}"], models[0])
        comparison = comparing.Comparison(entries, comparing.Measures(), tmp_path / "out")
        with pytest.raises(InputError, match="Phi") if refused else contextlib.nullcontext():
            comparison.check()


def test_another_vocabulary_is_refused(models, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for path in comparing.resolve_model(models[0]).folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 7}
    (folder / "config.json").write_text(json.dumps(config))
    entries = comparing.entries_of([str(folder)], models[0])
    with pytest.raises(InputError, match="vocabulary"):
        comparing.Comparison(entries, comparing.Measures(), tmp_path / "out").check()


def test_two_runs_into_one_folder(models, tmp_path):
    """The second is told to wait; a lock that was left behind stands in nobody's way."""
    comparison = comparing.Comparison(
        comparing.entries_of(models[1:], models[0]), comparing.Measures(), tmp_path
    )
    comparison.check()
    refused = pytest.raises(InputError, match="is being measured into by another run; wait")
    with FileLock(tmp_path / comparing.LOCK), refused:
        comparison.measure()
    (tmp_path / comparing.LOCK).touch()
    comparing.Comparison(comparison.entries, comparing.Measures(), tmp_path).measure()


def test_a_table_too_wide_for_the_terminal_is_turned(capsys):
    """A column for each model, as many at once as fit; nothing is cut off, and intervals are left
    to the files."""
    row = {"bytes": 2_000_000, "kl_mean": 0.5, "kl_mean_interval": [0.4, 0.6], "perplexity": 9.0}
    print_comparison([row | {"name": "small"}, row | {"name": "other"}], [])
    assert [line.split("│")[1].strip() for line in lines_in(capsys)[3:5]] == ["small *", "other *"]
    row |= {"seconds_per_token": 0.01, "time_to_first_token_s": 0.1, "kv_bytes_per_token": 3}
    rows = [row | {"name": f"a model with a long name {number}"} for number in range(5)]
    print_comparison(rows, ["How it was measured."])
    lines = lines_in(capsys)
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= 80
    for shown in (*(row["name"] for row in rows), "KV, bytes a token", "How it was measured."):
        assert any(shown in line for line in lines), shown
    assert not any("0.4" in line for line in lines)


def lines_in(capsys):
    return capsys.readouterr().out.splitlines()


def test_a_cost_that_no_lossy_model_has_gets_no_panel(tmp_path):
    """One that lost nothing was timed; the other was not."""
    pytest.importorskip("matplotlib")
    rows = [
        {"name": "original", "bytes": 8, "seconds_per_token": 2.0},
        {"name": "same", "bytes": 8, "seconds_per_token": 1.0, "kl_mean": 0.0},
        {"name": "small", "bytes": 4, "kl_mean": 0.1},
    ]
    assert write_plot(tmp_path / "plot.png", rows)
    assert not write_plot(tmp_path / "other.png", rows[:2])


def test_names_of_points_do_not_lie_on_each_other():
    """Six points in one place, and one at the edge; lines lead to names that are further off."""
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure(layout="constrained")
    axes = figure.subplots()
    points = [(1.0, 1.0, f"a long name, number {n}") for n in range(5)]
    points += [(1.0, 1.001, "sixth"), (2.0, 2.0, "edge")]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o")
    figure.draw_without_rendering()
    label_points(axes, points)
    names = [text for text in axes.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in names]
    assert [text.get_text() for text in names] == [name for _, _, name in points]
    assert 1 <= len(axes.texts) - len(names) < len(names)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) for box in boxes)
