"""Recall: the distances of what is asked, what counts as found, and who finds what."""

import json
import math
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compress import recall
from compress.cli import main
from compress.core.errors import InputError
from compress.core.source import ModelSource
from compress.core.tokenizer import load_tokenizer
from compress.engines import load_predictor
from compress.recall import RecallConfig, Trial, evaluate_recall, make_trials, wilson
from compress.runtime.scoring import Piece
from tests.conftest import make_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny random model with room for 1,024 tokens, and a tokenizer of single characters."""
    folder = make_model("llama", tmp_path_factory.mktemp("recall"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return ModelSource(str(folder), folder)


@pytest.fixture(scope="module")
def tokenizer(source):
    return load_tokenizer(source.folder)


@pytest.mark.parametrize("task", recall.TASKS)
@pytest.mark.parametrize("distance", [300, 700])
def test_the_answer_stands_where_it_is_said_to(task, distance, tokenizer):
    """By searching for it in the text; a distance is met to within a sentence's half a part."""
    seen = set()
    for trial in make_trials(task, distance, 8, 3, tokenizer):
        text = tokenizer.decode(trial.tokens)  # a character a token
        answer = tokenizer.decode(trial.tokens[trial.first :])
        assert re.fullmatch(r" \d{5}", answer)
        places = [match.end() for match in re.finditer(answer, text)]
        assert len(places) == 2, "before its question, and at the end"
        assert trial.first - places[0] == trial.distance
        assert abs(trial.distance - distance) < 25 * (1 if task == "passkey" else recall.PAIRS)
        question = text[: trial.first].rpartition("\n")[2].rpartition("? ")[2]
        assert text.index(question) + len(question) + len(answer) == places[0]
        numbers = re.findall(r"\d{5}", text)
        assert len(numbers) == (2 if task == "passkey" else recall.PAIRS + 1)
        seen.add(answer)
    assert len(seen) == 8
    again = list(make_trials(task, distance, 8, 3, tokenizer))
    assert {tokenizer.decode(trial.tokens[trial.first :]) for trial in again} == seen


def remembers(window):
    """A model that goes on as the longest equal ending did, in its last `window` tokens."""

    def predictor(spans):
        for index, span in enumerate(spans):
            rows = torch.full((len(span.tokens) - span.first, 128), -8.0)
            for row, place in enumerate(range(span.first, len(span.tokens))):
                rows[row, best_match(span.tokens[max(0, place - window) : place].tolist())] = 8.0
            half = len(rows) // 2
            yield Piece(index, span.first, rows[:half])
            yield Piece(index, span.first + half, rows[half:])

    return predictor


def best_match(tokens):
    """The token after the longest earlier occurrence of how the tokens end."""
    for length in range(len(tokens) - 1, 0, -1):
        ending = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == ending:
                return tokens[start + length]
    return 0


def test_who_sees_so_far_finds_so_far(source, monkeypatch):
    """The answer and the question's words before it, some 35 tokens, must be in the window."""
    monkeypatch.setattr(recall, "settle_engine", lambda *_: "oracle")
    monkeypatch.setattr(recall, "load_predictor", lambda *_: remembers(450))
    found = evaluate_recall(source, RecallConfig((300, 380, 600), trials=4))
    for rows in found["recall"].values():
        shares = {row["distance"]: row["found"] for row in rows}
        assert shares == {300: 1.0, 380: 1.0, 600: 0.0}
        surprises = [row["surprise"] for row in rows]
        assert max(surprises[:2]) < 1e-3 < 16 < surprises[2]
        low, high = rows[0]["found_interval"]
        assert (low, high) == pytest.approx((0.5101, 1.0), abs=1e-4)


@pytest.mark.parametrize("engine", ["runtime", "transformers"])
def test_found_is_what_greedy_decoding_writes(engine, source):
    """Against transformers' generate, and its own loss."""
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    prompt = torch.randint(3, 90, (1, 70), generator=torch.Generator().manual_seed(1))
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )[0]  # fmt: skip
    trials = []
    for wrong in (None, 70, 75):
        tokens = written.numpy().copy()
        if wrong:
            tokens[wrong] = (tokens[wrong] + 1) % 90
        trials.append(Trial(tokens, 70, 50))
    predictor = load_predictor(engine, source, "float32")
    answers = list(recall._answers(trials, predictor))
    assert [hit for hit, _ in answers] == [True, False, False]
    for trial, (_, surprise) in zip(trials, answers, strict=True):
        ids = torch.from_numpy(trial.tokens)[None]
        labels = ids.clone()
        labels[:, :70] = -100
        with torch.no_grad():
            loss = float(model(ids, labels=labels).loss) * 6
        assert surprise == pytest.approx(loss, rel=1e-4)  # float32, in another order


def test_wilson_is_the_textbooks():
    """Table values, as of any calculator of the interval."""
    assert wilson(0, 10) == [0.0, pytest.approx(0.2775, abs=1e-4)]
    assert wilson(5, 10) == [pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4)]
    assert wilson(20, 20) == [pytest.approx(0.8389, abs=1e-4), 1.0]


def test_the_command_asks_and_tells(source):
    """A random model knows nothing: its surprise is some nats a digit."""
    command = ["eval", source.ref, "--recall", "--trials", "2", "--json"]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    for rows in result["recall"].values():
        assert [row["distance"] for row in rows] == [128, 512]  # 2048 is beyond the context
        assert all(row["found"] == 0 and row["surprise"] > 5 for row in rows)
        assert all(math.isfinite(value) for row in rows for value in row["surprise_interval"])
    plain = CliRunner().invoke(main, [*command[:-1], "--distances", "300"], catch_exceptions=False)
    assert "key-value" in plain.stdout
    assert "300" in plain.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recall", "--distances", "far"], "distances 'far'; give numbers"),
        (["--recall", "--distances", "1000"], "distance 1000 with a context of 1024 tokens: at m"),
        (["--recall", "--distances", "8"], "distance 8 is no more than a question"),
        (["--recall", "--trials", "1"], "trials is 1; allowed is 2 or more"),
        (["--trials", "4"], "nothing to measure"),
        (["--text", __file__, "--trials", "4"], "are for --recall"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message, source):
    done = CliRunner().invoke(main, ["eval", source.ref, *options])
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")


def test_logits_of_nan_are_no_answer(source, monkeypatch):
    def broken(spans):
        for index, span in enumerate(spans):
            yield Piece(index, span.first, torch.full((len(span.tokens) - span.first, 128), np.nan))

    monkeypatch.setattr(recall, "load_predictor", lambda *_: broken)
    with pytest.raises(InputError, match="gives NaN or infinite logits"):
        evaluate_recall(source, RecallConfig((128,), trials=2))
