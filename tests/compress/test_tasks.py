"""Task scores against log-likelihoods computed by hand, on the project's own task files."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.cli import main
from compress.cli.eval import eval_command
from compress.core.errors import InputError
from compress.core.source import ModelSource

pytest.importorskip("lm_eval")

from compress.tasks import evaluate_tasks


def source(folder: Path) -> ModelSource:
    return ModelSource(str(folder), folder)


TASK_FILES = Path(__file__).parents[2] / "benchmarks" / "tasks"
WORDS = ["Question:", "Answer:", *(f"w{i}" for i in range(60))]
IDS = {"<unk>": 0, "</s>": 1, **{word: i for i, word in enumerate(WORDS, start=2)}}


@pytest.fixture(autouse=True)
def no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness surveys drivers and packages on each run: seconds, and no part of a score."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(IDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def documents() -> list[dict]:
    """Questions whose choices differ in length, so that acc and acc_norm can disagree."""
    generator = torch.Generator().manual_seed(3)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(60, (count,), generator=generator))

    return [
        {
            "query": f"Question: {words(3 + n % 4)}" + "\n" * (n % 2),
            "choices": [words(1), words(2), words(4), words(1)],
            "gold": 0,
        }
        for n in range(20)
    ]


def log_likelihoods(model: LlamaForCausalLM, document: dict) -> list[float]:
    """Sum of log p over each choice's tokens, after the question, `Answer:` and nothing else."""
    context = [IDS[word] for word in (document["query"] + " Answer:").split()]
    sums = []
    for choice in document["choices"]:
        ids = context + [IDS[word] for word in choice.split()]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        at = range(len(context), len(ids))
        sums.append(sum(log_p[i - 1, ids[i]].item() for i in at))
    return sums


@pytest.fixture
def data(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bool]]:
    """Write arc_easy.jsonl, whose answers the model gets right on the first 13 by plain
    likelihood, and return by hand what it gets right on each question under both metrics."""
    reference = LlamaForCausalLM.from_pretrained(model)
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    with (tmp_path / "arc_easy.jsonl").open("w", encoding="utf-8") as lines:
        for n, document in enumerate(documents()):
            scores = log_likelihoods(reference, document)
            best = max(range(4), key=scores.__getitem__)
            gold = best if n < 13 else (best + 1) % 4
            lengths = [len(choice) for choice in document["choices"]]
            best_norm = max(range(4), key=lambda c: scores[c] / lengths[c])
            right["acc"].append(best == gold)
            right["acc_norm"].append(best_norm == gold)
            lines.write(json.dumps({**document, "gold": gold}) + "\n")
    monkeypatch.setenv("COMPRESS_EVAL_DATA", str(tmp_path))
    return right


def test_scores_equal_a_hand_computation(model: Path, data: dict[str, list[bool]]) -> None:
    result = evaluate_tasks(source(model), ["arc_easy_local"], TASK_FILES, limit=None, batch_size=3)
    scores = result["tasks"]["arc_easy_local"]
    assert result["limit"] is None
    assert scores["samples"] == 20
    assert sum(data["acc"]) == 13
    assert data["acc"] != data["acc_norm"], "the two metrics should differ on this data"
    for metric, right in data.items():
        mean = sum(right) / 20
        assert scores[metric] == pytest.approx(mean)
        assert scores[f"{metric}_stderr"] == pytest.approx((mean * (1 - mean) / 19) ** 0.5)
    json.dumps(result, allow_nan=False)


def test_limit_takes_the_first_questions(model: Path, data: dict[str, list[bool]]) -> None:
    result = evaluate_tasks(source(model), ["arc_easy_local"], TASK_FILES, limit=16)
    scores = result["tasks"]["arc_easy_local"]
    assert (result["limit"], scores["samples"]) == (16, 16)
    assert scores["acc"] == pytest.approx(13 / 16)
    assert scores["acc_norm"] == pytest.approx(sum(data["acc_norm"][:16]) / 16)


@pytest.mark.parametrize("name", ["piqa", "boolq"])
def test_other_task_files_read_their_data(
    model: Path, data: dict[str, list[bool]], tmp_path: Path, name: str
) -> None:
    (tmp_path / "arc_easy.jsonl").rename(tmp_path / f"{name}.jsonl")
    result = evaluate_tasks(source(model), [f"{name}_local"], TASK_FILES, limit=None)
    assert result["tasks"][f"{name}_local"]["acc"] == pytest.approx(13 / 20)


@pytest.mark.usefixtures("data")
def test_command_prints_one_json_object(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 2), encoding="utf-8")
    arguments = [str(model), "--tasks", "arc_easy_local", "--include-path", str(TASK_FILES)]
    arguments += ["--text", str(text), "--seq-len", "16", "--windows", "4"]
    arguments += ["--against", str(model), "--limit", "5", "--json"]
    run = CliRunner().invoke(eval_command, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    result = json.loads(run.stdout)  # nothing else may be on standard output
    assert result["tasks"]["arc_easy_local"]["acc"] == 1
    assert result["kl_mean"] == 0
    run = CliRunner().invoke(eval_command, arguments[:-1], catch_exceptions=False)
    assert "arc_easy_local" in run.stdout
    assert "same most likely token" in run.stdout


def test_command_needs_something_to_measure(model: Path) -> None:
    for arguments, message in (
        ([], "nothing to measure"),
        (["--tasks", "piqa_local", "--against", str(model)], "give --text FILE too"),
    ):
        run = CliRunner().invoke(eval_command, [str(model), *arguments])
        assert run.exit_code == 2
        assert message in run.stderr


def test_bad_input_is_refused_before_loading(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr("compress.tasks._harness_model", never)
    monkeypatch.setenv("COMPRESS_EVAL_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="COMPRESS_EVAL_DATA"):
        evaluate_tasks(source(model), ["piqa_local"], TASK_FILES, limit=None)
    with pytest.raises(InputError, match="limit is 0"):
        evaluate_tasks(source(model), ["piqa_local"], TASK_FILES, limit=0)
    with pytest.raises(InputError, match="batch_size is 0"):
        evaluate_tasks(source(model), ["piqa_local"], TASK_FILES, limit=None, batch_size=0)
    with pytest.raises(InputError, match="is no folder"):
        evaluate_tasks(source(model), ["piqa_local"], tmp_path / "nowhere", limit=None)
    with pytest.raises(InputError, match="no tasks"):
        evaluate_tasks(source(model), [], TASK_FILES, limit=None)


def test_unknown_task_names_the_nearest(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # lm-eval's own thousands of tasks take seconds to index and are not the point here.
    from lm_eval.tasks import TaskManager

    def only_ours(include_path: str, include_defaults: bool = False) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", only_ours)
    with pytest.raises(InputError, match=r"task 'pika_local' is unknown.*'piqa_local'"):
        evaluate_tasks(source(model), ["pika_local"], TASK_FILES, limit=None)


def test_without_lm_eval(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"compress-llm\[eval\]"):
        evaluate_tasks(source(model), ["piqa_local"], TASK_FILES, limit=None)


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_tasks_are_looked_at_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was measured before the tasks were looked at")

    monkeypatch.setattr("compress.cli.eval.evaluate_text", never)
    monkeypatch.setattr("compress.comparing.comparison.evaluate_text", never)
    monkeypatch.setenv("COMPRESS_EVAL_DATA", str(tmp_path / "nowhere"))
    (tmp_path / "text.txt").write_text("word " * 400)
    tasks = ["--tasks", "piqa_local", "--include-path", str(TASK_FILES)]
    text = ["--text", str(tmp_path / "text.txt"), "--windows", "2", "--seq-len", "8"]
    more = []
    if command == "compare":
        other = shutil.copytree(model, tmp_path / "other")
        more = ["--against", str(other), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [command, str(model), *text, *tasks, *more])
    assert done.exit_code == 2, done.output
    assert "COMPRESS_EVAL_DATA" in done.stderr
    assert not (tmp_path / "out").exists()
