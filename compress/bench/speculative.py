"""Prompts answered with and without speculation, in turn: `compress bench speculative`.

One process, one model, and an engine for each way of answering, all on the model's one cache, since
only one runs at a time.  A group of prompts is answered in every way before the next one comes, in
an order that turns around from group to group, so that the machine's drift hits all alike.
Answers end as users' do, at the model's own end tokens, and go through its chat template.

Answers that loop are left out (`compress.bench.speculation.loops`).  Where texts are known
beforehand, by temperature 0 or by seeds, they are found first, many together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.bench.prompts import read_prompts
from compress.bench.speculation import Expectation, Pair, Run, expect, loops, summary
from compress.bench.speculative_runs import Arm, Clock, Length, Watched
from compress.bench.subject import Subject
from compress.core.errors import InputError
from compress.core.progress import track
from compress.core.source import resolve_model
from compress.core.tokenizer import load_tokenizer
from compress.runtime.batch import AsynchronousModel
from compress.runtime.engine import Engine
from compress.runtime.llm import stop_tokens
from compress.runtime.loading import MOST_TOKENS
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.speculation.making import NGRAM, Choice, choose, make_speculator, settle

# Spec-Bench counts what is of MT-bench as one task (Xia et al. 2024, arXiv:2401.07851, table 1).
CONVERSATION = "conversation"
MT_BENCH = (
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
)  # fmt: skip
ALL = "all"
TOGETHER = 16  # prompts answered at once where nothing is timed
WARM_UP_TOKENS = 8
ROOM = 64  # tokens: the most that may be proposed


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Without a `seed` requests have none where that matters: a draft model then proposes samples, and
    texts are their own.  N-grams are guesses either way, so theirs are made the same.
    """

    draft: str
    lengths: list[Length]
    temperatures: list[float]
    max_tokens: int
    batch: int
    seed: int | None
    repeats: int = 1  # how often each prompt is answered in each way

    def params(self, temperature: float, question: Question) -> SamplingParams:
        """A request's settings."""
        seed = self.seed
        if seed is None and self.draft == NGRAM:
            seed = 0
        if seed is not None:
            seed += question.number
        return SamplingParams(max_tokens=self.max_tokens, temperature=temperature, seed=seed)

    def known_text(self, temperature: float) -> bool:
        """Whether a question gets the same answer in each run, with speculation and without."""
        return temperature == 0 or self.seed is not None or self.draft == NGRAM


@dataclass(frozen=True)
class Question:
    """A prompt as tokens, and its number in the dataset."""

    number: int
    category: str
    tokens: list[int]


@dataclass
class Case:
    """All that is measured of a category at a temperature; repeated answers count, too."""

    category: str
    temperature: float
    asked: int
    looping: int = 0  # found beforehand
    groups: list[list[Question]] = field(default_factory=list)
    pairs: dict[Length, list[Pair]] = field(default_factory=lambda: defaultdict(list))
    clock: Clock | None = None


def read_questions(path: Path, per_category: int) -> dict[str, list[str]]:
    """Texts of a file of prompts by category, at most so many of each, evenly from the file.

    Spec-Bench's lines name their category, and count with the first of their turns; lines that name
    none are one category.  Raises InputError for what is no prompt.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for prompt in read_prompts(path, "completions"):
        if prompt.settings:
            name = next(iter(prompt.settings))
            raise InputError(f"dataset '{path}' sets {name}; remove it: settings are flags here")
        assert isinstance(prompt.content, str)
        name = CONVERSATION if prompt.category in MT_BENCH else prompt.category or "prompts"
        found[name].append(prompt.content)
    return {name: spread(texts, per_category) for name, texts in found.items()}


def spread(items: list[str], count: int) -> list[str]:
    """At most `count` of the items, evenly from all of them."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def choices(model: str, plan: Plan) -> list[Choice]:
    """The proposer for each length, before anything is loaded; InputError for what cannot be."""
    source = resolve_model(model)
    tokenizer = load_tokenizer(source.folder)
    found = [choose(plan.draft, length, source, tokenizer) for length in plan.lengths]
    return [choice for choice in found if choice is not None]


def measure_speculation(
    subject: Subject, texts: dict[str, list[str]], plan: Plan, proposers: list[Choice]
) -> dict[str, Any]:
    """Measure; returns the report.  InputError for what does not fit in the model's context.

    `subject` has kept its head, and `proposers` are what `choices` gave for the plan.
    """
    tokenizer: Any = load_tokenizer(subject.source.folder)
    questions = tokenized(tokenizer, texts)
    longest = max(len(question.tokens) for question in questions) + plan.max_tokens
    subject.check(plan.batch, 1)
    if longest > subject.decoder.max_context:
        raise InputError(
            f"the longest prompt and --max-tokens {plan.max_tokens} are {longest} tokens, and the "
            f"model's context is {subject.decoder.max_context}; lower --max-tokens, or take "
            "another dataset"
        )
    arms = make_arms(subject, tokenizer, plan, proposers, longest)
    for arm in arms:
        params = SamplingParams(max_tokens=WARM_UP_TOKENS, temperature=0)
        arm.answer([questions[0].tokens], [params])
    cases = [
        Case(category, temperature, len(texts[category]) * plan.repeats)
        for temperature in plan.temperatures
        for category in texts
    ]
    for case in track(cases, "Looking for loops"):
        case.groups = _groups(case, arms[0], questions, plan)
    work = [(case, group) for case in cases for group in case.groups]
    turns = [(*pair, at + again) for again in range(plan.repeats) for at, pair in enumerate(work)]
    for case, group, turn in track(turns, "Measuring"):
        _measure(case, group, arms if turn % 2 else arms[::-1], plan)
    return {
        **subject.facts,
        "prompts": "first turns, chat template" if tokenizer.chat_template else "first turns",
        "draft": plan.draft,
        "proposer": next(arm.watched for arm in arms if arm.watched).proposer.description,
        "max_tokens": plan.max_tokens,
        "batch": plan.batch,
        "repeats": plan.repeats,
        "seed": plan.seed,
        "rows": _rows(cases, plan),
        "cases": [_details(case) for case in cases],
    }


def tokenized(tokenizer: Any, texts: dict[str, list[str]]) -> list[Question]:
    """Questions as tokens, through the chat template if there is one."""
    questions = []
    for category, several in texts.items():
        for text in several:
            if template := bool(tokenizer.chat_template):
                message = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(
                    message, tokenize=False, add_generation_prompt=True
                )
            ids = tokenizer(text, add_special_tokens=not template, verbose=False)["input_ids"]
            questions.append(Question(len(questions), category, ids))
    return questions


def make_arms(
    subject: Subject, tokenizer: Any, plan: Plan, proposers: list[Choice], longest: int
) -> list[Arm]:
    """The plain way of answering, and one for each number of tokens to propose."""
    model, most_tokens = subject.decoder, MOST_TOKENS[subject.device.type]
    sequences = max(plan.batch, TOGETHER)
    most = most_tokens, sequences
    watched = []  # before any cache: a draft model's cache asks for another layout of the model's
    for choice in proposers:
        assert subject.head is not None
        watched.append(
            Watched(
                make_speculator(
                    choice,
                    model,
                    subject.head,
                    subject.device,
                    subject.dtype,
                    most,
                    subject.kv_cache_dtype,
                )
            )
        )
    blocks = sequences * model.layout.blocks_for(longest + ROOM, most_tokens)

    def engine(speculator: Watched | None) -> Engine:
        return Engine(
            model,
            blocks,
            max_tokens_per_step=most_tokens,
            max_sequences=sequences,
            prefix_caching=False,
            tokenizer=tokenizer,
            eos_ids=stop_tokens(subject.source.folder, tokenizer),
            speculator=speculator,
        )

    arms = [Arm("plain", engine(None))]
    for length, one in zip(plan.lengths, watched, strict=True):
        arms.append(Arm(length, engine(one), one))
    for arm, choice in zip(arms[1:], proposers, strict=True):
        assert arm.watched is not None
        arm.watched.proposer.allocate(blocks)  # each engine has made the model's cache anew
        settle(arm.watched, choice, model, blocks, most_tokens)
    return arms


def _groups(case: Case, plain: Arm, questions: list[Question], plan: Plan) -> list[list[Question]]:
    """Questions that are answered at once; those whose answers are known to loop are left out."""
    kept = [question for question in questions if question.category == case.category]
    if plan.known_text(case.temperature):
        params = [plan.params(case.temperature, question) for question in kept]
        outputs = plain.answer([question.tokens for question in kept], params).outputs
        kept = [q for q, output in zip(kept, outputs, strict=True) if not loops(output)]
        case.looping = case.asked - len(kept) * plan.repeats
    return [kept[at : at + plan.batch] for at in range(0, len(kept), plan.batch)]


def _measure(case: Case, group: list[Question], arms: list[Arm], plan: Plan) -> None:
    """Answer a group in every way, then time its forward passes alone."""
    prompts = [question.tokens for question in group]
    params = [plan.params(case.temperature, question) for question in group]
    runs: dict[Length, Run] = {arm.length: arm.answer(prompts, params) for arm in arms}
    plain = runs.pop("plain")
    for length, run in runs.items():
        case.pairs[length].append(Pair(plain, run))
    engine = arms[0].engine
    if isinstance(engine.model, AsynchronousModel):
        return  # its steps are captured, and a pass that is not costs more
    if case.clock is None:
        case.clock = Clock(engine.model, engine.pool.num_blocks, case.temperature)
    sizes = Counter(step.computed for run in (plain, *runs.values()) for step in run.steps)
    if sizes:
        case.clock.time(sizes, prompts, plain)


def _rows(cases: list[Case], plan: Plan) -> list[dict[str, Any]]:
    """A row for each temperature, number of proposed tokens, and category; and one for all."""
    rows = []
    for temperature in plan.temperatures:
        here = [case for case in cases if case.temperature == temperature]
        for length in plan.lengths:
            rows += _table(here, length, plan.known_text(temperature))
    return rows


def _table(cases: list[Case], length: Length, known_text: bool) -> list[dict[str, Any]]:
    rows, everything, total = [], [], None
    for case in cases:
        pairs = [pair for pair in case.pairs[length] if not pair.looping]
        everything += pairs
        expected = _expected(case, pairs)
        if expected is not None:
            total = expected if total is None else total + expected
        rows.append(_counts(case, length, known_text) | summary(pairs, expected))
    if len(cases) > 1:
        row = {"category": ALL, "temperature": cases[0].temperature, "length": length}
        for name in ("asked", "looping", "differing"):
            found = [one[name] for one in rows]
            row[name] = None if None in found else sum(found)
        rows.append(row | summary(everything, total))
    return rows


def _counts(case: Case, length: Length, known_text: bool) -> dict[str, Any]:
    """`differing` counts texts that are not what they are without speculation, and should be."""
    pairs = case.pairs[length]
    late = sum(len(pair.plain.outputs) for pair in pairs if pair.looping)
    differing = sum(
        ours != theirs
        for pair in pairs
        for ours, theirs in zip(pair.fast.outputs, pair.plain.outputs, strict=True)
    )
    return {
        "category": case.category,
        "temperature": case.temperature,
        "length": length,
        "asked": case.asked,
        "looping": case.looping + late,
        "differing": differing if known_text else None,
    }


def _expected(case: Case, pairs: list[Pair]) -> Expectation | None:
    plain = [step for pair in pairs for step in pair.plain.steps]
    fast = [step for pair in pairs for step in pair.fast.steps]
    if case.clock is None or not plain or not fast:
        return None
    return expect(plain, fast, case.clock.costs())


def _details(case: Case) -> dict[str, Any]:
    """Every run, and every pass that was timed alone; milliseconds."""
    clock = case.clock
    return {
        "category": case.category,
        "temperature": case.temperature,
        "questions": [[question.number for question in group] for group in case.groups],
        "runs": {
            length: [
                {"looping": pair.looping, "plain": _timed(pair.plain), "fast": _timed(pair.fast)}
                for pair in pairs
            ]
            for length, pairs in case.pairs.items()
        },
        "forward_ms": {size: _ms(times) for size, times in clock.forwards.items()} if clock else {},
        "draw_ms": _ms(clock.draws) if clock else [],
    }


def _timed(run: Run) -> dict[str, Any]:
    return {
        "prefill_ms": round(1000 * run.prefill, 3),
        "steps_ms": _ms([step.seconds for step in run.steps]),
        "tokens": [step.tokens for step in run.steps],
        "drafts": [step.drafts for step in run.steps if step.drafts],
    }


def _ms(seconds: list[float]) -> list[float]:
    return [round(1000 * one, 3) for one in seconds]
