"""`compress bench serve`: a server under load, ours or any other with OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path
from typing import Any

import click

from compress.cli.output import print_json
from compress.cli.runtime_options import JSON, add_options
from compress.cli.serving_tables import print_serving
from compress.core.errors import InputError, reason_of
from compress.core.resources import raise_file_limit

COUNT = click.IntRange(min=1)
FILE = click.Path(dir_okay=False, path_type=Path)


class Rates(click.ParamType):
    """Requests a second with commas between; inf sends all at once."""

    name = "rates"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[float]:
        try:
            rates = [float(rate) for rate in value.split(",")]
        except ValueError:
            rates = []
        if not rates or not all(rate > 0 for rate in rates):
            self.fail(f"'{value}' is no list of rates; give numbers above 0 such as 1,2.5,inf")
        return sorted(set(rates))


class Clients(click.ParamType):
    """Numbers of clients with commas between."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        if not re.fullmatch(r"0*[1-9]\d{0,5}(,0*[1-9]\d{0,5})*", value):
            self.fail(f"'{value}' is no list of numbers of clients; give some such as 1,8,64")
        return sorted({int(number) for number in value.split(",")})


OPTIONS = [
    click.option("--url", required=True, help="The server: http://127.0.0.1:8000."),
    click.option("--model", help="Name of the model there.  [default: the first it names]"),
    click.option(
        "--endpoint",
        default="chat",
        show_default=True,
        type=click.Choice(["chat", "completions"]),
    ),
    click.option("--api-key", envvar="COMPRESS_API_KEY", help="Also: COMPRESS_API_KEY."),
    click.option(
        "--dataset",
        required=True,
        metavar="FILE|random:IN,OUT",
        help="Prompts as `compress generate` takes them, MT-bench's or ShareGPT's; or texts of IN "
        "random words, answered by OUT tokens.",
    ),
    click.option("--num-prompts", default=100, show_default=True, type=COUNT, help="Of a load."),
    click.option(
        "--request-rate",
        "rates",
        type=Rates(),
        help="Requests a second, arriving by themselves; several with commas.  [default: inf, "
        "all at once]",
    ),
    click.option(
        "--concurrency",
        "clients",
        type=Clients(),
        help="Instead: clients that each wait for an answer before they send; several with commas.",
    ),
    click.option(
        "--max-tokens",
        default=128,
        show_default=True,
        type=COUNT,
        help="Most new tokens of an answer, where the dataset does not say.",
    ),
    click.option(
        "--ignore-eos", is_flag=True, help="Go on to the most tokens, on servers that can."
    ),
    click.option(
        "--count-events",
        is_flag=True,
        help="Ask for the tokens of each event, from servers that can (continuous_usage_stats): "
        "ITL is a token's then, also where an event brings several.",
    ),
    click.option(
        "--goodput",
        metavar="NAME:MS,...",
        help="What counts as good: ttft:500,tpot:50,e2e:5000, or some of them.",
    ),
    click.option(
        "--warmup",
        default=1,
        show_default=True,
        type=click.IntRange(min=0),
        help="Requests before the first that counts.",
    ),
    click.option(
        "--timeout",
        default=600.0,
        show_default=True,
        type=click.FloatRange(min=0, min_open=True),
        help="Seconds that a request may take.",
    ),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0)),
    click.option("--out", type=FILE, help="Write a .json file with every request."),
    click.option("--plot", type=FILE, help="Write latency against load to this .png file."),
    JSON,
]


@click.command("serve")
@add_options(OPTIONS)
def serve_command(
    url: str,
    model: str | None,
    endpoint: str,
    api_key: str | None,
    dataset: str,
    num_prompts: int,
    rates: list[float] | None,
    clients: list[int] | None,
    max_tokens: int,
    ignore_eos: bool,
    count_events: bool,
    goodput: str | None,
    warmup: int,
    timeout: float,
    seed: int,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Send requests to a server and time the answers, as its users would see them.

    Any server with OpenAI's API will do. Answers are greedy and streamed; nothing is sent twice.

    \b
    Examples:
      compress bench serve --url http://127.0.0.1:8000 --dataset random:256,64
      compress bench serve --url http://127.0.0.1:8000 --dataset questions.jsonl \\
        --request-rate 1,2,4,8 --goodput ttft:500,tpot:50 --plot latency.png
    """
    if rates and clients:
        raise click.UsageError("--request-rate or --concurrency, one of the two")
    for option, path in (("--out", out), ("--plot", plot)):
        if path is not None and not path.parent.is_dir():
            raise click.UsageError(f"{option} '{path}': there is no folder '{path.parent}'")
    from compress.bench.client import Server, first_model
    from compress.bench.prompts import prompts_of
    from compress.bench.serving import Load, Objective, measure_serving
    from compress.bench.serving_plot import check_plots, write_plot

    if plot:
        check_plots()
    raise_file_limit()
    objective = Objective.parse(goodput) if goodput else Objective()
    loads = [Load(concurrency=number) for number in clients or []]
    loads = loads or [Load(request_rate=rate) for rate in rates or [math.inf]]
    prompts, distinct = prompts_of(dataset, endpoint, seed)
    base = _base(url)
    name = model or asyncio.run(first_model(base, api_key))
    server = Server(base, name, endpoint, api_key, timeout, count_events)
    settings = {"max_tokens": max_tokens, "temperature": 0}
    if ignore_eos:
        settings["ignore_eos"] = True
    limits = {key: value for key, value in vars(objective).items() if value is not None}
    report: dict[str, Any] = {
        "url": base,
        "model": name,
        "endpoint": endpoint,
        "dataset": dataset if distinct is None else Path(dataset).name,
        "prompts_repeat": distinct is not None and distinct < warmup + num_prompts * len(loads),
        "num_prompts": num_prompts,
        "max_tokens": max_tokens,
        "count_events": count_events,
        "seed": seed,
        "goodput_objective_ms": limits,
        "loads": asyncio.run(
            measure_serving(server, prompts, settings, loads, num_prompts, objective, seed, warmup)
        ),
    }
    _write(report, out)
    for load in report["loads"]:
        del load["requests"]
    if plot:
        try:
            write_plot(plot, report)
        except OSError as error:
            raise InputError(f"cannot write --plot '{plot}': {reason_of(error)}") from None
    print_json(report) if as_json else print_serving(report)


def _base(url: str) -> str:
    """The server's address without a path: with or without /v1 at its end."""
    base = url.rstrip("/").removesuffix("/v1")
    if not re.fullmatch(r"https?://[^/\s]+(/[^?#\s]*)?", base):
        raise click.UsageError(f"--url '{url}'; give an address such as http://127.0.0.1:8000")
    return base


def _write(report: dict[str, Any], out: Path | None) -> None:
    from compress.core.files import write_text

    if out is None:
        return
    try:
        write_text(out, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write --out '{out}': {reason_of(error)}") from None
