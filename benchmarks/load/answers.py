"""The right answers, by `LLM.generate` in a process of its own.

python -m load.answers MODEL REQUESTS.json ANSWERS.json [--dtype ...] [--head-bits 8]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from load.asked import Asked


def right_answers(
    model: str, asked: list[Asked], work: Path, options: list[str]
) -> list[dict[str, Any]]:
    """Tokens of the prompt, and text, finish reason and tokens of each output, a request each."""
    requests, answers = work / "requests.json", work / "answers.json"
    requests.write_text(json.dumps([asdict(request) for request in asked]))
    command = [sys.executable, "-m", "load.answers", model, str(requests), str(answers), *options]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    return json.loads(answers.read_text())


def main() -> None:
    from compress.runtime.llm import LLM
    from compress.runtime.sampling_params import SamplingParams

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("requests", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--head-bits", type=int)
    options = parser.parse_args()
    asked = [Asked(**values) for values in json.loads(options.requests.read_text())]
    with LLM(options.model, dtype=options.dtype, lm_head_bits=options.head_bits) as llm:
        prompts = [
            llm.chat_prompt(request.content) if request.endpoint == "chat" else request.content
            for request in asked
        ]
        params = [SamplingParams(**request.settings) for request in asked]
        found = llm.generate(prompts, params, progress=True)
    answers = [
        {
            "prompt_tokens": len(answer.prompt_token_ids),
            "texts": [output.text for output in answer.outputs],
            "finish_reasons": [output.finish_reason for output in answer.outputs],
            "tokens": sum(len(output.token_ids) for output in answer.outputs),
        }
        for answer in found
    ]
    options.answers.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
