"""What README and docs/ say is real: commands parse, links lead somewhere, make has the targets."""

import re
import shlex
from pathlib import Path

import click
import pytest

from compress.chain_recipe import build_chain
from compress.cli import main
from compress.strict_yaml import parse_yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}


def blocks(language, text):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


SHELL_LINES = [
    line
    for text in TEXTS.values()
    for block in blocks("sh", text)
    for line in block.strip().splitlines()
]
COMMANDS = dict.fromkeys(line for line in SHELL_LINES if line.startswith("compress "))


def test_newcomers_commands_are_makefile_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in SHELL_LINES if line.startswith("make ")]
    assert targets == ["demo", "test", "gpu-check"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line, tmp_path, monkeypatch):
    """All flags exist and all values are of the right type; the command itself is not run."""
    monkeypatch.chdir(tmp_path)
    for file in ("wiki.txt", "prompts.jsonl", "requests.jsonl"):
        (tmp_path / file).touch()
    _, name, *arguments = shlex.split(line)
    command = main.get_command(main.make_context("compress", [], resilient_parsing=True), name)
    assert command is not None, f"no command {name}"
    if isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(name, arguments)


def test_python_examples_run(model_folder, tmp_path, monkeypatch):
    """The Python examples one after the other, on a tiny model in place of the real one."""
    quantizing, generating = (
        example for text in TEXTS.values() for example in blocks("python", text)
    )
    monkeypatch.chdir(tmp_path)
    quantizing = quantizing.replace("64", "16").replace('"smollm2"', repr(str(model_folder())))
    values = {"samples": 2, "seq_len": 32}
    quantizing = quantizing.replace('"out":', f'"calibration": {values}, "out":')
    namespace: dict = {}
    exec(quantizing, namespace)
    assert (tmp_path / "smollm2-w4" / "config.json").exists()
    assert namespace["report"]["layers"]
    tiny = "The capital of France is", "w1 w2"  # words that the tiny tokenizer knows
    exec(generating.replace(*tiny).replace("Once upon a time", "w3"), namespace)
    assert all(output.outputs[0].token_ids for output in namespace["outputs"])


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"])
def test_documents_exist_and_are_linked(name):
    assert (ROOT / name).stat().st_size > 500
    assert name in README or name == "LICENSE"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page.name]):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            text = target.read_text(encoding="utf-8")
            assert heading in map(anchor, re.findall(r"^#+ (.*)$", text, flags=re.M)), link


NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w)")
SETTINGS = {"Plan first", "Methods"}  # of formulas (tests/compress/test_plan.py), and of defaults


def numbers_in(text):
    return [number.replace(",", "") for number in NUMBER.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_the_numbers_of_the_records_that_they_name(page):
    """To the digits that are shown; a share there may be a percentage here."""
    for section in re.split(r"^(?=#+ )", TEXTS[page.name], flags=re.M):
        links = re.findall(r"\]\(([^)#]*benchmarks/results/[^)#]*\.md)\)", section)
        if not links or section.partition("\n")[0].lstrip("# ") in SETTINGS:
            continue
        records = (numbers_in((page.parent / link).read_text(encoding="utf-8")) for link in links)
        measured = [float(number) for record in records for number in record]
        rows = (re.sub(r"\]\([^)]*\)", "", row) for row in re.findall(r"^\|.*$", section, re.M))
        for row in rows:
            for shown in numbers_in(row):
                half = 0.5001 * 10 ** -len(shown.partition(".")[2])
                found = (
                    abs(factor * value - float(shown)) <= half
                    for value in measured
                    for factor in (1, 100)
                )
                assert any(found), f"{shown} in {row}"


def anchor(title):
    """As GitHub makes it of a heading."""
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


def test_recipes_are_valid():
    (text,) = blocks("yaml", TEXTS["recipes.md"])
    recipe = build_chain(parse_yaml(text, "recipes.md"))
    assert recipe.names == ["stage 1 (prune)", "stage 2 (distill)", "stage 3 (gptq)"]
