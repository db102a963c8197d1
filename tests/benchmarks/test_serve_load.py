"""The load test of `compress serve`, small; and that it would see what it looks for."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEMPLATE = "{% for m in messages %}{{ 'w1 ' + m.content + ' w2 ' }}{% endfor %}w3"


@pytest.fixture
def parts(monkeypatch):
    """The modules under benchmarks/load."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("prometheus_client")
    from load import asked, clients

    return asked, clients


@pytest.fixture
def chat_model(model_folder, tmp_path):
    """A tiny model with a chat template and room for answers that take a while."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in model_folder().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name, more in (
        ("config.json", {"max_position_embeddings": 2048}),
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_forty_streams(chat_model, tmp_path):
    pytest.importorskip("uvicorn")
    draw = random.Random(0)
    lines = [[f"w{draw.randrange(120)}" for _ in range(draw.randint(2, 8))] for _ in range(60)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": " ".join(line)}) + "\n" for line in lines))
    done = run(
        "serve_load.py", chat_model, tmp_path / "work", "--dataset", prompts, "--streams", 40,
        "--slots", 8, "--max-tokens", 200, "--kv-cache-memory", "256KiB", "--dtype", "float32",
        "--drain", 120, "--short-drain", 0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "work" / "serve-load.json").read_text())
    assert len(found["rounds"]) == 3
    for entry in found["rounds"]:
        assert entry["faults"] == []
        assert entry["blocks"]["in_use"] == 0
        assert entry["outcomes"]["answered"] >= 10
        assert entry["malformed"] >= 29
        assert entry["peak_running"] <= 8
        assert entry["peak_waiting"] <= 40
    assert max(entry["peak_waiting"] for entry in found["rounds"]) >= 10
    assert max(entry["preemptions"] for entry in found["rounds"]) > 0
    kinds = {kind for entry in found["rounds"] for kind in entry["outcomes"]}
    # 48 come, 40 have room
    assert {"left before any text", "left mid-stream", "refused, 429"} <= kinds
    patient, short = found["endings"]
    assert patient["exit_code"] == 0
    assert patient["unfinished_at_term"] > 0
    assert patient["outcomes"] == {"answered": 40}
    assert short["outcomes"].get("error event", 0) + short["outcomes"].get("refused, 503", 0) > 0
    text = (tmp_path / "work" / "serve-load.md").read_text()
    assert "| refused with 429 and Retry-After |" in text
    assert "| 120 |" in text


RIGHT = {"prompt_tokens": 3, "texts": ["abc"], "finish_reasons": ["length"], "tokens": 2}


def outcome(**differing):
    whole = {
        "texts": {0: "abc"},
        "finish_reasons": {0: "length"},
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "status": 200,
        "done": True,
    }
    return whole | differing


@pytest.mark.parametrize(
    ("differing", "ending", "words"),
    [
        ({}, False, None),
        ({"texts": {0: "abd"}}, False, "output 0 is 'abd'"),
        ({"texts": {0: "ab"}}, False, "not ['abc']"),
        ({"texts": {0: "abc", 1: ""}}, False, "output 1"),
        ({"texts": {}}, False, "not ['abc']"),
        ({"finish_reasons": {0: "stop"}}, False, "ended by"),
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 1}}, False, "usage"),
        ({"usage": None}, False, "usage"),
        ({"left": True, "done": False, "texts": {0: "ab"}}, False, None),
        ({"left": True, "done": False, "texts": {0: "b"}}, False, "output 0 is 'b'"),
        ({"done": False}, True, "cut off in silence"),
        ({"status": 0, "broken": "reset", "texts": {}}, True, "reset"),
        ({"error": {"message": "no"}, "texts": {0: "a"}}, False, "no"),
        ({"error": {"message": "no"}, "texts": {0: "a"}}, True, None),
        ({"error": {"message": "no"}, "texts": {0: "b"}}, True, "output 0 is 'b'"),
        ({"status": 429, "texts": {}}, False, "without Retry-After"),
        ({"status": 429, "texts": {}, "retry_after": "2"}, False, None),
        ({"status": 503, "texts": {}, "retry_after": "2"}, False, "HTTP 503"),
        ({"status": 503, "texts": {}, "retry_after": "2"}, True, None),
        ({"status": 500, "texts": {}}, True, "HTTP 500"),
    ],
)
def test_faults_are_seen(parts, differing, ending, words):
    asked, clients = parts
    request = asked.Asked(0, "chat", [], {"max_tokens": 2}, stream=True)
    found = clients.fault(clients.Outcome(**outcome(**differing)), request, RIGHT, ending)
    assert found is None if words is None else words in found


def test_requests_are_of_all_kinds_and_the_same_each_time(parts):
    asked, _ = parts
    texts = ["one", "two", "three"]
    found = asked.requests(600, texts, 48, seed=0)
    assert found == asked.requests(600, texts, 48, seed=0)
    shares = {
        "streamed": sum(request.stream for request in found),
        "chat": sum(request.endpoint == "chat" for request in found),
        "seeded": sum("seed" in request.settings for request in found),
        "of two outputs": sum(request.settings.get("n") == 2 for request in found),
        "with stop strings": sum("stop" in request.settings for request in found),
    }
    assert all(count > 30 for count in shares.values()), shares
    fates = asked.fates(found, 64, 0, 1)
    assert fates != asked.fates(found, 64, 0, 2)
    leavers = [fate for fate in fates if not fate.stays]
    assert 120 < len(leavers) < 240  # 180 expected, standard deviation 11
    for name in ("seconds", "ended", "events"):
        assert sum(getattr(fate, name) is not None for fate in leavers) > 20
