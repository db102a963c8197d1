"""Models beside the original that they were made from, measured alike.

    check all ─> quality, tasks, recall of each ─> speed of all, in rounds ─> table, plot, page

A run takes long, so what was measured is kept in the output folder after each measurement, with the
settings and the files that it is of, and is not measured again while these are the same.  Speed
is measured in rounds: each loads every model once, one after another, so that what the machine
does meanwhile hits all alike, and all are timed anew when there are others; the median over rounds
is shown (compress.bench.latency has what is timed).
"""

from __future__ import annotations

import gc
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from compress.core.device import AS_STORED, KV_CACHE_DTYPES, LM_HEAD_BITS, ServedAs
from compress.core.errors import InputError, reason_of
from compress.core.files import write_text
from compress.core.progress import say
from compress.core.source import ModelSource, read_config, resolve_model
from compress.engines import check_engine
from compress.evaluate import TextEvalConfig, check_models, check_text, evaluate_text
from compress.inspection import inspect_folder
from compress.recall import RecallConfig, check_recall, evaluate_recall
from compress.tasks import check_tasks, evaluate_tasks

KEPT = "comparison.json"
LOCK = ".lock"
# What stands behind a `+` after a model, and what of ServedAs it sets.
MARKS: dict[str, dict[str, Any]] = {
    **{name: {"kv_cache_dtype": name} for name in KV_CACHE_DTYPES if name != "auto"},
    **{f"head{bits}": {"lm_head_bits": bits} for bits in LM_HEAD_BITS if bits is not None},
}


@dataclass(frozen=True)
class Entry:
    """A model in the comparison.

    name      in tables, one of a kind
    served    what the runtime rounds of it as it is loaded
    unserved  why the runtime does not serve it, so that it has no speed; empty if it does
    """

    name: str
    source: ModelSource
    served: ServedAs = AS_STORED
    unserved: str = ""

    @property
    def stored(self) -> Path:
        """What its size and its speed are of: a .gguf file as it is, else the folder, which of an
        alias has the weights that others are made from."""
        path = Path(self.source.ref).expanduser()
        return path if path.suffix == ".gguf" and path.is_file() else self.source.folder

    @property
    def bytes(self) -> int:
        """Of all tensors, or of a .gguf file."""
        if self.stored.is_file():
            return self.stored.stat().st_size
        return inspect_folder(self.stored)["bytes"]

    @property
    def files(self) -> list[list[Any]]:
        """Name, size and time of change of every file that decides what it computes."""
        folder = self.source.folder
        found = sorted([*folder.rglob("*.safetensors"), *folder.glob("*.json")])
        written = ("quality.json", "compress.json", "run.json")  # by our own commands, beside it
        stats = [(path, path.stat()) for path in found if path.name not in written]
        return [[str(path.relative_to(folder)), s.st_size, s.st_mtime_ns] for path, s in stats]


@dataclass(frozen=True)
class TaskConfig:
    """Tasks of lm-eval, as `compress.tasks.evaluate_tasks` takes them."""

    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    seed: int = 0
    dtype: str = "float32"
    engine: str = "auto"


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SpeedConfig:
    """What is timed: one request, and `batch` of them, of `prompt_tokens` and `new_tokens` each.

    rounds   of all models in turn; the median is taken
    dtype    of activations; auto is bfloat16 where the machine has it, else float32
    threads  on a CPU; None leaves PyTorch's number
    """

    prompt_tokens: int = Field(default=512, ge=1)
    new_tokens: int = Field(default=64, ge=2)
    batch: int = Field(default=16, ge=1)
    rounds: int = Field(default=3, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Measures:
    """What is measured; None for what is not."""

    text: TextEvalConfig | None = None
    tasks: TaskConfig | None = None
    recall: RecallConfig | None = None
    speed: SpeedConfig | None = None

    @property
    def words(self) -> list[str]:
        """How, in sentences."""
        found = []
        if (text := self.text) is not None:
            found.append(
                f"Quality: {text.windows} windows of {text.seq_len} tokens of {text.text.name}, "
                f"{text.dtype}; KL from the original in nats a token; intervals are 95% bootstraps "
                "over windows."
            )
        if self.tasks is not None:
            questions = "all questions" if self.tasks.limit is None else f"{self.tasks.limit}"
            found.append(f"Tasks: {questions} of each; ± is 1.96 standard errors.")
        if self.recall is not None:
            found.append(
                f"Recall: the share of {self.recall.trials} answers that were found again so many "
                "tokens back; Wilson's 95% intervals."
            )
        if (speed := self.speed) is not None:
            found.append(
                f"Speed: prompts of {speed.prompt_tokens} tokens and {speed.new_tokens} new ones, "
                f"one request and {speed.batch} together, dtype {speed.dtype}; the median of "
                f"{speed.rounds} rounds, all in turn in each."
            )
        if text is not None:
            found.append(
                "A star: none is smaller, in weights or in cache, or quicker, and closer to the "
                "original."
            )
        return found


def entries_of(models: Sequence[str], original: str) -> list[Entry]:
    """The original, and the models; marks such as `MODEL+int8` or `MODEL+head8+int8` say what the
    runtime rounds of them (MARKS).

    Raises InputError for a model that is not found, for two of one name and for none at all.
    """
    if not models:
        raise InputError("there is nothing to compare; give a folder or more")
    entries = [Entry(Path(original).name or original, resolve_model(original))]
    for given in models:
        ref, marks = _without_marks(given)
        name = "+".join([Path(ref).name or ref, *marks])
        settings = {key: value for mark in marks for key, value in MARKS[mark].items()}
        if len(settings) < len(marks):
            raise InputError(f"'{given}' says twice what one thing is rounded to; leave out one")
        entries.append(Entry(name, resolve_model(ref), ServedAs(**settings)))
    names = [entry.name for entry in entries]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(
            f"'{twice[0]}' names two of the models; rename a folder, or give it only once"
        )
    return entries


def _without_marks(given: str) -> tuple[str, list[str]]:
    """A model as it was given, and the marks behind it."""
    ref, _, mark = given.rpartition("+")
    if not ref or mark not in MARKS:
        return given, []
    ref, marks = _without_marks(ref)
    return ref, [*marks, mark]


class Comparison:
    """Measures entries, the first of which is the original, and keeps what it found in a folder."""

    def __init__(
        self, entries: Sequence[Entry], measures: Measures, out: Path, restart: bool = False
    ) -> None:
        self.entries, self.measures = entries, measures
        self.path = out / KEPT
        self._kept: dict[str, Any] = {} if restart else _read(self.path, out)

    def check(self) -> None:
        """Everything that can be refused before anything is measured; InputError then."""
        from compress.runtime.weights import check_served

        original, text = self.entries[0].source, self.measures.text
        for entry in self.entries:
            check_models([entry.source.folder, original.folder], text.seq_len if text else 1)
            if text:
                check_text(entry.source, text)
            if self.measures.recall:
                check_recall(entry.source, self.measures.recall)
            if entry.served.told:
                check_served(entry.source)
            for measure in (text, self.measures.tasks, self.measures.recall):
                if measure:
                    check_engine(measure.engine, entry.served)
        if tasks := self.measures.tasks:
            check_tasks(list(tasks.names), tasks.include_path, tasks.limit)
        if self.measures.speed:
            self.entries = [check_speed(entry, self.measures.speed) for entry in self.entries]
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def measure(self) -> None:
        """Measure what is still to be measured.

        Raises InputError while another run measures into the same folder.
        """
        out = self.path.parent
        try:
            with FileLock(out / LOCK, timeout=0):
                self._measure_all()
        except Timeout:
            raise InputError(
                f"output folder '{out}' is being measured into by another run; wait for it, or "
                "give another --out"
            ) from None

    def _measure_all(self) -> None:
        if self.measures.text:
            self._measure_quality(self.measures.text)
        if self.measures.tasks:
            self._measure_tasks(self.measures.tasks)
        if self.measures.recall:
            self._measure_recall(self.measures.recall)
        if self.measures.speed:
            self._measure_speed(self.measures.speed)

    def _measure_quality(self, config: TextEvalConfig) -> None:
        original = self.entries[0]
        settings = asdict(config) | {"original": original.files}

        def measured(entry: Entry) -> dict[str, Any]:
            own = replace(config, served=entry.served)
            against = None if entry is original else original.source
            return evaluate_text(entry.source, own, against)

        self._each("quality", settings, measured)

    def _measure_tasks(self, config: TaskConfig) -> None:
        def measured(entry: Entry) -> dict[str, Any]:
            return evaluate_tasks(
                entry.source, list(config.names), config.include_path, config.limit,
                seed=config.seed, dtype=config.dtype, engine=config.engine,
                served=entry.served,
            )  # fmt: skip

        self._each("tasks", asdict(config), measured)

    def _measure_recall(self, config: RecallConfig) -> None:
        def measured(entry: Entry) -> dict[str, Any]:
            own = replace(config, served=entry.served)
            return evaluate_recall(entry.source, own)

        self._each("recall", asdict(config), measured)

    def _measure_speed(self, config: SpeedConfig) -> None:
        settings = {key: value for key, value in asdict(config).items() if key != "rounds"}
        timed = [entry for entry in self.entries if not entry.unserved]
        # A time says something beside those of the same rounds: other entries are timed with all.
        together = json.dumps([_of(entry, {}) for entry in timed])
        settings["together"] = hashlib.sha256(together.encode()).hexdigest()
        for number in range(config.rounds):
            for entry in timed:
                done = self._get(entry, "speed", settings) or []
                if len(done) <= number:
                    say(f"Timing {entry.name}, round {number + 1} of {config.rounds}")
                    self._put(entry, "speed", settings, [*done, time_once(entry, config)])

    def rows(self) -> list[dict[str, Any]]:
        """What is known of each entry, in one dictionary each; the original comes first."""
        found = []
        for entry in self.entries:
            kept = self._kept.get(entry.name, {})
            row: dict[str, Any] = {
                "name": entry.name,
                "model": entry.source.ref,
                "bytes": entry.bytes,
            }
            if self.measures.text:
                row |= kept["quality"]["found"]
            if self.measures.tasks:
                row["tasks"] = kept["tasks"]["found"]["tasks"]
            if self.measures.recall:
                row["recall"] = kept["recall"]["found"]["recall"]
            if self.measures.speed and not entry.unserved:
                rounds = kept["speed"]["found"][: self.measures.speed.rounds]
                row |= medians(rounds) | {"batch": self.measures.speed.batch}
            found.append(row)
        return found

    def _each(
        self, kind: str, settings: dict[str, Any], measured: Callable[[Entry], dict[str, Any]]
    ) -> None:
        for entry in self.entries:
            if self._get(entry, kind, settings) is None:
                say(f"Measuring {kind} of {entry.name}")
                self._put(entry, kind, settings, measured(entry))

    def _get(self, entry: Entry, kind: str, settings: dict[str, Any]) -> Any:
        """What was measured of an entry as it is now; None where that is still to be done."""
        kept = self._kept.get(entry.name, {}).get(kind, {})
        return kept["found"] if kept.get("of") == _of(entry, settings) else None

    def _put(self, entry: Entry, kind: str, settings: dict[str, Any], found: Any) -> None:
        self._kept.setdefault(entry.name, {})[kind] = {"of": _of(entry, settings), "found": found}
        write_text(self.path, json.dumps(self._kept, indent=1, default=str) + "\n")


def check_speed(entry: Entry, speed: SpeedConfig) -> Entry:
    """An entry, with the reason where it cannot be timed.

    Raises InputError where the requests are longer than its context.
    """
    from compress.runtime.weights import check_served

    tokens = speed.prompt_tokens + speed.new_tokens
    context = read_config(entry.source.folder).get("max_position_embeddings")
    if context is not None and tokens > context:
        raise InputError(
            f"prompt and new tokens are {tokens}; '{entry.name}' allows at most {context} in all, "
            "use fewer"
        )
    try:
        check_served(entry.source)
    except InputError as error:
        reason = reason_of(error).partition(";")[0]
        say(f"No speed of {entry.name}: {reason}")
        return replace(entry, unserved=reason)
    return entry


def _of(entry: Entry, settings: dict[str, Any]) -> dict[str, Any]:
    """What a measurement is of, as JSON gives it back."""
    of = settings | {"served": asdict(entry.served), "files": entry.files}
    return json.loads(json.dumps(of, default=str))


def _read(path: Path, out: Path) -> dict[str, Any]:
    """What is kept in a folder.  Raises InputError where something else is in it."""
    if out.exists() and not out.is_dir():
        raise InputError(f"output '{out}' is a file; give a folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
            raise InputError(
                f"output folder '{out}' holds something else; give another --out"
            ) from None
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {reason_of(error)}; remove it") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not an object; remove it")
    return found


def time_once(entry: Entry, config: SpeedConfig) -> dict[str, float]:
    """Load a model and time one request, and a batch.

    Returns `time_to_first_token_s`, `seconds_per_token`, `tokens_per_s` of the batch once all of it
    decodes, `kv_bytes_per_token` and `weight_bytes`, those that a step reads.
    """
    from compress.bench.latency import WARM_UP_TOKENS, Shape, engine_for, run_once
    from compress.bench.subject import Subject

    subject = Subject(
        str(entry.stored), config.dtype, entry.served.lm_head_bits, config.threads,
        kv_cache_dtype=entry.served.kv_cache_dtype,
    )  # fmt: skip
    runs = []
    for batch in (1, config.batch):
        shape = Shape(config.prompt_tokens, config.new_tokens, batch)
        engine, prompts = engine_for(subject, shape), subject.prompts([shape.prompt_tokens] * batch)
        short = Shape(config.prompt_tokens, min(WARM_UP_TOKENS, config.new_tokens), batch)
        run_once(engine, prompts, short)
        runs.append((shape, run_once(engine, prompts, shape)))
        del engine
    (_, alone), (together, batched) = runs
    facts = subject.facts
    del subject
    gc.collect()
    return {
        "time_to_first_token_s": alone.prefill,
        "seconds_per_token": statistics.fmean(alone.steps),
        "tokens_per_s": batched.decode_rate(together),
        "kv_bytes_per_token": facts["kv_bytes_per_token"],
        "weight_bytes": facts["weight_bytes"],
    }


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Of each number the median over rounds, and how many there were."""
    found = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return found | {"rounds": len(rounds)}


def mark_frontier(rows: Sequence[dict[str, Any]], cost: str, loss: str) -> list[bool]:
    """Of each row: whether none is as good in both `cost` and `loss`, and better in one.

    A row without one of the two is not on it.
    """
    points = [(row.get(cost), row.get(loss)) for row in rows]

    def beaten(x: float, y: float) -> bool:
        return any(
            a is not None and b is not None and a <= x and b <= y and (a, b) != (x, y)
            for a, b in points
        )

    return [x is not None and y is not None and not beaten(x, y) for x, y in points]
