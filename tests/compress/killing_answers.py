"""`compress generate --input`, killed at random moments; used by test_generate.py.

    python killing_answers.py MODEL PROMPTS OUT

Prints one JSON object: how many runs were killed, and how many found answers of one before.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from compress.answer_file import AnswerFile
from compress.bulk import Bulk, answer_lines
from compress.runtime.llm import LLM
from compress.runtime.sampling_params import SamplingParams

KILLS = 12


def start(llm: LLM, bulk: Bulk, out: Path) -> int:
    """Answer in a forked process, which must not use the threads of its parent; returns its id."""
    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        answer_lines(llm, bulk, AnswerFile(out, overwrite=False), {}, in_flight=4, restart=False)
    except BaseException as error:
        print(repr(error), file=sys.stdout, flush=True)
        os._exit(1)
    os._exit(0)


def main() -> None:
    model, prompts, out = sys.argv[1:]
    torch.set_num_threads(1)
    llm = LLM(model, dtype="float32")
    bulk = Bulk(Path(prompts), SamplingParams(max_tokens=100, temperature=20, ignore_eos=True))
    whole, path = Path(f"{out}.whole"), Path(out)
    began = time.monotonic()
    os.waitpid(start(llm, bulk, whole), 0)
    seconds = time.monotonic() - began
    progress = path.with_name(f".{path.name}.progress") / "answers.jsonl"
    generator, killed, resumed = random.Random(0), 0, 0
    while killed < KILLS:
        resumed += progress.exists() and progress.stat().st_size > 0
        pid = start(llm, bulk, path)
        time.sleep(generator.uniform(0, seconds / 2))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if path.exists():
            check(path, whole)
            path.unlink()
    if os.waitstatus_to_exitcode(os.waitpid(start(llm, bulk, path), 0)[1]):
        sys.exit("the last run failed")
    check(path, whole)
    if progress.exists():
        sys.exit("the progress of a complete output stayed behind")
    print(json.dumps({"killed": killed, "resumed": int(resumed)}))


def check(path: Path, whole: Path) -> None:
    if path.read_bytes() != whole.read_bytes():
        sys.exit("a run that was killed gave other bytes")


if __name__ == "__main__":
    main()
