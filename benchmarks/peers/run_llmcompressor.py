"""AWQ and GPTQ by llm-compressor, as baselines: run with an interpreter that has llmcompressor.

    pip install llmcompressor==0.14.0.1        # in a virtual environment of its own
    python benchmarks/peers/run_llmcompressor.py awq|gptq BITS GROUP_SIZE \\
        MODEL_DIR TOKENS.safetensors OUT_DIR

TOKENS holds `input_ids`, int64 [samples, seq_len]; both tools get the same tokens.  The last
line on standard output is one JSON object with the wall and CPU seconds of `oneshot` alone,
i.e. without imports and model loading.  llm-compressor pins memory for its grid search, which
fails on a machine without an accelerator; only that call is disabled here.  All else is its default
(GPTQ: dampening 0.001, static activation order).
"""

import json
import resource
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(
    method: str, bits: int, group_size: int, model_dir: str, tokens_path: str, out_dir: str
) -> None:
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokens = load_file(tokens_path)["input_ids"]
    dataset = Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    )
    group = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": group_size,
        },
    }
    scheme = {"ignore": ["lm_head"], "config_groups": {"group_0": group}}
    recipe = {
        "awq": [AWQModifier(), QuantizationModifier(**scheme)],
        "gptq": [GPTQModifier(**scheme)],
    }[method]
    wall, cpu = time.perf_counter(), cpu_seconds()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=tokens.shape[0],
    )
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    model.save_pretrained(out_dir, save_compressed=True)
    tokenizer.save_pretrained(out_dir)
    print(json.dumps({"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:7])
