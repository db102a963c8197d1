"""The scripts that write the records of speculation, small; and that they see what differs."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from compress.bench.speculative_runs import Arm
from compress.cli import main
from compress.cli.bench_speculative import speculative_command

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """A function that imports a script under benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Prompts that contain each other, so that blocks are found in the prefix cache."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    texts = [" ".join(f"w{place % 7}" for place in range(10 + 5 * number)) for number in range(5)]
    kinds = ("writing", "rag", "rag", "rag", "math")
    lines = [{"category": kind, "turns": [text]} for kind, text in zip(kinds, texts, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def identity(script, model_folder, dataset, tmp_path, monkeypatch):
    """The script's `main` on a tiny model in float32 that drafts for itself; returns its table."""
    module = script("speculative_identity")
    folder = model_folder(layers=4)
    flags = ["--dense", folder, "--w4", folder, "--draft", folder, "--dataset", dataset]
    flags += ["--max-tokens", 12, "--threads", 1, "--only", "float32"]

    def run(*more: str) -> dict[str, list[str]]:
        argv = ["speculative_identity.py", tmp_path / "work", *flags, *more]
        monkeypatch.setattr("sys.argv", [str(part) for part in argv])
        module.main()
        page = (tmp_path / "work" / "speculative-identity.md").read_text()
        cells = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
        return {row[2]: row for row in cells if len(row) > 2 and row[1] == "float32"}

    return module, run, folder


def test_identity(identity, monkeypatch):
    module, run, folder = identity
    monkeypatch.setattr(module, "CHUNK", 3)
    rows = run()
    assert list(rows) == ["ngram", "self", folder.name]
    for row in rows.values():
        assert row[3] == "5"
        assert int(row[5]) > 0  # drafted
        assert row[7:9] == ["**0**", ""]
    assert rows[folder.name][5] == rows[folder.name][6]  # it knows itself: all are accepted

    def again(*arguments):
        raise AssertionError("computed again")

    monkeypatch.setattr(module.Bench, "compare", again)
    assert run() == rows
    with pytest.raises(AssertionError, match="computed again"):
        run("--tokens", "2")


def test_a_text_that_differs(identity, monkeypatch):
    """A wrong token at place 3: the gap is that of transformers' logits after the same prefix.

    Within 1e-3, for logits of about 30 in float32 summed in other orders.
    """
    from transformers import AutoModelForCausalLM

    _, run, folder = identity
    answer, places = Arm.answer, []

    def wrong(arm, prompts, params):
        found = answer(arm, prompts, params)
        if arm.length == "ngram":
            output = found.outputs[1]
            with torch.inference_mode():
                ids = torch.tensor([prompts[1] + output[:3]])
                logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0, -1]
            other = int(logits.topk(3).indices[2])
            places.append(float(logits[output[3]] - logits[other]))
            output[3] = other
        return found

    monkeypatch.setattr(Arm, "answer", wrong)
    rows = run()
    assert rows["ngram"][7] == "**1**"
    assert float(rows["ngram"][8]) == pytest.approx(places[0], abs=1e-3)
    assert places[0] > 0
    assert rows["self"][7] == "**0**"


def test_speeds(script, model_folder, dataset, tmp_path, monkeypatch):
    """Every case is a call that the command takes, and the page has all of what came of one."""
    module = script("speculative")
    folder = str(model_folder(layers=4))
    argv = ["speculative.py", tmp_path, "--w4", folder, "--dense", folder, "--draft", folder]
    argv += ["--dataset", dataset, "--max-tokens", "8", "--threads", "1", "--per-category", "2"]
    monkeypatch.setattr("sys.argv", [str(part) for part in argv])
    calls = []

    def small(command, **settings):
        """The command in this process, and only the first in full; the others' flags are read."""
        flags = command[command.index("speculative") + 1 :]
        calls.append(flags)
        speculative_command.make_context("speculative", flags[:])
        if len(calls) == 1:
            done = CliRunner().invoke(main, ["bench", "speculative", *flags])
            assert done.exit_code == 0, done.output
            small.stdout = done.stdout
        return small

    monkeypatch.setattr(module.subprocess, "run", small)
    module.main()
    assert len(calls) == 7
    page = (tmp_path / "speculative.md").read_text()
    assert page.count("(0 texts differ)") == 7 * 4  # two temperatures, two lengths
    rows = json.loads(small.stdout)["rows"]
    lines = [line for line in page.splitlines() if line.startswith("| rag ")]
    assert len(lines) == 7 * 4
    assert all(line.count("|") == 12 for line in lines)
    assert page.count("Forward passes alone, median ms by tokens: 1: ") == 1
    row = next(row for row in rows if row["category"] == "rag")
    assert lines[0].startswith(f"| rag | {row['prompts']} | {row['looping']} |")
    module.main()
    assert len(calls) == 7  # nothing is measured again
