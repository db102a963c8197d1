"""README's commands are real: each parses, and a newcomer's two are Makefile targets."""

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
SHELL_LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    for line in block.strip().splitlines()
]
COMMANDS = [line for line in SHELL_LINES if line.startswith("compress ")]


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
    quantizing, generating = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    monkeypatch.chdir(tmp_path)
    quantizing = quantizing.replace('"smollm2"', repr(str(model_folder()))).replace("64", "16")
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


def test_recipes_are_valid():
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    recipe = build_chain(parse_yaml(text, "README"))
    assert recipe.names == ["stage 1 (prune)", "stage 2 (distill)", "stage 3 (gptq)"]
