"""What ours is compared with.  A peer runs in a process of its own, and only when it is asked."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from compress.bench.subject import Subject
from compress.core.errors import InputError
from compress.core.source import gguf_file

SCRIPT = Path(__file__).with_name("peer.py")


class Peer:
    """A running `peer.py`, as a context manager; `facts` say what it is.

    Raises InputError when it cannot be started or ends early.
    """

    def __init__(self, command: list[str], facts: dict[str, Any], remedy: str) -> None:
        self._remedy = remedy
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise InputError(
                f"cannot start '{command[0]}': {error.strerror}; give --peer-python the path of a "
                "Python interpreter"
            ) from None
        self.facts: dict[str, Any] = self._answer() | facts

    def run(self, prompt: list[int], new_tokens: int) -> tuple[float, list[float]]:
        """Seconds of prefill, and of each of the `new_tokens` - 1 steps after it."""
        assert self._process.stdin is not None
        print(
            json.dumps({"prompt": prompt, "new_tokens": new_tokens}),
            file=self._process.stdin,
            flush=True,
        )
        found = self._answer()
        return found["prefill"], found["steps"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise InputError("the peer ended without a result; what it said stands above")
        value = json.loads(line)
        if "error" in value:
            self.__exit__()
            raise InputError(f"{value['error']}; {self._remedy}")
        return value

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, which waits for its next line."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()


def transformers_peer(subject: Subject, prompt_tokens: int, new_tokens: int) -> Peer:
    """The same folder in transformers, in the same dtype, on the same threads."""
    facts = {
        "dtype": subject.dtype,
        "weights": "the same folder",
    }
    options = ["--dtype", subject.dtype]
    model = str(subject.source.folder)
    command = _command(sys.executable, "hf", model, prompt_tokens, new_tokens, options)
    return Peer(command, facts, "mend the installation, or leave out --compare")


def llama_cpp_peer(
    subject: Subject,
    gguf: Path | None,
    python: str | None,
    prompt_tokens: int,
    new_tokens: int,
) -> Peer:
    """A .gguf file in llama.cpp, on the same threads; by default the one that ours has read."""
    own = gguf_file(subject.model)
    path = gguf or own
    if path is None:
        raise InputError(
            f"'{subject.model}' is no .gguf file, which llama.cpp needs; give --gguf FILE"
        )
    if not path.is_file():
        raise InputError(f"--gguf '{path}' does not exist; check the path")
    interpreter = python or sys.executable
    remedy = f"run: {interpreter} -m pip install llama-cpp-python, or give --peer-python PATH"
    command = _command(interpreter, "llama-cpp", str(path), prompt_tokens, new_tokens, [])
    return Peer(command, {"weights": _weights(subject, own, path)}, remedy)


def _weights(subject: Subject, own: Path | None, path: Path) -> str:
    if own is None or not filecmp.cmp(own, path, shallow=False):
        return "its own, of another file"
    if subject.head_bits is not None:
        return f"identical, but for the output layer: {subject.head_bits} bits in ours"
    return "identical weights: ours reads the same .gguf file, without loss"


def _command(
    python: str, kind: str, model: str, prompt_tokens: int, new_tokens: int, options: list[str]
) -> list[str]:
    sizes = {
        "--threads": torch.get_num_threads(),
        "--prompt-tokens": prompt_tokens,
        "--new-tokens": new_tokens,
    }
    flat = [word for name, count in sizes.items() for word in (name, str(count))]
    return [python, str(SCRIPT), kind, model, *flat, *options]
