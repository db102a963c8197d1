"""`compress bench speculative`: its sums on runs made up, and the whole of it on a tiny model."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from compress.bench import speculative, speculative_runs
from compress.bench.speculation import (
    Costs,
    Pair,
    Run,
    Step,
    acceptance,
    by_place,
    expect,
    expected_length,
    interval,
    loops,
    speed_up,
    summary,
)
from compress.bench.speculative import (
    Plan,
    choices,
    make_arms,
    measure_speculation,
    read_questions,
    tokenized,
)
from compress.bench.speculative_runs import Clock
from compress.bench.subject import Subject
from compress.cli import main
from compress.core.errors import InputError
from compress.core.tokenizer import load_tokenizer
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.speculation.proposer import Draft
from compress.runtime.speculation.speculator import Speculator
from tests.runtime.spelling import byte_tokenizer, make_spelling_model


class Remembering:
    """Proposes the answer that a request got before, with every fourth token wrong; or nonsense."""

    most = 16
    bytes_per_block = 0
    description = "what was said before"

    def __init__(self, memory: dict) -> None:
        self.memory = memory

    def allocate(self, num_blocks):
        pass

    def copy_blocks(self, pairs):
        pass

    def outlook(self, sequence, most):
        return [0.5] * most

    def propose(self, asked):
        return [Draft(self._next(sequence, count)) for sequence, count in asked]

    def _next(self, sequence, count):
        known = self.memory.get(self._key(sequence), ())
        begin = len(sequence.tokens)
        return [
            known[place] if place < len(known) and place % 4 else 5
            for place in range(begin, begin + count)
        ]

    def _key(self, sequence):
        params = sequence.request.params
        return tuple(sequence.request.prompt), params.temperature, params.seed

    def verified(self, sequence, drafted, accepted):
        pass

    def forget(self, sequence):
        self.memory[self._key(sequence)] = sequence.tokens.tolist()

    def seconds(self, counts):
        return 0.0

    def behind(self, sequence):
        return 0.0


class Always:
    idle = False

    def __init__(self, most):
        self.most = most

    def plan(self, sequences, others, outlooks):
        return [min(self.most, len(outlook)) for outlook in outlooks]

    def observe(self, tokens, sequences, seconds, drafting, asking):
        pass


@pytest.fixture(autouse=True)
def remembers(monkeypatch):
    """Whatever draft is asked for, all lengths share one memory."""
    memory: dict = {}

    def make(length, *rest):
        return Speculator(Remembering(memory), Always(4 if length == "auto" else length))

    monkeypatch.setattr(speculative, "choose", lambda draft, length, *rest: length)
    monkeypatch.setattr(speculative, "make_speculator", make)
    monkeypatch.setattr(speculative, "settle", lambda *rest: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_spelling_model(tmp_path_factory.mktemp("spelling"), byte_tokenizer())


@pytest.fixture(scope="module")
def subject(model):
    return Subject(str(model), "float32", None, 1, keep_head=True)


@pytest.fixture
def dataset(tmp_path) -> Path:
    lines = [
        {"category": category, "turns": [f"{category} {number}", "never asked"]}
        for category in ("writing", "roleplay", "rag")
        for number in range(6)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


LOOPS = [
    [7] * 30,
    [*range(60), *[1, 2, 3] * 10],
    [*range(100), *range(100, 164), *range(100, 164)],  # the longest period
    [*range(40), *(token for line in range(12) for token in (5, 200 + line, 6, 7, 8))],  # counts
    [*range(9), *[4, 4, 5, 5] * 10, 99],  # ends in order, though late
]
TEXTS = [
    [],
    [5],
    [7] * 16,  # fifteen repeats: "no, no, no"
    [*range(100)],
    [*[1, 2, 3] * 20, *range(100, 140)],  # it found its way out
    [*range(200), *[9] * 40],  # the loop is a fifth
    [*range(65), *range(65)],  # a longer period: a paragraph said twice
    [*(token for line in range(20) for token in (5, 200 + line, 300 + line))],  # a table
]


@pytest.mark.parametrize("tokens", LOOPS)
def test_what_loops(tokens):
    assert loops(tokens)


@pytest.mark.parametrize("tokens", TEXTS)
def test_what_does_not(tokens):
    assert not loops(tokens)


def test_random_text_does_not_loop():
    draw = random.Random(0)
    assert not any(loops([draw.randrange(8) for _ in range(128)]) for _ in range(200))


def simulated(a: float, k: int, steps: int, seed: int) -> list[Step]:
    """Steps whose tokens are accepted with probability a each, until the first that is not."""
    draw = random.Random(seed)
    found = []
    for _ in range(steps):
        accepted = 0
        while accepted < k and draw.random() < a:
            accepted += 1
        found.append(Step(1.0, 1, 1 + accepted, ((k, accepted),)))
    return found


@pytest.mark.parametrize(("a", "k"), [(0.2, 4), (0.7, 4), (0.95, 8), (0.5, 1)])
def test_acceptance_and_length(a, k):
    """The standard error is sqrt(a (1 - a) / tests); 5 of them fail once in a million."""
    steps = simulated(a, k, 20_000, seed=k)
    tests = sum(min(k, accepted + 1) for step in steps for _, accepted in step.drafts)
    found = acceptance(steps)
    assert found == pytest.approx(a, abs=5 * (a * (1 - a) / tests) ** 0.5)
    assert expected_length(a, k) == pytest.approx((1 - a ** (k + 1)) / (1 - a))
    mean = sum(step.tokens for step in steps) / len(steps)
    spread = np.std([step.tokens for step in steps]) / len(steps) ** 0.5
    assert mean == pytest.approx(expected_length(a, k), abs=5 * spread)
    shares = by_place([draft for step in steps for draft in step.drafts])
    assert shares == pytest.approx([a**place for place in range(1, k + 1)], abs=0.02)  # 5 errors


def test_ends_of_acceptance():
    assert expected_length(1.0, 4) == 5
    assert expected_length(0.0, 4) == 1
    assert acceptance([Step(1.0, 1, 1)]) is None
    assert acceptance(simulated(1.0, 3, 5, seed=0)) == 1
    assert by_place([(1, 1), (3, 1), (3, 3)]) == [1, 0.5, 0.5]


def made_up(a: float, k: int, lost: float = 0.0) -> tuple[list[Step], list[Step], Costs]:
    """A machine: 1 s besides the model, passes of 4 s and 0.5 s a token more, draws of 0.25 s, and
    drafts of 0.125 s a token.  `lost` is what speculation costs besides.
    """
    plain = [Step(1 + 4 + 0.25, 1, 1)] * 50
    fast = [
        Step(
            1 + 4 + 0.5 * k + 0.25 * step.tokens + 0.125 * k + lost,
            1, step.tokens, step.drafts, drafting=0.125 * k,
        )
        for step in simulated(a, k, 4_000, seed=1)
    ]  # fmt: skip
    return plain, fast, Costs(lambda tokens: 4 + 0.5 * (tokens - 1), draw=0.25)


def paired(plain: list[Step], fast: list[Step]) -> list[Pair]:
    return [Pair(Run([[0]], 1.0, plain), Run([[0]], 1.0, fast))]


@pytest.mark.parametrize(("a", "k"), [(0.8, 4), (0.3, 2), (0.0, 3)])
def test_expectation(a, k):
    """Where nothing is lost the expectation is the speed-up: by the length up to rounding, by the
    formula up to what 4,000 drafts leave to chance, 2%.
    """
    plain, fast, costs = made_up(a, k)
    row = summary(paired(plain, fast), expect(plain, fast, costs))
    length = row["tokens_per_step"]
    cost = (5 + 0.625 * k + 0.25 * length) / 5.25
    assert row["cost"] == pytest.approx(cost, rel=1e-3)
    assert row["speed_up"] == pytest.approx(length / cost, rel=1e-3)
    assert row["expected_speed_up_by_length"] == pytest.approx(row["speed_up"], rel=1e-3)
    assert row["expected_speed_up"] == pytest.approx(row["speed_up"], rel=0.02)
    assert row["tokens_per_draft"] == pytest.approx(length, rel=1e-3)
    assert row["plain_ms_per_token"] == 5250


def test_what_the_engine_loses_shows():
    plain, fast, costs = made_up(0.8, 4, lost=1.0)
    row = summary(paired(plain, fast), expect(plain, fast, costs))
    mean = sum(step.seconds for step in fast) / len(fast)
    assert row["of_expected_by_length"] == pytest.approx((mean - 1) / mean, rel=1e-3)
    assert row["of_expected"] < 0.9


def test_steps_without_drafts_cost_what_plain_ones_do():
    plain, _, costs = made_up(0.5, 4)
    row = summary(paired(plain, plain), expect(plain, plain, costs))
    for key in ("speed_up", "cost", "expected_speed_up", "of_expected", "tokens_per_step"):
        assert row[key] == 1
    assert row["acceptance"] is None
    assert row["accepted_at"] == []


def test_several_sequences():
    """Three sequences, of which two have drafts; a plain step of 3 costs 0.5 s a sequence more."""
    costs = Costs(lambda tokens: 4 + 0.5 * tokens, draw=0.0)
    plain = [Step(1 + 5.5, 3, 3)] * 4
    fast = [Step(1 + 8.5, 3, 6, ((4, 3), (2, 0)))] * 4
    found = expect(plain, fast, costs)
    assert found.seconds == 4 * 9.5
    assert found.plain_seconds == 4 * 6.5
    a = 3 / 5
    assert found.tokens == pytest.approx(4 * (1 + expected_length(a, 4) + expected_length(a, 2)))
    row = summary(paired(plain, fast), found)
    assert row["tokens_per_step"] == 2
    assert row["speed_up"] == pytest.approx(6.5 / 3 / (9.5 / 6), abs=1e-4)  # rounded


def test_interval():
    """It holds the true speed-up about as often as it says: 95 of 100 times, here 84 or more, since
    30 prompts give a bootstrap a little less (Efron and Tibshirani 1993, chapter 14).
    """
    held = 0
    draw = np.random.default_rng(3)
    for _ in range(100):
        pairs = [
            Pair(
                Run([[0]], 0.0, [Step(plain, 1, 1)]),
                Run([[0]], 0.0, [Step(fast, 1, 1)]),
            )
            for plain, fast in zip(
                draw.gamma(20, 0.1, 30).tolist(), draw.gamma(20, 0.05, 30).tolist(), strict=True
            )
        ]
        low, high = interval(pairs)
        assert low < speed_up(pairs) < high
        held += low < 2 < high
    assert 84 <= held <= 100
    assert interval(pairs[:1]) == (None, None)


def test_questions(dataset, tmp_path):
    found = read_questions(dataset, 4)
    assert found == {
        "conversation": ["writing 0", "writing 3", "roleplay 0", "roleplay 3"],
        "rag": ["rag 0", "rag 1", "rag 3", "rag 4"],
    }
    assert read_questions(dataset, 99)["rag"] == [f"rag {number}" for number in range(6)]
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert read_questions(plain, 9) == {"prompts": ["one", "two"]}
    plain.write_text('{"prompt": "one", "max_tokens": 3}\n')
    with pytest.raises(InputError, match="sets max_tokens; remove it"):
        read_questions(plain, 9)


def test_what_is_watched_is_what_the_engine_counts(subject):
    tokenizer = load_tokenizer(subject.source.folder)
    plan = Plan("ngram", [3], [0], 40, 2, None)
    plain, fast = make_arms(subject, tokenizer, plan, plan.lengths, 100)
    questions = [question.tokens for question in tokenized(tokenizer, {"x": ["hello", "you"]})]
    assert tokenizer.decode(questions[0]) == "user: hello\nassistant: "
    params = [SamplingParams(max_tokens=40, temperature=t, seed=1) for t in (0, 0.9)]
    runs = [arm.answer(questions, params) for arm in (plain, fast)]
    nothing_known = fast.engine.statistics()
    runs.append(fast.answer(questions, params))
    assert runs[0].outputs == runs[1].outputs == runs[2].outputs
    for run in runs:
        assert run.prefill > 0
        tokens = run.tokens + sum(step.tokens for step in run.tail)
        assert tokens == sum(map(len, run.outputs)) - 2  # prefill gives the first of each
        assert all(step.seconds > step.drafting >= 0 for step in run.steps)
    steps = [step for run in runs[1:] for step in run.steps + run.tail]
    drafts = [draft for step in steps for draft in step.drafts]
    counted = fast.engine.statistics()
    assert len(drafts) == counted.drafts
    assert sum(drafted for drafted, _ in drafts) == counted.drafted_tokens
    assert sum(accepted for _, accepted in drafts) == counted.accepted_tokens
    gained = sum(step.tokens - step.sequences for step in runs[2].steps + runs[2].tail)
    assert gained == counted.accepted_tokens - nothing_known.accepted_tokens > 40
    assert sum(step.drafting for step in runs[1].steps) > 0
    assert not plain.engine.statistics().drafts
    assert fast.engine.pool.in_use == 0


def measured(subject, texts, plan):
    return measure_speculation(subject, texts, plan, choices(subject.model, plan))


@pytest.mark.parametrize(("batch", "repeats"), [(1, 1), (3, 2)])
def test_measured(subject, batch, repeats):
    """With seeds texts are known; at temperature 0 this model loops on some of them."""
    texts = {"a": ["one", "two", "three"], "b": ["four", "five"]}
    plan = Plan("some/model", ["auto", 2], [0, 0.9], 48, batch, 7, repeats)
    report = measured(subject, texts, plan)
    rows = {(row["temperature"], row["length"], row["category"]): row for row in report["rows"]}
    assert list(rows) == [
        (t, k, name) for t in (0, 0.9) for k in ("auto", 2) for name in ("a", "b", "all")
    ]
    for row in rows.values():
        assert row["asked"] == row["looping"] + row["prompts"]
        assert row["differing"] == 0
    assert rows[0, 2, "all"]["looping"] > 0
    for length in ("auto", 2):
        row = rows[0.9, length, "all"]
        assert row["looping"] == 0
        assert row["prompts"] == row["asked"] == 5 * repeats
        assert row["drafted"] == sum(rows[0.9, length, name]["drafted"] for name in "ab") > 0
        assert 0 < row["speed_up_low"] <= row["speed_up"] <= row["speed_up_high"]
        assert 1 < row["tokens_per_step"] <= 1 + 4 * row["acceptance"]
        assert row["expected_tokens_per_step"] == pytest.approx(row["tokens_per_step"], rel=0.2)
        assert row["cost"] > 0
        assert row["speed_up"] == pytest.approx(
            row["plain_ms_per_token"] / row["ms_per_token"], rel=1e-3
        )
        assert row["of_expected"] == pytest.approx(
            row["speed_up"] / row["expected_speed_up"], rel=1e-3
        )
    case = report["cases"][2]
    assert case["questions"] == ([[0], [1], [2]] if batch == 1 else [[0, 1, 2]])
    assert len(case["runs"]["auto"]) == len(case["questions"]) * repeats
    assert {len(run["plain"]["steps_ms"]) for run in case["runs"]["auto"]} == {47}
    tokens = sum(case["runs"][2][0]["fast"]["tokens"])
    assert 40 * batch < tokens <= 47 * batch  # the rest is the tail
    assert 1 * batch in case["forward_ms"]
    assert report["proposer"] == "what was said before"


def test_steps_count_while_all_decode(subject):
    """A short answer ends the measurement, and what is left is the tail."""
    tokenizer = load_tokenizer(subject.source.folder)
    plan = Plan("ngram", [], [0], 12, 2, None)
    (plain,) = speculative.make_arms(subject, tokenizer, plan, [], 12)
    params = [SamplingParams(max_tokens=most, ignore_eos=True) for most in (4, 12)]
    run = plain.answer([[5, 6, 7], [8, 9]], params)
    assert [len(output) for output in run.outputs] == [4, 12]
    assert [(step.sequences, step.tokens) for step in run.steps] == [(2, 2)] * 3
    assert [(step.sequences, step.tokens) for step in run.tail] == [(1, 1)] * 8
    assert not plain.answer([[5, 6, 7]], params[:1]).tail


def test_passes_that_were_not_timed_lie_between(subject, monkeypatch):
    """Of many sizes only some are timed after each group: the others' costs are interpolated."""
    monkeypatch.setattr(speculative_runs, "FORWARDS", 2)
    clock = Clock(subject.decoder, 40, temperature=0)
    subject.decoder.allocate(40)
    prompts, run = [[5, 6, 7], [8, 9]], Run([[1, 2, 3, 4], [5]], 0.0, [])
    sizes = Counter({1: 50, 2: 10, 3: 20, 6: 5, 9: 30})
    clock.time(sizes, prompts, run)
    assert sorted(clock.forwards) == [1, 9]
    assert [len(times) for times in clock.forwards.values()] == [2, 2]  # two rounds
    clock.time(sizes, prompts, run)
    assert sorted(clock.forwards) == [1, 2, 3, 9]
    costs = clock.costs()
    assert costs.draw > 0
    clock.forwards = {2: [3.0, 1.0, 2.0], 6: [4.0]}
    assert [clock.costs().forward(size) for size in (1, 2, 4, 6, 7)] == [2, 2, 3, 4, 4]


def test_samples_are_not_compared_and_loops_found_afterwards(subject):
    """Without a seed a draft model samples; then no text is known beforehand."""
    plan = Plan("some/model", [2], [1e-6], 48, 1, None)
    (row,) = measured(subject, {"a": ["three", "five"]}, plan)["rows"]
    assert row["differing"] is None
    assert row["looping"] == 2
    assert row["prompts"] == 0
    assert "speed_up" not in row
    plan = Plan("ngram", [2], [0.9], 32, 1, None)
    (row,) = measured(subject, {"a": ["one", "two"]}, plan)["rows"]
    assert row["differing"] == 0


def test_a_text_that_differs_is_counted(subject, monkeypatch):
    arms = speculative.make_arms

    def with_a_fault(*arguments):
        plain, fast = arms(*arguments)
        answer = fast.answer

        def wrong(prompts, params):
            run = answer(prompts, params)
            run.outputs[0][3] ^= 1
            return run

        fast.answer = wrong
        return [plain, fast]

    monkeypatch.setattr(speculative, "make_arms", with_a_fault)
    plan = Plan("ngram", [2], [0.9], 32, 1, 1)
    (row,) = measured(subject, {"a": ["one", "two"]}, plan)["rows"]
    assert row["differing"] == 2


def bench(*arguments):
    return CliRunner().invoke(main, ["bench", "speculative", *map(str, arguments)])


def test_command(model, dataset, tmp_path):
    flags = ["--draft", "ngram", "--dataset", dataset, "--per-category", 2, "--max-tokens", 24]
    flags += ["--temperature", "0,0.9", "--num-speculative-tokens", "auto,2,auto", "--seed", 1]
    flags += ["--dtype", "float32", "--threads", 1]
    done = bench(model, *flags, "--json", "--out", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert len(report["rows"]) == 2 * 2 * 3
    assert report["dataset"] == "questions.jsonl"
    assert "cases" not in report
    assert "Measuring" in done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["cases"]
    shown = bench(model, *flags)
    assert shown.exit_code == 0, shown.output
    for words in ("2 tokens proposed, temperature 0.9", "speed-up", "reached", "conversation"):
        assert words in shown.stdout
    assert "texts unlike those without speculation: 0" in shown.stdout
    assert "…" not in shown.stdout  # it fits into 80 columns


BAD = [
    (["--num-speculative-tokens", "0"], "'0' is no length; give auto, or 1 to 64"),
    (["--num-speculative-tokens", "4,x"], "'x' is no length"),
    (["--num-speculative-tokens", "65"], "'65' is no length"),
    (["--temperature", "-1"], "'-1' is no list of temperatures"),
    (["--temperature", "nan"], "'nan' is no list of temperatures"),
    (["--max-tokens", "2000"], "the model's context is 1024; lower --max-tokens"),
    (["--max-tokens", "1"], "--max-tokens"),
    (["--batch", "300"], "give 1 to 256"),
    (["--dataset", "absent.jsonl"], "cannot read dataset 'absent.jsonl'"),
    (["--out", "absent/x.json"], "there is no folder 'absent'"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_calls(flags, message, model, dataset):
    done = bench(model, "--draft", "ngram", "--dataset", dataset, "--dtype", "float32", *flags)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert message in " ".join(done.stderr.split())
