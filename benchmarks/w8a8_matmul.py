"""Linear layers that round their inputs on a CPU, beside bfloat16, as a table in Markdown.

    python benchmarks/w8a8_matmul.py                      # writes benchmarks/results/w8a8-cpu.md

One linear layer after another, of the shapes of Llama-3-8B (4096 x 4096) and SmolLM2-135M
(1536 x 576), on M tokens: ours in int8, int8 with stored outlier columns and a threshold (LLM.int8:
half a percent of the columns stored, and of the inputs one in a thousand found), fp8, and bfloat16;
PyTorch's `F.linear` in bfloat16.  All are timed in turn, and the table has medians of their ratios,
so that drift of the machine hits all alike.  Weights are taken in turn from copies that no cache
holds.  Nothing is written if a product is off by more than float32's rounding.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.lowbit_matmul.weight import InputRounding
from compress.kernels.program import Recorder
from compress.kernels.w8a8_matmul import reference
from compress.runtime.batch import Batch

SHAPES = ((4096, 4096), (1536, 576))  # rows and columns of W
TOKENS = (1, 16, 256, 4096)
THRESHOLD = 6.0
FOUND_SHARE, STORED_SHARE = 1e-3, 5e-3
CACHE_BYTES = 64 << 20  # more than any cache here
BOUND = 1e-5  # of y, in float32: sums in another order
BASE, PEER = "bfloat16", "torch bfloat16"


def main() -> None:
    options = parse()
    rows = [
        row
        for shape in SHAPES
        for tokens in options.tokens
        for row in measure(*shape, tokens, options.seconds)
    ]
    text = table(rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(__file__).parent / "results" / "w8a8-cpu.md"
    parser.add_argument("--out", type=Path, default=default,
                        help="the table [default: benchmarks/results/w8a8-cpu.md]")  # fmt: skip
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")],
                        default=list(TOKENS), help="[default: 1,16,256,4096]")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=30,
                        help="for each W and M, all ways together [default: 30]")  # fmt: skip
    return parser.parse_args()


def weights_of(rows: int, columns: int) -> dict[str, LinearWeight]:
    """One random weight in each form."""
    generator = torch.Generator().manual_seed(rows + columns)
    dense = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
    largest = dense.abs().amax(dim=1, keepdim=True)
    whole = (dense / largest * 127).round().to(torch.int8)
    floats = (dense / largest * 448).to(torch.float8_e4m3fn)
    stored = max(1, round(STORED_SHARE * columns))
    index = torch.randperm(columns, generator=generator)[:stored].sort().values
    outliers = InputRounding("int8", 127.0, index, dense[:, index].bfloat16(), THRESHOLD)

    def of(codes: Tensor, unit: float, inputs: InputRounding) -> LinearWeight:
        return LinearWeight(None, codes, largest / unit, None, columns, 8, None, inputs)

    return {
        BASE: LinearWeight.of_dense(dense.bfloat16()),
        "int8": of(whole, 127, InputRounding("int8", 127.0)),
        "int8 with outliers": of(whole, 127, outliers),
        "fp8": of(floats, 448, InputRounding("fp8", 448.0)),
    }


def measure(rows: int, columns: int, tokens: int, seconds: float) -> list[dict[str, object]]:
    """A line for each way: median seconds, and of the ratios to both bfloat16s."""
    x = inputs_of(tokens, columns)
    calls, sizes = {}, {}
    for name, weight in weights_of(rows, columns).items():
        calls[name], sizes[name] = ours(weight, x)
    dense = weights_of(rows, columns)[BASE].dense
    assert dense is not None
    copies = [dense.clone() for _ in range(copies_of(dense.nbytes))]
    calls[PEER] = in_turn([partial(F.linear, x, copy) for copy in copies])
    sizes[PEER] = dense.nbytes
    times = timed(calls, seconds)
    return [
        {
            "shape": f"{rows} x {columns}",
            "tokens": tokens,
            "name": name,
            "seconds": statistics.median(taken),
            "bytes": sizes[name],
            "operations": 2 * rows * columns * tokens,
            "to_ours": statistics.median(a / b for a, b in zip(times[BASE], taken, strict=True)),
            "to_torch": statistics.median(a / b for a, b in zip(times[PEER], taken, strict=True)),
        }
        for name, taken in times.items()
    ]


def inputs_of(tokens: int, columns: int) -> Tensor:
    """bfloat16 [tokens, columns], of which FOUND_SHARE exceed the threshold."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).clamp(-5, 5)
    x[torch.rand(tokens, columns, generator=generator) < FOUND_SHARE] = 20.0
    return x.bfloat16()


def ours(weight: LinearWeight, x: Tensor) -> tuple[Callable[[], object], int]:
    """A call that computes x Wᵀ by the recorded program, and the bytes of W that it reads."""
    tokens = len(x)
    batch = Batch(
        tokens=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.arange(tokens),
        slots=torch.arange(tokens)[None],
        starts=torch.tensor([0, tokens], dtype=torch.int32),
        contexts=torch.tensor([tokens], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, 1, dtype=torch.int32),
        rows=torch.arange(0),
    )
    size = Recorder(torch.bfloat16, 1, 1).pack(weight).bytes
    calls, results = [], []
    for _ in range(copies_of(size)):
        recorder = Recorder(torch.bfloat16, tokens, 1)
        results.append(recorder.linear("y", x, recorder.pack(weight)))
        calls.append(partial(recorder.run, batch))
    calls[-1]()
    check(results[-1][:4], x[:4], weight)
    return in_turn(calls), size


def check(found: Tensor, x: Tensor, weight: LinearWeight) -> None:
    """ArithmeticError where a product is wrong."""
    expected = (
        reference.linear(x, weight)
        if weight.inputs
        else x.double() @ weight.dequantize(torch.float64).mT
    )
    error = float((found.double() - expected).norm() / expected.norm())
    if not error < BOUND:
        raise ArithmeticError(f"a product is off by {error:.2g} of the result")


def copies_of(size: int) -> int:
    """How many weights of `size` bytes are taken in turn, so that none is in a cache."""
    return min(16, -(-CACHE_BYTES // size))


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """A call of the next of `calls`."""
    place = iter(range(1 << 62))
    return lambda: calls[next(place) % len(calls)]()


def timed(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, round by round: at least 5 rounds."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times[BASE]) < 5:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return times


def table(rows: list[dict[str, object]]) -> str:
    """Markdown."""
    threads = torch.get_num_threads()
    lines = [
        "# Linear layers that round their inputs, on a CPU",
        "",
        f"`python benchmarks/w8a8_matmul.py` on {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} processors, {threads} threads, PyTorch {torch.__version__}. Medians; "
        "the ratios are those of speeds, of calls in turn: above 1 is faster than bfloat16.",
        "",
        "| W | M | way | ms | GB/s of W | GFLOP/s | times our bfloat16 | times torch's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = float(row["seconds"])  # pyright: ignore[reportArgumentType]
        moved, operations = row["bytes"], row["operations"]
        lines.append(
            f"| {row['shape']} | {row['tokens']} | {row['name']} | {1e3 * seconds:.3f} | "
            f"{moved / seconds / 1e9:.1f} | {operations / seconds / 1e9:.0f} | "  # pyright: ignore[reportOperatorIssue]
            f"{row['to_ours']:.2f} | {row['to_torch']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
