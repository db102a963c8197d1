"""report.html: complete, harmless, self-contained, and every number from the files beside it."""

import errno
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from compress import report as report_module
from compress.checkpoint import model_card
from compress.cli import main
from compress.core.errors import InputError
from compress.core.shards import ShardReader
from compress.inspection import inspect_folder
from compress.pipeline import run_recipe
from compress.recipe import build_recipe
from compress.report import record_quality, spread, write_report

SECTIONS = ["quality", "layers", "bytes", "float", "recipe"]
VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = """'"><script>alert(1)</script>"""
REFERRING = {"src", "href", "xlink:href", "data", "action", "srcset", "poster", "background"}


class Page(HTMLParser):
    """Elements, texts by section, tables by id; fails on a tag that is not closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.sections: dict[str, str] = {}
        self.tables: list[tuple[dict, list[list[str]]]] = []
        self.values: dict[str, list[float]] = {}  # of <data>, by section
        self._open: list[str] = []
        self._section = "head"
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = attributes["id"]
        elif tag == "table":
            self.tables.append((attributes, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
        elif tag == "data":
            self.values.setdefault(self._section, []).append(float(attributes["value"]))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"</{tag}> closes nothing"
        if tag == "section":
            self._section = "after"

    def handle_data(self, data):
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if {"td", "th"} & set(self._open):
            self.tables[-1][1][-1][-1] += data

    def rows(self, name: str) -> list[list[str]]:
        """All rows of the table with this id, or with this first cell."""
        for attributes, rows in self.tables:
            if attributes.get("id") == name or rows[0][0].strip() == name:
                return [[" ".join(cell.split()) for cell in row] for row in rows]
        raise AssertionError(f"no table {name}")

    def table(self, name: str) -> list[list[str]]:
        """Its rows below the head."""
        return self.rows(name)[1:]

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())


def faults(html: str) -> list[str]:
    """What in a page could run, or reach for something outside it."""
    page = Page(html)
    found = []
    for tag, attributes in page.elements:
        if tag in {"script", "link", "img", "iframe", "object", "embed", "base", "form"}:
            found.append(f"<{tag}>")
        for name, value in attributes.items():
            if name.startswith("on") or name in REFERRING or "://" in (value or ""):
                found.append(f"{tag} {name}={value}")
    style = "".join(re.findall(r"<style>(.*?)</style>", html, flags=re.S))
    found += re.findall(r"@import|url\(|://|expression\(", style)
    return found


def make(model, out, text_file, method, **settings):
    values = {
        "model": str(model),
        "out": out,
        "compute_dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 4, "seq_len": 64},
        "stages": [{"method": method, "group_size": 16, **settings}],
    }
    run_recipe(build_recipe(values))
    return out


@pytest.fixture(scope="module")
def made(model_folder, text_file, tmp_path_factory):
    """Output folders by method, to be read only."""
    root = tmp_path_factory.mktemp("made")
    return {m: make(model_folder(), root / m, text_file, m) for m in ("rtn", "awq")}


@pytest.fixture
def awq(made, tmp_path):
    return shutil.copytree(made["awq"], tmp_path / "awq")


def read(folder, name="compress.json"):
    return json.loads((folder / name).read_text())


def page_of(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def change(folder, edit, name="compress.json") -> None:
    """Edit a JSON file of the folder and write the report anew."""
    value = read(folder, name)
    edit(value)
    (folder / name).write_text(json.dumps(value))
    write_report(folder)


def evaluate(folder, against, text, *more):
    arguments = ["eval", folder, "--text", text, "--seq-len", 32, "--windows", 3, *more]
    arguments += ["--against", against] if against else []
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_every_section_is_there(made, method):
    page = page_of(made[method])
    assert [a["id"] for tag, a in page.elements if tag == "section"] == SECTIONS
    assert all(len(page.text(section)) > 100 for section in SECTIONS)
    told = page.text("layers")
    assert ("rtn collects no statistics" in told) == (method == "rtn")
    assert ("the calibration text" in told) == (method == "awq")
    fingerprint = read(made[method])["calibration_sha256"]
    assert (fingerprint or "the method uses no calibration text") in page.text("recipe")


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_page_is_self_contained(made, method):
    html = (made[method] / "report.html").read_text(encoding="utf-8")
    assert faults(html) == []
    assert "default-src 'none'" in html


@pytest.mark.parametrize(
    "bad",
    [
        '<img src="x.png">',
        "<script>1</script>",
        '<p onclick="x()">a</p>',
        '<style>@import "x.css";</style>',
        "<style>p { background: url(x.png); }</style>",
        '<svg xmlns="http://www.w3.org/2000/svg"></svg>',
        '<link rel="stylesheet" href="x.css">',
    ],
)
def test_the_check_sees_faults(bad):
    assert faults(bad)


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_numbers_are_those_of_the_files(made, model_folder, method):
    folder = made[method]
    report, page = read(folder), page_of(folder)
    sizes, parts = report["sizes"], inspect_folder(folder)
    for number in ("original_bytes", "bytes", "parameters", "quantized_weights"):
        assert sizes[number] in page.values["head"]
    stored = parts["quantization"]["bits_per_weight"]
    assert any(value == pytest.approx(stored, abs=6e-4) for value in page.values["head"])

    quantized = [layer for layer in report["layers"] if layer["method"]]
    rows = page.table("all-layers")
    assert [row[0] for row in rows] == [layer["name"] for layer in quantized]
    for row, layer in zip(rows, quantized, strict=True):
        shown = "not measured" if method == "rtn" else f"{layer['output_error']:.2e}"
        assert row[1:5] == ["4", "16", shown, f"{layer['weight_error']:.2e}"]
        exact = {layer["weight_error"], layer["output_error"]} - {None}
        assert exact <= set(page.values["layers"])
    key = "weight_error" if method == "rtn" else "output_error"
    worst = sorted(quantized, key=lambda layer: layer[key], reverse=True)[:10]
    assert [row[0] for row in page.table("worst")] == [layer["name"] for layer in worst]

    original = ShardReader(model_folder())
    assert sum(sizes["original_bytes_by_part"].values()) == sum(
        map(original.tensor_bytes, original.names)
    )
    linears = sum(4 * layer["shape"][0] * layer["shape"][1] for layer in quantized)
    assert sizes["original_bytes_by_part"]["quantized linears"] == linears
    for part, size in parts["bytes_by_part"].items():
        assert size in page.values["bytes"]
        assert sizes["original_bytes_by_part"][part] in page.values["bytes"]
    run = read(folder, "run.json")
    assert page.rows("run") == [[name.replace("_", " "), str(value)] for name, value in run.items()]


def test_colours_follow_the_error(awq):
    report = read(awq)
    titles = re.findall(
        r'class="cell ([\w ]+)"[^>]*><title>(\S+): ([^<]*)<', (awq / "report.html").read_text()
    )
    style_of = {name: style for style, name, _ in titles}
    quantized = sorted(
        (layer for layer in report["layers"] if layer["method"]), key=lambda x: x["output_error"]
    )
    assert len(titles) == len(quantized) == 14  # one cell a linear, two blocks of seven
    steps = [int(style_of[layer["name"]].removeprefix("step")) for layer in quantized]
    assert steps == sorted(steps)
    assert steps[-1] == report_module.STEPS - 1
    assert len(set(steps)) > 2


def test_errors_that_fit_no_log_scale(awq):
    def edit(report):
        zero, broken, absent, *_ = (layer for layer in report["layers"] if layer["method"])
        zero["output_error"], broken["output_error"] = 0.0, float("nan")
        absent["output_error"] = None

    change(awq, edit)
    page = page_of(awq)
    assert "2 of 14 quantized linears have no output error, or none that is finite" in page.text(
        "layers"
    )
    cells = [a["class"] for tag, a in page.elements if "cell" in a.get("class", "")]
    assert cells.count("cell unmeasured") == 2
    shown = [row[3] for row in page.table("all-layers")[:3]]
    assert shown == ["0.00e+00", "nan", "not measured"]
    change(awq, lambda r: [layer.update(output_error=0.0) for layer in r["layers"]])
    assert not any("cell" in a.get("class", "") for _, a in page_of(awq).elements)


def test_overrides_and_ignored_linears(model_folder, text_file, tmp_path):
    folder = make(
        model_folder(),
        tmp_path / "out",
        text_file,
        "rtn",
        ignore=["layers.0.mlp.down_proj", "k_proj"],
        overrides={"v_proj": {"bits": 8}, "layers.1.mlp.up_proj": {"group_size": 8}},
    )
    page, report = page_of(folder), read(folder)
    llama = {"q": 48 * 48, "v": 16 * 48, "mlp": 80 * 48}
    most = 2 * (2 * llama["q"] + llama["mlp"]) + 2 * llama["mlp"]  # q, o, gate; up 0, down 1
    assert page.table("method") == [
        ["rtn", "4", "16", "as they are", "8", f"{most:,}"],
        ["rtn", "4", "8", "as they are", "1", f"{llama['mlp']:,}"],
        ["rtn", "8", "16", "as they are", "2", f"{2 * llama['v']:,}"],
    ]
    assert "4 bits (9 linears), 8 bits (2)" in page.text("head")

    left = {row[0]: row[1:] for row in page.table("left")}
    names = ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"]
    names.append("model.layers.1.self_attn.k_proj")
    weights = 2 * llama["v"] + llama["mlp"]
    assert left["named by ignore"] == ["3", f"{weights:,}", ", ".join(names)]
    assert left["outside the decoder blocks"][2] == "model.embed_tokens"
    assert left["the same tensor as the embeddings (tied)"][2] == "lm_head"
    cells = [a["class"] for tag, a in page.elements if "cell" in a.get("class", "")]
    assert cells.count("cell float") == 3

    card = (folder / "README.md").read_text()
    assert "tags: [compressed-tensors, rtn, 4-bit, 8-bit]" in card
    total = most + llama["mlp"] + 2 * llama["v"]
    average = 4 + 4 * 2 * llama["v"] / total
    assert f"4 bits (9 linears), 8 bits (2), {average:.2f} a weight on average" in card
    assert "group size 16 (10 linears), group size 8 (1)" in card
    assert "3 x | left in float: named by ignore" in card
    assert report["recipe"]["stages"][0]["overrides"]


def test_card_of_one_grid_states_the_group_size_in_use(made):
    report = read(made["awq"])
    card = model_card("some/model", report)
    assert "`awq`, 4 bits; symmetric; group size 16; in the" in card
    assert "awq 4-bit\n" in card
    for layer in report["layers"]:
        layer["group_size"] = None
    assert "one scale a row" in model_card("some/model", report)


def test_spread():
    assert spread(["4 bits"] * 3) == "4 bits"
    assert spread(["8 bits", "4 bits", "4 bits"]) == "4 bits (2 linears), 8 bits (1)"
    assert spread([]) == ""


def test_nothing_quantized(model_folder, text_file, tmp_path):
    folder = make(model_folder(), tmp_path / "out", text_file, "rtn", ignore=["re:.*"])
    page = page_of(folder)
    assert "nothing is quantized" in page.text("head")
    assert "Nothing is quantized" in page.text("layers")
    assert page.table("left")[0][1] == "14"
    assert "no linear quantized" in (folder / "README.md").read_text()


def test_hostile_names_are_text(awq):
    """Every string and key of the JSON files that a user or a model's author can choose."""

    def spoil(value):
        if isinstance(value, dict):
            return {k: v if k == "shape" else spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return value + HOSTILE if isinstance(value, str) else value

    record_quality(awq, MEASURED | {"tasks": {HOSTILE: {"samples": 3, "acc": 0.5}}, "limit": None})
    for name in ("compress.json", "run.json", "quality.json"):
        spoiled = spoil(read(awq, name))
        if name == "compress.json":
            spoiled["versions"][HOSTILE] = HOSTILE
        if name == "run.json":
            spoiled[HOSTILE] = HOSTILE
        (awq / name).write_text(json.dumps(spoiled))
    write_report(awq)
    html = (awq / "report.html").read_text()
    assert faults(html) == []
    page = Page(html)
    for section in ("head", *SECTIONS):
        if section != "bytes":  # it has no names from outside
            assert HOSTILE in page.text(section), section


MEASURED = {
    "model": "/home/somebody/out",
    "dtype": "float32",
    "seed": 0,
    "against": "/home/somebody/model",
    "text": "/home/somebody/text.txt",
    "text_sha256": "ab" * 32,
    "windows": 32,
    "seq_len": 64,
    "tokens": 2016,
    "perplexity": 21.54,
    "perplexity_interval": [19.5, 23.5],
    "nll": 3.07,
    "perplexity_original": 18.75,
    "perplexity_ratio": 1.1507,
    "perplexity_ratio_interval": [1.1364, 1.1655],
    "kl_mean": 0.1406,
    "kl_mean_interval": [0.1341, 0.1472],
    "kl_p99": 0.8327,
    "kl_p99_interval": [0.766, 0.9087],
    "top1_agreement": 0.7998,
    "top1_agreement_interval": [0.7916, 0.8083],
}


def test_without_measurements_it_says_how_to_measure(awq, model_folder):
    page = page_of(awq)
    for section in ("head", "quality"):
        told = page.text(section)
        assert "not measured yet" in told.lower()
        (command,) = re.findall(r"Run (compress eval .* FILE)\.", told)
        expected = ["compress", "eval", "awq", "--against", str(model_folder()), "--text", "FILE"]
        assert shlex.split(command) == expected


def test_eval_keeps_what_it_measured(awq, model_folder, text_file):
    done = evaluate(awq, model_folder(), text_file, "--json")
    assert done.exit_code == 0, done.output
    assert re.search(r"^Updated \S+quality\.json and \S+report\.html$", done.stderr, flags=re.M)
    printed = json.loads(done.stdout)
    (kept,) = read(awq, "quality.json")["texts"]
    metrics = [name for name in printed if name.startswith(("perplexity", "kl", "top1"))]
    assert len(metrics) == 11
    page = page_of(awq)
    for name in metrics:
        assert kept[name] == printed[name]
        values = printed[name] if isinstance(printed[name], list) else [printed[name]]
        assert set(values) <= set(page.values["quality"]), name
    assert {printed["perplexity"], printed["perplexity_ratio"]} <= set(page.values["head"])
    assert "not measured" not in page.text("head")
    assert "Fewer than 20 windows" in page.text("quality")
    assert kept["text"] == text_file.name
    assert kept["against"] == model_folder().name
    assert str(text_file.parent) not in (awq / "quality.json").read_text()
    assert list(awq.glob(".*")) == []

    evaluate(awq, model_folder(), text_file, "--seed", 5)
    (kept,) = read(awq, "quality.json")["texts"]
    assert kept["seed"] == 5

    evaluate(awq, None, text_file, "--windows", 4)
    both = read(awq, "quality.json")["texts"]
    assert [m["windows"] for m in both] == [3, 4]
    assert "not compared with an original" in page_of(awq).text("quality")
    assert len(re.findall("On text.txt", page_of(awq).text("head"))) == 1


def test_tasks_are_replaced_one_by_one(awq):
    def measured(**scores):
        tasks = {
            name: {"samples": 50, "acc": acc, "acc_stderr": 0.0625} for name, acc in scores.items()
        }
        return {"model": "x", "dtype": "float32", "seed": 0, "tasks": tasks, "limit": 50}

    record_quality(awq, measured(piqa=0.5, arc=0.25))
    record_quality(awq, measured(arc=0.75))
    record_quality(awq, measured(arc=0.125) | {"limit": None})
    for score in (0.5, 0.625):
        record_quality(awq, measured(arc=score) | {"lm_head_bits": 8})
    rounded = "float32, output layer in 8 bits"
    assert page_of(awq).table("task") == [
        ["piqa", "acc", "0.5000", "0.0625", "50", "the first 50", "float32"],
        ["arc", "acc", "0.7500", "0.0625", "50", "the first 50", "float32"],
        ["arc", "acc", "0.1250", "0.0625", "50", "all questions", "float32"],
        ["arc", "acc", "0.6250", "0.0625", "50", "the first 50", rounded],
    ]
    assert "not measured yet" in page_of(awq).text("head")  # tasks say nothing of the original
    record_quality(awq, MEASURED)
    assert len(page_of(awq).table("task")) == 4
    assert "/home" not in (awq / "quality.json").read_text().replace("/home/somebody/model", "")


def test_eval_leaves_other_folders_alone(awq, model_folder, text_file, tmp_path, monkeypatch):
    original = shutil.copytree(model_folder(), tmp_path / "original")
    before = sorted(path.name for path in original.iterdir())
    assert evaluate(original, None, text_file).exit_code == 0
    assert sorted(path.name for path in original.iterdir()) == before

    page = (awq / "report.html").read_bytes()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    done = evaluate(awq, None, text_file)
    assert done.exit_code == 0
    assert "quality.json" not in done.stderr
    assert not (awq / "quality.json").exists()
    assert (awq / "report.html").read_bytes() == page


def test_eval_of_a_folder_that_cannot_be_written(awq, text_file, monkeypatch):
    def refuse(path, data):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    page = (awq / "report.html").read_bytes()
    monkeypatch.setattr(Path, "write_bytes", refuse)
    done = evaluate(awq, None, text_file, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["perplexity"] > 1
    (line,) = [line for line in done.stderr.splitlines() if "not updated" in line]
    assert "Permission denied" in line
    assert not (awq / "quality.json").exists()
    assert (awq / "report.html").read_bytes() == page


def test_a_full_disk_leaves_the_old_files(awq, monkeypatch):
    record_quality(awq, MEASURED)
    before = {path.name: path.read_bytes() for path in awq.iterdir()}
    write = Path.write_bytes

    def run_out(path, data):
        write(path, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", run_out)
    with pytest.raises(OSError, match="No space"):
        record_quality(awq, MEASURED | {"perplexity": 1.0})
    assert {path.name: path.read_bytes() for path in awq.iterdir()} == before


@pytest.mark.parametrize("content", ["{", "[1]", '{"texts": [{"text": "a"}]}'])
def test_eval_beside_a_broken_quality_json(awq, text_file, content):
    (awq / "quality.json").write_text(content)
    done = evaluate(awq, None, text_file, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["perplexity"] > 1
    assert len([line for line in done.stderr.splitlines() if "not updated" in line]) == 1
    assert "Traceback" not in done.stderr
    assert (awq / "quality.json").read_text() == content


def test_files_of_another_version(awq):
    change(awq, lambda report: report["sizes"].pop("original_bytes_by_part"))
    assert page_of(awq).table("parts")[0][0] == "not recorded by part"
    with pytest.raises(InputError, match=r"not as this version writes them.*sizes"):
        change(awq, lambda report: report.pop("sizes"))


def test_page_depends_on_the_files_alone(made, model_folder, text_file, tmp_path):
    """Neither on the clock nor on the place: run.json, which holds both, is taken away."""
    pages = []
    for folder in (made["awq"], make(model_folder(), tmp_path / "awq", text_file, "awq")):
        copy = shutil.copytree(folder, tmp_path / "copies" / str(len(pages)) / "awq")
        page = (copy / "report.html").read_bytes()
        write_report(copy)
        assert (copy / "report.html").read_bytes() == page
        (copy / "run.json").unlink()
        write_report(copy)
        pages.append((copy / "report.html").read_bytes())
        assert pages[-1] != page
    assert pages[0] == pages[1]


def test_recipe_can_be_run_again(made, text_file):
    html = (made["awq"] / "report.html").read_text()
    text = re.search(r'<pre id="recipe-yaml">(.*?)</pre>', html, flags=re.S)[1]
    recipe = build_recipe(yaml.safe_load(text))
    assert recipe.calibration.source == str(text_file)
    assert recipe.stages[0].group_size == 16
