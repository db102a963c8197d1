"""Accuracy on multiple-choice and other tasks, through EleutherAI's lm-evaluation-harness [1].

The harness builds the prompts and scores the answers; the model runs on the runtime
(`compress.harness`) or, with the engine `transformers`, as the harness's own HFLM.
For a multiple-choice task with choices c of a question q,

    acc      = mean over questions of [argmax_c  log p(c | q)           is the right choice]
    acc_norm = mean over questions of [argmax_c  log p(c | q) / len(c)  is the right choice]

with len(c) in characters, and a standard error sqrt(a (1 - a) / (n - 1)) beside each.

[1] Gao et al., https://github.com/EleutherAI/lm-evaluation-harness, docs/task_guide.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.device import AS_STORED, ServedAs
from compress.core.errors import InputError, nearest
from compress.core.source import ModelSource, read_config
from compress.core.tokenizer import load_tokenizer
from compress.engines import settle_engine
from compress.loading import load_model

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

DEFAULT_BATCH_SIZE = 8


def evaluate_tasks(
    model: ModelSource,
    tasks: list[str],
    include_path: Path | None,
    limit: int | None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int = 0,
    dtype: str = "float32",
    engine: str = "auto",
    served: ServedAs = AS_STORED,
) -> dict[str, Any]:
    """Run harness tasks, and return their metrics with standard errors, ready for JSON.

    `include_path` is a folder with task files of your own, `limit` the number of questions to ask
    of each task (None: all), `engine` one of compress.engines.ENGINES.  `batch_size` is for the
    engine transformers; the runtime packs its batches itself, and loads the model as `served` says.
    Returns {"tasks": {task: {"samples": n, metric: value, metric_stderr: value or None}}, "limit":
    limit, "engine": engine} and what `served` tells.  A group of tasks also gets an entry, when the
    harness aggregates it.

    Raises InputError, before the model is loaded, when lm-eval is absent, a task is unknown, its
    data cannot be read, or a number is out of range.
    """
    _check(tasks, include_path, limit, batch_size)
    read_config(model.folder)
    with contextlib.redirect_stdout(sys.stderr):  # the harness and its data sets print
        manager = _find_tasks(tasks, include_path)
        engine = settle_engine(engine, [model], served)
        specs = _load_tasks(manager, tasks)
        from lm_eval.evaluator import simple_evaluate

        found: Any = simple_evaluate(
            _harness_model(engine, model, dtype, batch_size, seed, served),
            tasks=specs,
            task_manager=manager,
            limit=limit,
            batch_size=batch_size,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert found is not None, "the harness returns None only on ranks above 0"
    samples = {name: counts["effective"] for name, counts in found["n-samples"].items()}
    return {
        "tasks": {
            name: {"samples": samples.get(name)} | _plain_metrics(metrics)
            for name, metrics in found["results"].items()
        },
        "limit": limit,
        "engine": engine,
    } | served.told


def check_tasks(tasks: list[str], include_path: Path | None, limit: int | None) -> None:
    """Raise InputError where `evaluate_tasks` would for its tasks; reads their data."""
    _check(tasks, include_path, limit, DEFAULT_BATCH_SIZE)
    with contextlib.redirect_stdout(sys.stderr):
        _load_tasks(_find_tasks(tasks, include_path), tasks)


def _harness_model(
    engine: str, model: ModelSource, dtype: str, batch_size: int, seed: int, served: ServedAs
) -> Any:
    if engine == "runtime":
        from compress.harness import RuntimeLM

        return RuntimeLM(model, dtype, seed, served)
    from lm_eval.models.huggingface import HFLM

    harness_model: Any = HFLM  # its constructor's signature is hidden by a decorator
    return harness_model(
        pretrained=load_model(model.folder, dtype),
        tokenizer=load_tokenizer(model.folder),
        batch_size=batch_size,
        softmax_dtype="float32",
    )


def _check(tasks: list[str], include_path: Path | None, limit: int | None, batch_size: int) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "evaluating tasks needs lm-eval, which is not installed; "
            "run: pip install 'compress-llm[eval]'"
        )
    if not tasks:
        raise InputError("no tasks given; name at least one, such as arc_easy")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; allowed is 1 or more, or none for all questions")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; allowed is 1 or more")
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"include_path '{include_path}' is no folder; give one with task files")


def _find_tasks(names: list[str], include_path: Path | None) -> TaskManager:
    """Return an index that has all the names; lm-eval's own tasks take seconds to index."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(
                f"task '{name}' is unknown; allowed are lm-eval's {len(manager.all_tasks)} tasks "
                "(see: lm_eval ls tasks) and those of the include path"
                f"{nearest(name, manager.all_tasks)}"
            )
    return manager


def _load_tasks(manager: TaskManager, names: list[str]) -> list[Any]:
    """Read the tasks' data, before any weights are loaded; a tag such as ai2_arc is its tasks."""
    specs: list[Any] = []
    for name in dict.fromkeys(names):
        try:
            loaded = manager.load([name])
        except Exception as error:  # tasks run code of their own: the hub, YAML, Python, data
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"task '{name}' cannot be loaded: {reason}") from error
        group = loaded.get("groups", {}).get(name)
        specs += [group] if group is not None else loaded["tasks"].values()
    return specs


def _plain_metrics(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Turn the harness's `acc,none` and `acc_stderr,none` into `acc` and `acc_stderr`.

    Where a task post-processes answers with a filter, the filter stays: `exact_match,strict`.
    An undefined standard error ("N/A", or NaN for one question) is None.
    """
    plain: dict[str, float | None] = {}
    for key, value in metrics.items():
        name, comma, filter_name = key.partition(",")
        if not comma:  # "alias" and other notes
            continue
        number = value if isinstance(value, int | float) and math.isfinite(value) else None
        plain[name if filter_name == "none" else key] = None if number is None else float(number)
    return plain
