"""`compress bench`: how fast the runtime serves a model here, and beside what others would use."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from compress.cli.bench_serve import serve_command
from compress.cli.bench_speculative import speculative_command
from compress.cli.output import print_json, print_pairs
from compress.cli.runtime_options import (
    DTYPE,
    HEAD_BITS,
    JSON,
    KV_CACHE_DTYPE,
    ModelChoice,
    add_options,
)
from compress.core.resources import in_words

COUNT = click.IntRange(min=1)
PEERS = ["hf", "llama-cpp"]


class Batches(click.ParamType):
    """Batch sizes with commas between, from small to large."""

    name = "sizes"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        sizes = [size.strip() for size in value.split(",")]
        if not all(size.isdecimal() and int(size) for size in sizes):
            self.fail(f"'{value}' is no list of batch sizes; give numbers such as 1,4,16")
        return sorted({int(size) for size in sizes})


def shared(repeat: int) -> list[Any]:
    """Options of both measurements."""
    return [
        click.option("--prompt-tokens", default=512, show_default=True, type=COUNT),
        click.option("--new-tokens", default=128, show_default=True, type=click.IntRange(min=2)),
        DTYPE,
        HEAD_BITS,
        KV_CACHE_DTYPE,
        click.option("--threads", type=COUNT, help="CPU threads.  [default: PyTorch's]"),
        click.option("--repeat", default=repeat, show_default=True, type=COUNT),
    ]


@click.group("bench")
def bench_command() -> None:
    """Measure how fast the runtime serves a model on this machine, or a server answers.

    \b
    Examples:
      compress bench latency smollm2 --prompt-tokens 512 --new-tokens 128
      compress bench latency smollm2 --compare llama-cpp --gguf smollm2.gguf --json
      compress bench throughput smollm2 --batch 1,4,16
      compress bench speculative smollm2 --draft ngram --dataset spec_bench_question.jsonl
      compress bench serve --url http://127.0.0.1:8000 --dataset random:256,64
    """


bench_command.add_command(serve_command)
bench_command.add_command(speculative_command)


@bench_command.command("latency")
@click.argument("model")
@add_options(shared(repeat=3))
@click.option(
    "--batch", default=1, show_default=True, type=COUNT, help="Requests answered together."
)
@click.option(
    "--compare",
    type=click.Choice(PEERS),
    help="Measure this too, in turn with ours: transformers on the same folder, or llama.cpp.",
)
@click.option(
    "--gguf",
    type=click.Path(path_type=Path),
    help="llama.cpp's model.  [default: MODEL's own file]",
)
@click.option(
    "--peer-python", help="Python interpreter that has llama-cpp-python.  [default: this one]"
)
@add_options([JSON])
def latency_command(
    model: str,
    prompt_tokens: int,
    new_tokens: int,
    dtype: str,
    head_bits: str | None,
    kv_cache_dtype: str,
    threads: int | None,
    repeat: int,
    batch: int,
    compare: str | None,
    gguf: Path | None,
    peer_python: str | None,
    as_json: bool,
) -> None:
    """Time one batch: to the first token, between tokens, and what that reads of memory.

    Prompts are random token ids.  Prefill and decode are timed apart, after a warm-up; a peer runs
    in turn with ours, never beside it.

    \b
    Examples:
      compress bench latency smollm2 --threads 2 --repeat 5
      compress bench latency smollm2 --compare hf --dtype float32
      compress bench latency smollm2 --prompt-tokens 8000 --kv-cache-dtype int8
      compress bench latency smollm2-w4 --head-bits 8 --compare llama-cpp --gguf q4_0.gguf
    """
    if compare != "llama-cpp" and (gguf or peer_python):
        raise click.UsageError("--gguf and --peer-python go with --compare llama-cpp")
    if compare and batch > 1:
        raise click.UsageError(f"--compare {compare} measures one request; leave out --batch")
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        from compress.bench.latency import Shape, check, measure_latency
        from compress.bench.peers import llama_cpp_peer, transformers_peer
        from compress.bench.subject import Subject

        choice = ModelChoice(model, dtype, head_bits)
        subject = Subject(model, dtype, choice.lm_head_bits, threads, kv_cache_dtype=kv_cache_dtype)
        shape = Shape(prompt_tokens, new_tokens, batch)
        check(subject, shape)
        peer = None
        if compare == "hf":
            peer = stack.enter_context(transformers_peer(subject, prompt_tokens, new_tokens))
        elif compare:
            peer = stack.enter_context(
                llama_cpp_peer(subject, gguf, peer_python, prompt_tokens, new_tokens)
            )
        report = measure_latency(subject, shape, repeat, peer)
    print_json(report) if as_json else print_latency(report)


@bench_command.command("throughput")
@click.argument("model")
@add_options(shared(repeat=1))
@click.option(
    "--batch",
    "batches",
    default="1,4,16,32",
    show_default=True,
    type=Batches(),
    help="Batch sizes; the largest is the number of slots for the requests.",
)
@click.option("--requests", type=COUNT, help="How many to replay.  [default: twice the slots]")
@click.option(
    "--lengths",
    type=click.Choice(["fixed", "uniform"]),
    help="Of the requests: as given, or drawn around that.  [default: uniform]",
)
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Requests to replay instead, a line each: {"prompt_tokens": N, "new_tokens": N, '
    '"arrival_s": SECONDS}.',
)
@add_options([JSON])
def throughput_command(
    model: str,
    prompt_tokens: int,
    new_tokens: int,
    dtype: str,
    head_bits: str | None,
    kv_cache_dtype: str,
    threads: int | None,
    repeat: int,
    batches: list[int],
    requests: int | None,
    lengths: str | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Time many requests: by batch size, then as a stream of them with lengths of their own.

    The stream runs with static and with continuous batching, and on it the memory that a contiguous
    cache would reserve is compared with the blocks of ours.

    \b
    Examples:
      compress bench throughput smollm2 --batch 1,16 --requests 32
      compress bench throughput smollm2 --trace requests.jsonl --json
    """
    if trace and (requests or lengths):
        raise click.UsageError("--trace says how many requests there are, and how long they are")
    with contextlib.redirect_stdout(sys.stderr):
        from compress.bench import workload
        from compress.bench.latency import Shape
        from compress.bench.subject import Subject
        from compress.bench.throughput import measure_throughput

        if trace:
            work = workload.read_trace(trace)
        else:
            make = workload.fixed if lengths == "fixed" else workload.uniform
            work = make(requests or 2 * max(batches), prompt_tokens, new_tokens)
        choice = ModelChoice(model, dtype, head_bits)
        subject = Subject(model, dtype, choice.lm_head_bits, threads, kv_cache_dtype=kv_cache_dtype)
        shape = Shape(prompt_tokens, new_tokens)
        report = measure_throughput(subject, shape, batches, work, repeat)
    print_json(report) if as_json else print_throughput(report)


def print_latency(report: dict[str, Any]) -> None:
    """Print what `measure_latency` returned."""
    speeds = Table(title=_title(report), title_justify="left")
    peer = report.get("peer")
    speeds.add_column("median of the runs (best)")
    for name in ("ours", *([peer["version"], "ratio"] if peer else [])):
        speeds.add_column(name, justify="right")
    for part in ("decode", "prefill"):
        key = f"{part}_tokens_per_s"
        cells = [
            f"{side[key]:,.1f} ({side[key + '_best']:,.1f})" for side in (report, peer) if side
        ]
        if peer:
            cells.append(f"{report[part + '_ratio']:.2f} ({report[part + '_ratio_best']:.2f})")
        speeds.add_row(f"{part}, tokens/s", *cells)
    times = [side for side in (report, peer) if side]
    speeds.add_row(
        "first token, ms", *[f"{1000 * side['time_to_first_token_s']:.1f}" for side in times]
    )
    for name in ("median", "p90", "p99"):
        cells = [f"{side['inter_token_ms'][name]:.2f}" for side in times]
        speeds.add_row(f"between tokens, {name}, ms", *cells)
    Console(highlight=False).print(speeds)
    rows = {
        "keys and values": f"{report['kv_cache_dtype']}, "
        f"{report['kv_bytes_per_token']:,} bytes a token",
        "a decode step reads": f"{in_words(report['bytes_per_step'])}, of which keys and values "
        f"{in_words(report['kv_bytes_per_step'])}: {_rate(report['bytes_per_s'])}",
        "this machine's memory": f"reads {_rate(report['read_bytes_per_s'])} in pieces of that "
        f"size ({report['share_of_read']:.0%} reached; all of it would be "
        f"{report['roofline_tokens_per_s']:,.1f} tokens/s), copies "
        f"{_rate(report['copy_bytes_per_s'])} in large ones, read and written",
        "loading": f"{report['load_seconds']:.1f} s",
        "memory": in_words(report["memory_bytes"]),
    }
    if peer:
        rows["weights of the peer"] = f"{peer['weights']} ({peer['model']})"
    print_pairs("", rows)


def print_throughput(report: dict[str, Any]) -> None:
    """Print what `measure_throughput` returned."""
    console = Console(highlight=False)
    by_batch = Table(title=_title(report), title_justify="left")
    for name in ("batch", "decode, tokens/s", "speed-up", "with prompts, tokens/s", "speed-up"):
        by_batch.add_column(name, justify="right")
    for row in report["batches"]:
        by_batch.add_row(
            str(row["batch"]),
            f"{row['decode_tokens_per_s']:,.1f}",
            f"{row['decode_speed_up']:.2f}",
            f"{row['tokens_per_s']:,.1f}",
            f"{row['speed_up']:.2f}",
        )
    console.print(by_batch)
    title = f"{report['requests']} requests, {report['lengths']}; {report['slots']} slots"
    batching = Table(title=title, title_justify="left")
    batching.add_column("batching")
    for name in ("tokens/s", "latency, mean", "p99", "steps", "slots busy"):
        batching.add_column(name, justify="right")
    for policy, found in report["batching"].items():
        batching.add_row(
            policy,
            f"{found['tokens_per_s']:,.1f}",
            f"{found['latency_mean_s']:.2f} s",
            f"{found['latency_p99_s']:.2f} s",
            str(found["steps"]),
            f"{found['slot_occupancy']:.0%}",
        )
    console.print(batching)
    memory = Table(title="Key-value memory of the same requests", title_justify="left")
    memory.add_column("reserved")
    for name in ("holds no token", "memory, of paged"):
        memory.add_column(name, justify="right")
    for policy, found in report["memory"].items():
        memory.add_row(policy, f"{found['waste']:.1%}", f"{found['of_paged']:.2f}")
    console.print(memory)


def _title(report: dict[str, Any]) -> str:
    head = f", head {report['head_bits']} bits" if report["head_bits"] else ""
    batch = f", batch {report['batch']}" if "batch" in report else ""
    return (
        f"{report['model']}, {report['dtype']}{head}, {report['device']}, {report['threads']} "
        f"threads, {report['prompt_tokens']} + {report['new_tokens']} tokens{batch}, "
        f"{report['prompts']}"
    )


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"
