"""A peer, measured in a process of its own: transformers, or llama.cpp by llama-cpp-python.

    python peer.py hf|llama-cpp MODEL --threads N --prompt-tokens P --new-tokens N [--dtype D]

Runs in any interpreter that has the peer.  Says what it is in one JSON line, then answers each line
{"prompt": [token ids], "new_tokens": N} with {"prefill": seconds, "steps": [seconds, ...]}: the
prompt in one batch, with logits of its last token alone, then one token at a time, greedily, N - 1
times.  Ends with its input.  `python peer.py quantize IN.gguf OUT.gguf TYPE` is llama.cpp's tool.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import sys
import time
from typing import Any

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}  # llama_ftype


class Transformers:
    """A model folder in transformers, with its own key-value cache."""

    package = "transformers"

    def __init__(self, options: argparse.Namespace) -> None:
        from pathlib import Path

        import torch

        from compress.loading import load_model

        torch.set_num_threads(options.threads)
        self._torch = torch
        self._model: Any = load_model(Path(options.model), options.dtype)

    def run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        torch = self._torch
        with torch.inference_mode():
            tokens = torch.tensor([prompt], device=self._model.device)
            times = [time.perf_counter()]
            cache = None
            for _ in range(new_tokens):
                out = self._model(
                    tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
                )  # fmt: skip
                cache = out.past_key_values
                tokens = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.tolist()  # waits for a GPU
                times.append(time.perf_counter())
        return in_parts(times)


class LlamaCpp:
    """A .gguf file in llama.cpp, by its own low-level calls."""

    package = "llama-cpp-python"

    def __init__(self, options: argparse.Namespace) -> None:
        import llama_cpp
        import numpy

        self._lib, self._numpy = llama_cpp, numpy
        self._llama = llama_cpp.Llama(
            options.model,
            n_ctx=options.prompt_tokens + options.new_tokens,
            n_batch=options.prompt_tokens,
            n_ubatch=options.prompt_tokens,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            verbose=False,
        )
        self._context = self._llama._ctx.ctx
        self._batch = llama_cpp.llama_batch_init(options.prompt_tokens, 0, 1)

    def run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        lib = self._lib
        if (most := max(prompt)) >= self._llama.n_vocab():
            raise SystemExit(f"token {most} is not in this .gguf's vocabulary: another model?")
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        times = [time.perf_counter()]
        token = self._decode(prompt, 0)
        times.append(time.perf_counter())
        for position in range(len(prompt), len(prompt) + new_tokens - 1):
            token = self._decode([token], position)
            times.append(time.perf_counter())
        return in_parts(times)

    def _decode(self, tokens: list[int], position: int) -> int:
        """Give the model tokens from `position` on; returns the likeliest next one."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = position + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = place == len(tokens) - 1
        if failed := self._lib.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode returned {failed}")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(self._numpy.ctypeslib.as_array(logits, (self._llama.n_vocab(),)).argmax())


PEERS = {"hf": Transformers, "llama-cpp": LlamaCpp}


def in_parts(times: list[float]) -> dict[str, Any]:
    """Seconds of prefill and of each step, from the moments at which they ended."""
    spans = [after - before for before, after in itertools.pairwise(times)]
    return {"prefill": spans[0], "steps": spans[1:]}


def quantize(source: str, target: str, kind: str) -> None:
    """Write a .gguf file again with other types, from whatever types it has."""
    import llama_cpp

    lib: Any = llama_cpp
    params = lib.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    params.allow_requantize = True
    if lib.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit(f"llama.cpp could not write {target}")


def main() -> None:
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    for name in ("threads", "prompt-tokens", "new-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result

    def tell(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=results, flush=True)

    kind = PEERS[options.peer]
    try:
        started = time.perf_counter()
        peer = kind(options)
        seconds = time.perf_counter() - started
    except ImportError as error:
        tell({"error": f"{kind.package} cannot be imported by {sys.executable} ({error})"})
        return
    except Exception as error:  # a model that the peer does not load
        tell({"error": f"{kind.package} does not load {options.model}: {error}"})
        return
    version = importlib.metadata.version(kind.package)
    facts = {"name": options.peer, "version": f"{kind.package} {version}"}
    facts |= {"model": options.model, "threads": options.threads}
    tell(facts | {"load_seconds": round(seconds, 3)})
    for line in sys.stdin:
        tell(peer.run(**json.loads(line)))


if __name__ == "__main__":
    main()
