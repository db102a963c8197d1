"""Does the runtime say what transformers says, and the same thing whoever else is in the batch?

    python benchmarks/runtime_exactness.py MODEL [MODEL ...] --prompts questions.jsonl \\
        --out benchmarks/results/runtime-exactness.json

For each model, in float32 and in bfloat16, with greedy decoding:

- against transformers, on 20 prompts: how many texts are equal to the last token; where one is not,
  the gap between the two tokens' logits at the first difference, by transformers with the same
  prefix. A choice can only differ where the two are about equal, so the gap says whether a
  difference is rounding or a mistake.
- against itself, token for token: each prompt alone; all in one batch of 32; in a cache so small
  that requests are preempted and computed again; with the prompt found in the prefix cache; and in
  chunks of 48 tokens.

The prompts' file has one JSON object a line with "prompt", or "turns" as MT-bench has them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from compress.core.source import resolve_model
from compress.core.tokenizer import load_tokenizer
from compress.loading import load_model
from compress.runtime.decoder import Decoder
from compress.runtime.engine import Engine
from compress.runtime.llm import LLM, stop_tokens
from compress.runtime.loading import load_decoder
from compress.runtime.sampling_params import SamplingParams

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prompts", required=True, type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.prompts.read_text("utf-8").splitlines()]
    texts = [line.get("prompt") or line["turns"][0] for line in lines][:BATCH]
    results = []
    for model in arguments.models:
        for dtype in arguments.dtypes.split(","):
            results.append(examine(model, dtype, texts, arguments.count, arguments.tokens))
            print(json.dumps(results[-1]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


def examine(
    model: str, dtype: str, texts: list[str], count: int, max_tokens: int
) -> dict[str, Any]:
    """All comparisons for one model in one dtype."""
    tokenizer: Any = load_tokenizer(resolve_model(model).folder)
    prompts = [chat_ids(tokenizer, text) for text in texts]
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    longest = max(map(len, prompts)) + max_tokens
    batch = generate(model, dtype, prompts, params)
    result = {"model": Path(model).name, "dtype": dtype, "prompts": len(prompts)}
    result["same_alone"] = equal(
        batch, [out for p in prompts[:8] for out in generate(model, dtype, [p], params)]
    )
    blocks = -(-longest // 16) + 8
    preempted = generate(model, dtype, prompts, params, blocks=blocks)
    result["same_preempted"] = equal(batch, preempted)
    result["preemptions"] = preempted.preemptions
    twice = generate(model, dtype, prompts, params, warm=True)
    result["same_with_prefix_hits"] = equal(batch, twice)
    result["prefix_tokens_found"] = twice.cached
    chunks = generate(model, dtype, prompts, params, budget=48)
    result["same_in_chunks"] = equal(batch, chunks)
    return result | against_transformers(model, dtype, prompts[:count], batch, max_tokens)


class Outputs(list[list[int]]):
    """Token ids of each prompt's answer, and what the engine counted."""

    preemptions = 0
    cached = 0


_loaded: dict[tuple[str, str], Decoder] = {}


def generate(
    model: str,
    dtype: str,
    prompts: list[list[int]],
    params: SamplingParams,
    blocks: int = 2000,
    budget: int = 512,
    warm: bool = False,
) -> Outputs:
    """Answers to all prompts at once, on an engine with an empty cache (`warm`: a used one)."""
    source = resolve_model(model)
    if (model, dtype) not in _loaded:
        _loaded.clear()
        _loaded[model, dtype] = load_decoder(source, torch.device("cpu"), dtype)
    tokenizer = load_tokenizer(source.folder)
    engine = Engine(
        _loaded[model, dtype], blocks, max_tokens_per_step=budget, max_sequences=BATCH,
        tokenizer=tokenizer, eos_ids=stop_tokens(source.folder, tokenizer),
    )  # fmt: skip
    with LLM.from_engine(engine, tokenizer) as llm:
        if warm:
            llm.generate(prompts, params)
        before = llm.statistics()
        found = Outputs(out.outputs[0].token_ids for out in llm.generate(prompts, params))
        after = llm.statistics()
    engine.check()
    found.preemptions = after.preemptions
    found.cached = after.cached_prompt_tokens - before.cached_prompt_tokens
    return found


def equal(batch: list[list[int]], others: list[list[int]]) -> str:
    same = sum(a == b for a, b in zip(batch, others, strict=False))
    return f"{same} of {len(others)}"


def against_transformers(
    model: str, dtype: str, prompts: list[list[int]], ours: list[list[int]], max_tokens: int
) -> dict[str, Any]:
    """Greedy texts of transformers, and the gap of logits at each first difference."""
    peer: Any = load_model(resolve_model(model).folder, dtype, torch.device("cpu"))
    gaps, same = [], 0
    for prompt, answer in zip(prompts, ours, strict=False):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            theirs = peer.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens,
                do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()  # fmt: skip
        if theirs == answer:
            same += 1
            continue
        at = next(i for i, pair in enumerate(zip(theirs, answer, strict=False)) if len({*pair}) > 1)
        prefix = torch.tensor([prompt + theirs[:at]])
        with torch.inference_mode():
            logits = peer(prefix).logits[0, -1].float()
        gaps.append(round(float(logits[theirs[at]] - logits[answer[at]]), 4))
    return {"equal_to_transformers": f"{same} of {len(prompts)}", "gaps": gaps}


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    message = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    main()
