"""The direction of imports, and that importing costs nothing it should not."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# folder -> what it may import of ours
ALLOWED = {
    "compress/core": {"core"},
    "kernels": {"core", "kernels"},
    "quant": {"core", "kernels", "quant"},
    "prune": {"core", "kernels", "quant", "prune"},
    "distill": {"core", "kernels", "quant", "distill"},
    "runtime": {"core", "kernels", "quant", "runtime"},
}
LAYERS = {"core", "kernels", "quant", "prune", "distill", "runtime"}


def imported_layers(path: Path) -> set[str]:
    """The layers a file imports, anywhere in it; `compress` stands for the top itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "compress":
                layer = name.split(".")[1] if "." in name else "compress"
                found.add(layer if layer in LAYERS else "compress")
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_import_direction(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        extra = imported_layers(path) - ALLOWED[folder]
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def test_the_check_sees_a_wrong_import(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from compress.quant import awq\n    import compress.recipe\n")
    assert imported_layers(wrong) == {"quant", "compress"}


def test_importing_the_package_pulls_in_nothing_heavy():
    """`import compress` and `--help` start at once: no torch, no transformers."""
    code = (
        "import sys, compress, compress.cli, compress.cli.quantize, compress.cli.serve\n"
        "heavy = {'torch', 'transformers', 'datasets', 'lm_eval', 'fastapi', 'ray'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_load():
    import compress

    for name in compress.__all__:
        assert getattr(compress, name) is not None
    with pytest.raises(AttributeError):
        _ = compress.no_such_name


def test_the_kernels_sources_are_in_the_package():
    """They are compiled on the user's machine, so a wheel without them is slow in silence."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    for path in [*ROOT.glob("kernels/*/*.h"), *ROOT.glob("kernels/*/*.cpp")]:
        package = f"compress.kernels.{path.parent.name}"
        assert package in settings["packages"]
        assert f"*{path.suffix}" in settings["package-data"][package], path


def test_every_folder_is_in_the_package():
    """A wheel without one fails where it is imported; an editable install finds it all the same."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    places = {
        settings["package-dir"].get(name, name.replace(".", "/")) for name in settings["packages"]
    }
    tops = ("compress", "prune", "distill", "runtime", "quant", "kernels")
    folders = {path.parent for top in tops for path in (ROOT / top).rglob("__init__.py")}
    assert {str(folder.relative_to(ROOT)) for folder in folders} == places
