"""A short real run: SmolLM2-135M to 4 bits, and what must be true of the result.

    python .ci/end_to_end.py WORK_FOLDER

Runs outside the repository's root (so that the installed package is what is tested), with few
calibration samples.  The text is Python's own documentation, which every Python carries.  Two
chains of commands run side by side, since most of their time is spent on one core.
"""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI


def compress(*arguments: str, cwd: Path) -> dict[str, Any]:
    """What a command prints as JSON.  Quantizing takes one thread, the rest takes its default."""
    command = ["compress", *arguments, "--json"]
    settings = {"OMP_NUM_THREADS": "1"} if arguments[0] == "quantize" else {}
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def main(work: Path) -> None:
    topics = list(pydoc_data.topics.topics.values())
    (work / "calibration.txt").write_text("\n".join(topics[::2]), encoding="utf-8")
    (work / "text.txt").write_text("\n".join(topics[1::2]), encoding="utf-8")
    grid = ["--bits", "4", "--group-size", "64", "--symmetric"]
    calibration = ["--calibration", "calibration.txt", "--samples", "8", "--seq-len", "256"]
    divergence = {}

    def measure(folder: str) -> None:
        scores = compress(
            "eval", folder, "--against", "smollm2", "--text", "text.txt", "--seq-len", "256",
            "--windows", "4", cwd=work,
        )  # fmt: skip
        divergence[folder] = scores["kl_mean"]
        print(f"{folder}: perplexity {scores['perplexity']:.2f}, KL {scores['kl_mean']:.3f}")

    def quantize(method: str, *more: str) -> None:
        compress("quantize", "smollm2", "--method", method, *grid, *more, "--out", method, cwd=work)

    def convert() -> None:
        quantize("gptq", *calibration)
        measure("gptq")
        compress("export", "gptq", "--format", "gptq", "--out", "exported", cwd=work)
        measure("exported")

    quantize("rtn")  # by itself: it also unpacks the model, which is kept
    with ThreadPoolExecutor(1) as beside:
        converted = beside.submit(convert)
        measure("rtn")
        quantize("awq", *calibration)
        measure("awq")
        answer(work)
        converted.result()
    assert divergence["awq"] < 0.7 * divergence["rtn"], divergence
    assert divergence["gptq"] < 0.9 * divergence["awq"], divergence
    # scales went from float32 to float16, 11 bits: next to nothing beside 4-bit weights
    assert abs(divergence["exported"] - divergence["gptq"]) < 0.01 * divergence["gptq"], divergence
    assert f"{divergence['gptq']:#.4g}" in (work / "gptq" / "report.html").read_text("utf-8")
    found = compress("inspect", "gptq", cwd=work)
    assert found["quantization"]["quantized_linears"] == 210, found


def answer(work: Path) -> None:
    """One greedy answer of a small model hangs on little: it shows that generation works."""
    said = compress(
        "generate", "awq", "--chat", "--prompt", "What is the capital of France?",
        "--max-tokens", "24", cwd=work,
    )  # fmt: skip
    print(said["text"])
    assert "Paris" in said["text"], said
    serve(work, said["text"])


def serve(work: Path, expected: str) -> None:
    """The same question over HTTP, by OpenAI's own client, and an orderly end."""
    command = [
        "compress",
        "serve",
        "awq",
        "--served-model-name",
        "smollm2",
        "--port",
        "0",
        "--json",
    ]
    with subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = json.loads(server.stdout.readline())["url"]
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            stream = client.chat.completions.create(
                model="smollm2",
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                max_tokens=24,
                temperature=0,
                stream=True,
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert text == expected, text
        finally:
            server.terminate()
        assert server.wait(60) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
