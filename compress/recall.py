"""Does a model find again what stood some distance back?  What windows and small caches cost first.

Two synthetic tasks, made from a seed, with the answer at a distance of about d tokens before its
question:

    passkey    a number in a text of other sentences, asked for at the end             [1]
    key-value  four lines "the code of KEY is VALUE" in such a text, and one asked for:
               the first, so that the other three are nearer                           [2]

An answer counts as *found* when the model puts each of its tokens first, given those before: that
is what greedy decoding writes, so no text need be generated.  Beside it stands its surprise,
-log p(answer), in nats: it moves before answers are lost.  A number drawn blindly has a surprise of
11.4 nats; who finds the numbers of the second task, but not whose they are, is right in a quarter
of trials.

Shares have Wilson's 95 % interval [3], surprises a bootstrap's over trials.  The trials of two
models are the same texts where their tokenizers are.

[1] Mohtashami and Jaggi, Landmark Attention, 2023, arXiv:2305.16300, section 4.2.
[2] Liu et al., Lost in the Middle, 2023, arXiv:2307.03172, section 3.
[3] Wilson, Probable Inference, JASA 22, 1927.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.core.errors import InputError
from compress.core.progress import track
from compress.core.source import ModelSource, read_config
from compress.core.tokenizer import load_tokenizer
from compress.engines import load_predictor, settle_engine
from compress.evaluate import ScoringConfig, interval, resampled_means

DISTANCES = (128, 512, 2048, 8192)  # of which those are taken that fit into the model's context
LEAST = 32  # tokens: a question has some 20
BEFORE = 64  # tokens, about, before the answer: it is not the first thing in the text
DIGITS = 5
PAIRS = 4

Count = Callable[[str], int]  # tokens of a text


@dataclass(frozen=True)
class RecallConfig(ScoringConfig):
    """What to ask: `trials` of each task at each distance, in tokens; by default `DISTANCES`."""

    distances: tuple[int, ...] = ()
    trials: int = 20

    def __post_init__(self) -> None:
        self._check_least(trials=2)
        super().__post_init__()
        if wrong := [distance for distance in self.distances if distance < LEAST]:
            raise InputError(
                f"distance {wrong[0]} is no more than a question; allowed is {LEAST} or up"
            )


@dataclass(frozen=True)
class Trial:
    """A text whose end, from token number `first` on, is the answer.

    tokens    int64 [n]
    distance  tokens from where the answer stands first, its last token, to where it is asked for
    """

    tokens: np.ndarray
    first: int
    distance: int


def evaluate_recall(model: ModelSource, config: RecallConfig) -> dict[str, Any]:
    """Ask a model; returns plain numbers, ready for JSON.

    `recall` is for each task a list of a row a distance: `distance` as asked for, `tokens`, the
    mean of what it is, `found` (0 to 1), `surprise` (nats an answer), and an `x_interval`
    [low, high] of each; beside it `trials`, `dtype`, `engine`, and what `served` tells.

    Raises InputError for a distance that the model's context has no room for, before weights are
    read, and when the model cannot be loaded or gives NaN.
    """
    tokenizer, chosen = load_tokenizer(model.folder), check_recall(model, config)
    trials = {
        (task, distance): list(make_trials(task, distance, config.trials, config.seed, tokenizer))
        for task in TASKS
        for distance in sorted(chosen)
    }
    engine = settle_engine(config.engine, [model], config.served)
    predictor = load_predictor(engine, model, config.dtype, config.served)
    found = _answers([trial for group in trials.values() for trial in group], predictor)
    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    for (task, distance), group in trials.items():
        taken = [next(found) for _ in group]
        if not all(math.isfinite(surprise) for _, surprise in taken):
            raise InputError(
                f"'{model.ref}' gives NaN or infinite logits in {config.dtype}; try another dtype, "
                "or the weights are broken"
            )
        rows[task].append(_row(distance, group, taken, config))
    told = {"recall": rows, "trials": config.trials, "dtype": config.dtype, "engine": engine}
    return told | config.served.told


def check_recall(model: ModelSource, config: RecallConfig) -> tuple[int, ...]:
    """The distances to ask for; InputError where a model's context has no room for one."""
    context = read_config(model.folder).get("max_position_embeddings")
    chosen = config.distances or tuple(d for d in DISTANCES if _fits(d, context))
    if not chosen or not all(_fits(distance, context) for distance in chosen):
        most = (context or 0) - 3 * BEFORE
        room = f"at most {most} leave room" if most >= LEAST else "none leaves room"
        raise InputError(
            f"distance {max(config.distances or DISTANCES[:1])} with a context of {context} "
            f"tokens: {room} for the question"
        )
    return chosen


def _fits(distance: int, context: int | None) -> bool:
    return context is None or distance + 3 * BEFORE <= context


def _answers(trials: Sequence[Trial], predictor: Any) -> Iterator[tuple[bool, float]]:
    """Of each trial: whether the answer is found, and its surprise."""
    import torch

    from compress.runtime.scoring import Span

    spans = [Span(trial.tokens, trial.first) for trial in trials]
    pieces = iter(predictor(spans))
    for trial in track(trials, "Asking", total=len(trials)):
        hit, surprise, done = True, 0.0, trial.first
        while done < len(trial.tokens):
            logits = next(pieces).logits.float()
            targets = torch.from_numpy(trial.tokens[done : done + len(logits)]).to(logits.device)
            log_p = logits.log_softmax(-1).gather(1, targets[:, None])
            hit &= bool((logits.argmax(-1) == targets).all())
            surprise -= float(log_p.double().sum())
            done += len(targets)
        yield hit, surprise


def _row(
    distance: int, trials: Sequence[Trial], answers: Sequence[tuple[bool, float]], config: Any
) -> dict[str, Any]:
    found = sum(hit for hit, _ in answers)
    surprises = np.array([[surprise for _, surprise in answers]])
    return {
        "distance": distance,
        "tokens": round(float(np.mean([trial.distance for trial in trials])), 1),
        "found": found / len(answers),
        "found_interval": wilson(found, len(answers)),
        "surprise": float(surprises.mean()),
        "surprise_interval": interval(resampled_means(surprises, config)[0]),
    }


def wilson(hits: int, trials: int, z: float = 1.959964) -> list[float]:
    """The 95 % interval of a share."""
    share, spread = hits / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def make_trials(task: str, distance: int, count: int, seed: int, tokenizer: Any) -> Iterator[Trial]:
    """The trials of a task at a distance; the same for the same seed and tokenizer."""

    def tokens_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def length(text: str) -> int:
        return len(tokens_of(text))

    for number in range(count):
        draw = random.Random(f"{seed} {task} {distance} {number}")
        before, after, question, answer = TASKS[task](draw, distance, length)
        text = before + after + question
        prompt, whole = tokens_of(text), tokens_of(text + answer)
        first = 0
        while first < len(prompt) and prompt[first] == whole[first]:
            first += 1
        yield Trial(np.array(whole, np.int64), first, first - length(before))


def _passkey(draw: random.Random, distance: int, length: Count) -> tuple[str, str, str, str]:
    """Text up to the number, text from there on, the question, and the answer."""
    key = _number(draw)
    begin = "Somewhere in this text there is a pass key. Find it and remember it.\n"
    begin += _filler(draw, BEFORE - length(begin), length)
    question = "\nWhat is the pass key? The pass key is"
    needle, rest = f"\nThe pass key is {key}", ". Remember it.\n"
    room = distance - length(rest) - length(question)
    return begin + needle, rest + _filler(draw, room, length), question, f" {key}"


def _key_value(draw: random.Random, distance: int, length: Count) -> tuple[str, str, str, str]:
    """The same, of one line among several; the others lie between it and its question."""
    things = draw.sample(NOUNS, PAIRS)
    names = [
        f"the {colour} {noun}"
        for colour, noun in zip(draw.sample(COLOURS, PAIRS), things, strict=True)
    ]
    keys = [_number(draw) for _ in names]
    lines = [f"\nThe code of {name} is {key}" for name, key in zip(names, keys, strict=True)]
    question = f"\nThe code of {names[0]} is"
    taken = length(question) + sum(map(length, lines[1:])) + 2 * PAIRS
    room = (distance - taken) // PAIRS
    after = ""
    for line in (*lines[1:], ""):
        after += f".\n{_filler(draw, room, length)}{line}"
    return _filler(draw, BEFORE, length) + lines[0], after, question, f" {keys[0]}"


TASKS = {"passkey": _passkey, "key-value": _key_value}


def _filler(draw: random.Random, tokens: int, length: Count) -> str:
    """Sentences of about so many tokens."""
    parts: list[str] = []
    while tokens > 0:
        parts.append(_sentence(draw))
        tokens -= (last := length(" " + parts[-1]))
        if -2 * tokens > last:  # the text is nearer to its length without it
            parts.pop()
    return " ".join(parts)


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _sentence(draw: random.Random) -> str:
    first, second = draw.sample(NOUNS, 2)
    return f"The {draw.choice(COLOURS)} {first} {draw.choice(VERBS)} the {second}."


COLOURS = ("red", "green", "blue", "white", "black", "brown", "yellow", "grey", "golden", "old")
VERBS = ("saw", "passed", "followed", "met", "left", "heard", "painted", "carried", "found", "drew")
NOUNS = (
    "river", "house", "garden", "bridge", "horse", "tower", "ship", "table", "window", "mountain",
    "forest", "street", "island", "market", "train", "lamp", "field", "school", "clock", "letter",
    "bird", "stone", "valley", "door", "boat", "wheel", "farm", "castle", "apple", "basket",
    "candle", "drum", "engine", "fence", "glass", "hammer", "kitchen", "ladder", "mirror", "needle",
)  # fmt: skip
