"""Does `compress serve` survive its users?  500 at once: they stream, leave, talk nonsense, and
at the end the server is told to stop.

    python benchmarks/serve_load.py MODEL WORK_FOLDER --dataset questions.jsonl

Right answers come first, from `LLM.generate` in a process of its own.  Then `compress serve` is
started, and in each of three rounds

- a fifth more requests than it has room for come at once (running and waiting: --streams): chat
  and completions, streamed or not, greedy or with seeds, one output or two.  Three in ten clients
  leave: in the queue, about when their prompt is computed, or in the middle of the stream;
- requests that are not in order come between them, of 29 kinds.

Every answer must equal the right one to the last token, and what a client that left has seen must
be its beginning.  Others may only be refused, by 429 with Retry-After, and what is not in order by
the status for that.  After each round nothing may run, wait or hold a block, the engine recounts
its blocks, open files are as many as before, and after later rounds memory is at most
--memory-bound above that after the first.

Then SIGTERM under load, twice.  With time to finish, every accepted request must be answered right,
and the process ends by itself with exit code 0.  Another server has --short-drain seconds:
there streams may instead end with an error event and other requests with 503, but nothing in
silence, and the process must end in time.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from load import report
from load.answers import right_answers
from load.asked import requests
from load.ending import ending
from load.rounds import MAX_BODY, rounds
from load.server import ServerProcess

from compress.bench.prompts import WORDS, read_prompts
from compress.core.resources import parse_size, raise_file_limit

OVERFLOW = 1.2  # requests for each one that there is room for
FAULTS_SHOWN = 20


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    raise_file_limit()
    asked = requests(
        round(OVERFLOW * options.streams), texts(options), options.max_tokens, options.seed
    )
    flags = ["--dtype", options.dtype]
    flags += ["--head-bits", str(options.head_bits)] if options.head_bits else []
    right = right_answers(options.model, asked, options.work, flags)
    flags += ["--max-sequences", str(options.slots), "--max-body-size", str(MAX_BODY)]
    flags += ["--max-queued-requests", str(options.streams - options.slots)]
    flags += ["--kv-cache-memory", options.kv_cache_memory]
    result: dict[str, Any] = {"model": Path(options.model).name, **facts(options)}
    with started(options, flags, options.drain) as server:
        result["rounds"] = rounds(options, server, asked, right)
        result["endings"] = [ending(options, server, asked, right, options.drain, patient=True)]
    with started(options, flags, options.short_drain) as server:
        result["endings"].append(
            ending(options, server, asked, right, options.short_drain, patient=False)
        )
    report.write(options.out or options.work, options, result)
    faults = [fault for part in result["rounds"] + result["endings"] for fault in part["faults"]]
    for fault in faults[:FAULTS_SHOWN]:
        print(f"FAULT {fault}", file=sys.stderr)
    sys.exit(f"{len(faults)} faults" if faults else 0)


def started(options: argparse.Namespace, flags: list[str], drain: int) -> ServerProcess:
    """A server with `drain` seconds to finish after SIGTERM."""
    flags = [*flags, "--drain-seconds", str(drain)]
    return ServerProcess(options.model, flags, options.work, f"server-{drain}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("work", type=Path, help="for logs, requests and right answers")
    parser.add_argument("--dataset", type=Path, help="prompts as `compress bench serve` takes them")
    parser.add_argument("--streams", type=int, default=500, help="running and waiting at most")
    parser.add_argument("--slots", type=int, default=64, help="running at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--kv-cache-memory", default="256MiB")
    parser.add_argument("--memory-bound", type=parse_size, default="32MiB")
    parser.add_argument("--drain", type=int, default=600, help="seconds to finish all")
    parser.add_argument("--short-drain", type=int, default=3, help="seconds to finish some")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--head-bits", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for serve-load.md and .json  [WORK]")
    return parser.parse_args()


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, for the record."""
    names = ("streams", "slots", "max_tokens", "kv_cache_memory", "dtype", "head_bits", "seed")
    return {name: getattr(options, name) for name in (*names, "memory_bound")}


def texts(options: argparse.Namespace) -> list[str]:
    """Prompts of the dataset, or of random words."""
    if options.dataset:
        found = read_prompts(options.dataset, "completions")
        return [str(prompt.content) for prompt in found]
    draw, words = random.Random(options.seed), WORDS.split()
    return [" ".join(draw.choices(words, k=draw.randint(10, 80))) for _ in range(200)]


if __name__ == "__main__":
    main()
