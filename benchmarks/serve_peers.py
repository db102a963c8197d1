"""`compress serve` beside another server, as their clients see them; and what HTTP costs.

    python benchmarks/serve_peers.py MODEL WORK_FOLDER --dataset questions.jsonl
    python benchmarks/serve_peers.py MODEL.gguf WORK_FOLDER --dataset questions.jsonl \\
        --llama-server PATH_OF_LLAMA_SERVER

The other is `transformers serve`, or llama.cpp's `llama-server`, which reads the same .gguf file as
we.  The same model, prompts, threads and client (`compress bench serve`), with continuous batching
in both and 512 tokens a step.  For each number of clients a fresh server of ours and then one of
theirs, so that no cache knows a prompt and the machine's drift hits both.

What HTTP costs: new tokens/s of requests that come all at once, over those of `LLM.generate` on the
same requests without a server, in turn.  The client runs on the same machine and is part of the
cost.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from load.server import ServerProcess

HERE = Path(__file__).parent
WARMUP = 2
BLOCK = 16  # tokens of a block of the cache
START = 300.0  # seconds that a server may take to start
MEASURES = {
    "new tokens/s": ("output_throughput", True),
    "TTFT, median, ms": ("median_ttft_ms", False),
    "TTFT, p99, ms": ("p99_ttft_ms", False),
    "TPOT, median, ms": ("median_tpot_ms", False),
    "E2E, median, ms": ("median_e2e_ms", False),
}


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    rows = []
    for clients in [int(number) for number in options.concurrency.split(",")]:
        with ours(options, f"ours-{clients}") as server:
            found = bench(options, server.url, server.model, "--concurrency", str(clients))
        with theirs(options, clients) as url:
            peer = bench(options, url, options.model, "--concurrency", str(clients))
        rows.append({"clients": clients, "ours": found, "theirs": peer})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {"model": Path(options.model).name, "peer": peer_name(options), "rows": rows}
    result["http"] = cost_of_http(options)
    folder = options.out or options.work
    folder.mkdir(parents=True, exist_ok=True)
    name = "serve-llama-cpp" if options.llama_server else "serve-transformers"
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    text = table(options, result)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="what the other server loads too: a folder, a .gguf file")
    parser.add_argument("work", type=Path, help="for logs")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--llama-server", help="this program instead of transformers serve")
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--slots", type=int, default=64, help="sequences in a batch, ours")
    parser.add_argument("--cache-tokens", type=int, default=32768, help="of the peer's cache")
    parser.add_argument("--repeat", type=int, default=3, help="for the cost of HTTP")
    parser.add_argument("--out", type=Path, help="folder for the tables  [WORK]")
    return parser.parse_args()


def bench(options: argparse.Namespace, url: str, model: str, *flags: str) -> dict[str, Any]:
    """What `compress bench serve` says of one load.  Raises CalledProcessError."""
    command = [sys.executable, "-m", "compress", "bench", "serve", "--url", url, "--model", model]
    command += ["--dataset", options.dataset, "--num-prompts", str(options.num_prompts)]
    command += ["--max-tokens", str(options.max_tokens), "--warmup", str(WARMUP), "--json", *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)["loads"][0]
    if found["failed"]:
        print(f"{url}: {found['errors']}: {found['error_messages']}", file=sys.stderr)
    return found


def ours(options: argparse.Namespace, name: str) -> ServerProcess:
    """`compress serve`, with room for all requests at once."""
    flags = ["--dtype", options.dtype, "--max-sequences", str(options.slots)]
    flags += ["--max-queued-requests", str(options.num_prompts)]
    return ServerProcess(options.model, flags, options.work, name)


@contextmanager
def theirs(options: argparse.Namespace, clients: int) -> Iterator[str]:
    """The address of the other server, once it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = llama_server(options, clients) if options.llama_server else transformers(options)
    command += ["--host", "127.0.0.1", "--port", str(port)]
    url, path = f"http://127.0.0.1:{port}", options.work / f"theirs-{clients}.log"
    with path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(f"{url}/health", process, path)
        yield url
    finally:
        process.kill()
        process.wait()


def transformers(options: argparse.Namespace) -> list[str]:
    """How `transformers serve` is started."""
    program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    command = [*program, "serve", options.model, "--continuous-batching", "--device", "cpu"]
    command += ["--dtype", options.dtype, "--cb-max-batch-tokens", "512"]
    command += ["--cb-block-size", str(BLOCK)]
    return [*command, "--cb-num-blocks", str(options.cache_tokens // BLOCK)]


def llama_server(options: argparse.Namespace, clients: int) -> list[str]:
    """How `llama-server` is started: as many slots as clients, and the cache shared out evenly."""
    command = [options.llama_server, "-m", options.model, "-np", str(clients)]
    command += ["-t", str(options.threads), "-tb", str(options.threads), "--ubatch-size", "512"]
    return [*command, "-c", str(options.cache_tokens), "--batch-size", "512", "--jinja"]


def peer_name(options: argparse.Namespace) -> str:
    """The other server, with its version."""
    if not options.llama_server:
        return f"transformers serve {version('transformers')}"
    said = subprocess.run(
        [options.llama_server, "--version"], check=True, capture_output=True, text=True
    )
    (line,) = re.findall(r"^version: (.*)$", said.stdout + said.stderr, re.MULTILINE)
    return f"llama-server {line}"


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"did not start: {log.read_text()[-2000:]}") from None
            time.sleep(0.5)


def cost_of_http(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s served and generated, the runs in turn."""
    served, generated = [], []
    for _ in range(options.repeat):
        with ours(options, "http") as server:
            served.append(bench(options, server.url, server.model)["output_throughput"])
        values = (
            options.model, options.dataset, options.num_prompts, options.max_tokens, WARMUP,
            options.slots, options.dtype,
        )  # fmt: skip
        command = [sys.executable, "-m", "load.generated", *map(str, values)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE)
        found = json.loads(done.stdout)
        generated.append(found["tokens"] / found["seconds"])
    ratio = statistics.median(served) / statistics.median(generated)
    return {"served": served, "generated": generated, "ratio": ratio}


def table(options: argparse.Namespace, result: dict[str, Any]) -> str:
    """The record, in Markdown; a ratio above 1 is in our favour."""
    http = result["http"]
    lines = [
        f"# `compress serve` beside {result['peer']}",
        "",
        f"{result['model']} in {options.dtype}, {options.threads} threads, "
        f"{options.num_prompts} prompts of {Path(options.dataset).name}, up to "
        f"{options.max_tokens} new tokens, greedy, streamed, continuous batching in both. "
        "Ours / theirs = ratio, above 1 where ours is better.",
        "",
        "| clients | " + " | ".join(MEASURES) + " | failed |",
        "|---" * (2 + len(MEASURES)) + "|",
    ]
    for row in result["rows"]:
        cells = [str(row["clients"])]
        for key, more_is_better in MEASURES.values():
            one, other = row["ours"][key], row["theirs"][key]
            above, below = (one, other) if more_is_better else (other, one)
            ratio = f"{above / below:.2f}" if below else "-"
            cells.append(f"{one:,.1f} / {other:,.1f} = **{ratio}**")
        cells.append(f"{row['ours']['failed']} / {row['theirs']['failed']}")
        lines.append(f"| {' | '.join(cells)} |")
    rates = {
        name: f"{statistics.median(http[name]):,.1f} ({max(http[name]):,.1f})"
        for name in ("served", "generated")
    }
    lines += [
        "",
        f"All {options.num_prompts} at once, median of {options.repeat} runs in turn (best in "
        f"brackets): {rates['served']} new tokens/s over HTTP, client and server on one machine; "
        f"{rates['generated']} by `LLM.generate`. Ratio **{http['ratio']:.2f}**.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
