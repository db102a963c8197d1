"""Our lm-eval model against lm-eval's own HFLM: the same requests, the same answers.

Log-likelihoods are sums of up to 600 tokens' log-probabilities in float32, each off by some 1e-5
(see test_engines.py), so 1e-3 is allowed; accuracies are equal.  On real vocabularies HFLM is off
by some 1e-5 a token in one direction, which is PyTorch's log_softmax of 49,152 logits; the
runtime's logit - logsumexp is within 1e-7 of float64 on average (SmolLM2, 1,498 tokens).
"""

import json
import random

import pytest
import torch

from compress.core.errors import InputError
from compress.core.source import resolve_model
from compress.core.tokenizer import load_tokenizer
from compress.loading import load_model
from tests.conftest import WORDS

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from compress.harness import RuntimeLM
from compress.tasks import evaluate_tasks

TOLERANCE = 1e-3
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]

TASKS = {
    "choices": """
task: choices
custom_dataset: !function data.load
output_type: multiple_choice
test_split: test
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "rolling": """
task: rolling
custom_dataset: !function data.load
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
""",
    "generation": """
task: generation
custom_dataset: !function data.load
output_type: generate_until
test_split: test
doc_to_text: "{{query}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["w7"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
""",
}
DATA = """
import json
from pathlib import Path

import datasets


def load(**_):
    lines = Path(__file__).with_name("data.jsonl").read_text().splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
"""


@pytest.fixture(autouse=True)
def no_survey(monkeypatch):
    """The harness surveys drivers and packages on each run: seconds, and no part of a score."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.fixture(scope="module")
def both(model_folder):
    """A function that gives our model and HFLM of a family, each made once."""
    made = {}

    def get(family):
        if family not in made:
            folder = model_folder(family)
            reference = HFLM(
                pretrained=load_model(folder),
                tokenizer=load_tokenizer(folder),
                batch_size=3,
                softmax_dtype="float32",
            )
            made[family] = RuntimeLM(resolve_model(str(folder))), reference
        return made[family]

    return get


def instances(kind, arguments):
    return [Instance(kind, {}, entry, index) for index, entry in enumerate(arguments)]


def words(draw, count):
    return " ".join(draw.choices(WORDS, k=count))


def assert_same_likelihoods(models, arguments):
    ours, theirs = (lm.loglikelihood(instances("loglikelihood", arguments)) for lm in models)
    assert len(ours) == len(arguments)
    for found, expected in zip(ours, theirs, strict=True):
        assert found[0] == pytest.approx(expected[0], abs=TOLERANCE)
        assert found[1] == expected[1]
    return ours


@pytest.mark.parametrize("family", FAMILIES)
def test_loglikelihood(family, both):
    """Short and long, grouped and not, with spaces where HFLM moves them, and with no context."""
    draw = random.Random(0)
    arguments = []
    for _ in range(6):
        context = words(draw, draw.randrange(1, 30))
        arguments += [(context, " " + words(draw, draw.randrange(1, 6))) for _ in range(4)]
    arguments += [
        ("", "w5 w6"),
        ("", "<s>w5 w6"),
        ("<s>w3", " w4"),
        ("w1  ", "w2"),
        ("w1 w2", "34 w5"),
    ]
    arguments += [(words(draw, 60), " w3 w4"), ("w1", " " + words(draw, 25))]  # 128 tokens fit
    draw.shuffle(arguments)
    assert_same_likelihoods(both(family), arguments)


def test_what_the_model_would_say_is_greedy(both):
    """Of contexts and the token that the model puts first, where text and tokens agree on it."""
    ours, theirs = both("llama")
    pairs = []
    for context in WORDS:
        ids = ours.tok_encode(context)
        token = int(theirs.model(torch.tensor([ids])).logits[0, -1].argmax())
        text = ours.tokenizer.decode([token])
        if text and ours.tok_encode(context + text) == [*ids, token]:
            pairs.append((context, text))
    assert pairs
    assert all(is_greedy for _, is_greedy in assert_same_likelihoods((ours, theirs), pairs))


@pytest.mark.parametrize("continuation", ["", "w1 " * 100])
def test_continuations_that_cannot_be_scored(continuation, both):
    ours, _ = both("llama")
    with pytest.raises(InputError, match=r"context allows 1 to 128"):
        ours.loglikelihood(instances("loglikelihood", [("w1", continuation)]))


@pytest.mark.parametrize("family", FAMILIES)
def test_loglikelihood_rolling(family, both):
    """Texts of less than a window, of just one, and of several; nothing has likelihood 1."""
    draw = random.Random(1)
    arguments = [(words(draw, count),) for count in (1, 5, 43, 44, 200, 100)] + [("",)]
    ours, theirs = (
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", arguments))
        for lm in both(family)
    )
    assert ours[-1] == theirs[-1] == 0
    assert ours == pytest.approx(theirs, abs=TOLERANCE, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["\n\n"], "max_gen_toks": 20},
        {"until": ["w1", "9"], "max_gen_toks": 20},
        {"until": "8", "max_gen_toks": 30, "do_sample": False, "temperature": 0.7},
        {"max_new_tokens": 5, "temperature": 0},
        {"until": ["</s>"], "max_gen_toks": 120},  # leaves 8 tokens of the context's 128
        {"until": ["w"], "max_gen_toks": 20, "repetition_penalty": 1.3},
    ],
)
def test_generate_until(family, settings, both):
    draw = random.Random(2)
    arguments = [(words(draw, draw.randrange(1, 40)), settings) for _ in range(7)]
    ours, theirs = (
        lm.generate_until(instances("generate_until", arguments)) for lm in both(family)
    )
    assert ours == theirs
    assert any(ours)


def test_sampling_is_seeded_and_stops(model_folder):
    source = resolve_model(str(model_folder()))
    settings = {"until": ["w3"], "max_gen_toks": 15, "do_sample": True, "temperature": 20.0}
    requests = instances("generate_until", [("w1 w2", settings)] * 8)
    texts = [RuntimeLM(source, seed=seed).generate_until(requests) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 4
    assert not any("w3" in text for text in texts[0])


def test_generation_settings_come_from_the_folder_where_a_task_is_silent(model_folder, both):
    ours, _ = both("llama")
    assert ours._params({"max_gen_toks": 4, "do_sample": True, "temperature": 0.5}, []).top_k == 50
    greedy = ours._params({"max_gen_toks": 4, "do_sample": False}, ["", "w1", "</s>"])
    assert (greedy.temperature, greedy.top_k, greedy.stop) == (0, 0, ("w1", "</s>"))
    assert greedy.stop_token_ids == (ours.eot_token_id,)
    with pytest.raises(InputError, match=r"sets num_beams.*--engine transformers"):
        ours._params({"max_gen_toks": 4, "do_sample": False, "num_beams": 4}, [])


def test_a_generation_that_the_context_cannot_hold(both):
    ours, _ = both("llama")
    requests = instances("generate_until", [("w1", {"until": [], "max_gen_toks": 128})])
    with pytest.raises(InputError, match=r"wants 128 new tokens.*context of 128"):
        ours.generate_until(requests)


def test_an_answer_that_fails_is_no_answer(model_folder):
    ours = RuntimeLM(resolve_model(str(model_folder())))
    ours._decoder.forward = lambda batch: torch.full((len(batch.rows), 128), torch.nan)
    requests = instances("generate_until", [("w1", {"until": [], "max_gen_toks": 4})] * 2)
    with pytest.raises(InputError, match=r"2 of 2 answers failed; the first: .*NaN"):
        ours.generate_until(requests)


@pytest.fixture
def task_files(tmp_path):
    draw = random.Random(3)
    with (tmp_path / "data.jsonl").open("w", encoding="utf-8") as lines:
        for _ in range(12):
            choices = [words(draw, draw.randrange(1, 5)) for _ in range(4)]
            row = {"query": words(draw, 12), "choices": choices, "gold": draw.randrange(4)}
            row |= {"long": words(draw, 90), "answer": words(draw, 3)}
            lines.write(json.dumps(row) + "\n")
    (tmp_path / "data.py").write_text(DATA, encoding="utf-8")
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def test_tasks_of_every_kind_agree(model_folder, task_files):
    source = resolve_model(str(model_folder("qwen3")))
    ours, theirs = (
        evaluate_tasks(source, list(TASKS), task_files, limit=10, engine=engine)
        for engine in ("runtime", "transformers")
    )
    assert (ours["engine"], theirs["engine"]) == ("runtime", "transformers")
    assert ours["tasks"]["choices"] == theirs["tasks"]["choices"]
    assert ours["tasks"]["generation"] == theirs["tasks"]["generation"]
    for name, value in theirs["tasks"]["rolling"].items():
        assert ours["tasks"]["rolling"][name] == (value and pytest.approx(value, rel=1e-5))
