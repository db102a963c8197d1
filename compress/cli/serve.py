"""`compress serve`: a model behind OpenAI's API."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from compress.cli.options import Size
from compress.cli.runtime_options import JSON, MODEL, ModelChoice, add_options
from compress.core.progress import say

if TYPE_CHECKING:
    from compress.runtime.llm import LLM
    from compress.runtime.server.service import ServerSettings, Service

COUNT = click.IntRange(min=1)


@click.command("serve")
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 picks one."
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="COMPRESS_API_KEY",
    help="Key that requests must bring; may be repeated.  Other users of this machine can read a "
    "command line: better set COMPRESS_API_KEY, with spaces between several.",
)
@click.option(
    "--served-model-name",
    "names",
    multiple=True,
    help="Name of the model in requests; may be repeated.  [default: MODEL]",
)
@click.option(
    "--max-queued-requests",
    default=256,
    show_default=True,
    type=click.IntRange(min=0),
    help="Requests that may wait, beyond those in the batch; the next gets status 429.",
)
@click.option(
    "--max-sequences", default=64, show_default=True, type=COUNT, help="Most sequences in a batch."
)
@click.option(
    "--max-tokens-per-step", type=COUNT, help="Most tokens in a batch.  [default: 512 on a CPU]"
)
@add_options(MODEL)
@click.option(
    "--replicas",
    default=1,
    show_default=True,
    type=COUNT,
    help="Engines, each in a process of its own with these settings; Ray Serve keeps them.  "
    "Requests that begin alike go to the same one.",
)
@click.option("--metrics/--no-metrics", default=True, show_default=True, help="Serve GET /metrics.")
@click.option(
    "--max-body-size", default="4MiB", show_default=True, type=Size(), help="Of a request."
)
@click.option(
    "--drain-seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0, 86400),
    help="What running requests get to finish after SIGTERM or Ctrl-C.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="Host name that requests may ask for; may be repeated.  "
    "[default: localhost where --host is, else any]",
)
@add_options([JSON])
def serve_command(
    model: str,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    names: tuple[str, ...],
    max_queued_requests: int,
    max_sequences: int,
    max_tokens_per_step: int | None,
    dtype: str,
    head_bits: str | None,
    kv_cache_memory: int | None,
    kv_cache_dtype: str,
    draft: str,
    num_speculative_tokens: int | str | None,
    replicas: int,
    metrics: bool,
    max_body_size: int,
    drain_seconds: float,
    allowed_hosts: tuple[str, ...],
    as_json: bool,
) -> None:
    """Serve MODEL over HTTP, as OpenAI's API: completions, chat, models, and a page at /.

    /ready turns green once the model is loaded.  SIGTERM or Ctrl-C lets running requests finish.
    With --json, one JSON object on standard output says when it is ready, and where.

    \b
    Examples:
      compress serve smollm2-w4
      compress serve smollm2-w4 --port 0 --max-queued-requests 64 --json
      compress serve smollm2-w4 --replicas 2
      compress serve smollm2-w4 --draft ngram
      compress serve smollm2-w4 --kv-cache-dtype int8
      COMPRESS_API_KEY=secret compress serve smollm2-w4 --host 0.0.0.0
    """
    from compress.runtime.server.listener import LOCAL_HOSTS, bind, is_local, url_of

    if "" in (*api_keys, *names):
        raise click.UsageError("--api-key and --served-model-name take no empty text")
    choice = ModelChoice(
        model, dtype, head_bits, kv_cache_memory, draft, num_speculative_tokens, kv_cache_dtype
    )
    listener = bind(host, port)
    url = url_of(listener)
    from compress.runtime.server.process import run
    from compress.runtime.server.service import ServerSettings, Service

    hosts = allowed_hosts or None
    if is_local(listener):
        hosts = (*LOCAL_HOSTS, *allowed_hosts)
    elif not api_keys:
        say(f"Warning: whoever reaches {url} can use it; set COMPRESS_API_KEY, or --host 127.0.0.1")
    settings = ServerSettings(
        model_names=names or (model,),
        api_keys=api_keys,
        max_body_bytes=max_body_size,
        allowed_hosts=hosts,
        metrics=metrics,
        drain_seconds=drain_seconds,
    )
    service = Service(settings)
    if replicas > 1:
        service, choice = _replicated(settings, replicas, choice)
    output = sys.stdout

    def make_llm() -> LLM:
        from compress.runtime.llm import LLM

        llm = LLM(
            choice.model,
            **choice.settings,
            max_sequences=max_sequences,
            max_tokens_per_step=max_tokens_per_step,
            max_queued_requests=max_queued_requests,
        )
        say(llm.cache_description)
        if llm.draft:
            say(f"Tokens are proposed by {llm.draft}")
        return llm

    def announce() -> None:
        say(f"Serving {settings.model_names[0]} at {url}")
        if as_json:
            ready = {"url": url, "model": settings.model_names[0], "pid": os.getpid()}
            print(json.dumps(ready), file=output, flush=True)

    with contextlib.redirect_stdout(sys.stderr), contextlib.closing(service):  # libraries print
        code = run(service, make_llm, listener, announce)
    # The engine may be in the middle of a step, which nothing waits for any more.
    sys.stderr.flush()
    os._exit(code)


def _replicated(
    settings: ServerSettings, replicas: int, choice: ModelChoice
) -> tuple[Service, ModelChoice]:
    """The service of several replicas, and the model of each, with its memory for the cache."""
    from compress.core.source import resolve_model
    from compress.core.tokenizer import load_tokenizer
    from compress.runtime.server.replicas import ReplicatedService, cache_memory_of_each
    from compress.runtime.speculation.making import choose

    service = ReplicatedService(settings, replicas)
    # A wrong name is known before Ray has started.
    source = resolve_model(choice.model)
    tokens = choice.num_speculative_tokens or "auto"
    choose(choice.settings.get("draft"), tokens, source, load_tokenizer(source.folder))
    memory = choice.kv_cache_memory or cache_memory_of_each(replicas)
    return service, replace(choice, kv_cache_memory=memory)
