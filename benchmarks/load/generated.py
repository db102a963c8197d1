"""`LLM.generate` on the requests that `compress bench serve` sends, without a server: tokens/s.

python -m load.generated MODEL DATASET COUNT MAX_TOKENS WARMUP SLOTS DTYPE
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

from compress.bench.prompts import prompts_of
from compress.runtime.llm import LLM
from compress.runtime.sampling_params import SamplingParams


def main(
    model: str, dataset: str, count: int, max_tokens: int, warmup: int, slots: int, dtype: str
) -> None:
    """Print tokens and seconds, as one JSON object."""
    prompts, _ = prompts_of(dataset, "chat", seed=0)
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
    with LLM(model, dtype=dtype, max_sequences=slots) as llm:

        def generate(number: int) -> int:
            taken = [prompt.body("chat") for prompt in itertools.islice(prompts, number)]
            tokens = [llm.chat_prompt(body.pop("messages")) for body in taken]
            params = [SamplingParams(**settings | body) for body in taken]
            outputs = llm.generate(tokens, params)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        generate(warmup)
        began = time.perf_counter()
        tokens = generate(count)
        seconds = time.perf_counter() - began
    print(json.dumps({"tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    model, dataset, count, max_tokens, warmup, slots, dtype = sys.argv[1:]
    main(model, dataset, int(count), int(max_tokens), int(warmup), int(slots), dtype)
