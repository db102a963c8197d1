"""`compress generate`: continue a prompt, or answer a file of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.output import print_json, print_pairs
from compress.cli.runtime_options import (
    JSON,
    MODEL,
    ModelChoice,
    add_options,
    sampling,
    sampling_params,
)
from compress.core.progress import say

if TYPE_CHECKING:
    from compress.runtime.sampling_params import SamplingParams

ONLY_WITH_INPUT = ("out", "overwrite", "restart", "in_flight")


@click.command("generate")
@click.argument("model")
@click.option("--prompt", help="Text to continue, or to answer with --chat.")
@click.option(
    "--input",
    "input_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='File with a JSON object a line: {"prompt": TEXT} or {"messages": [...]}, and if wanted '
    '"id" and settings of its own ("max_tokens", "temperature", ...).',
)
@click.option("--out", type=click.Path(path_type=Path), help="File for the answers to --input.")
@click.option("--chat", is_flag=True, help="Put prompts through the model's chat template.")
@add_options(sampling(max_tokens=64, temperature=0.0))
@click.option("--n", type=click.IntRange(min=1), help="Answers to draw for a prompt.  [default: 1]")
@add_options(MODEL)
@click.option(
    "--in-flight",
    type=click.IntRange(1, 512),
    help="Lines of --input that are answered at once.  [default: 64]",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing --out.")
@click.option("--restart", is_flag=True, help="Drop a broken-off run instead of going on with it.")
@add_options([JSON])
@click.pass_context
def generate_command(
    context: click.Context,
    model: str,
    prompt: str | None,
    input_file: Path | None,
    chat: bool,
    seed: int,
    dtype: str,
    head_bits: str | None,
    kv_cache_memory: int | None,
    kv_cache_dtype: str,
    draft: str,
    num_speculative_tokens: int | str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a prompt with MODEL, or answer a file of prompts.

    Text comes as it is written.  Answers to --input stand in its order; a run that was killed goes
    on when the same command is given again, and gives the same bytes.

    \b
    Examples:
      compress generate smollm2-w4 --prompt "The capital of France is"
      compress generate smollm2-w4 --chat --prompt "Why is the sky blue?" --temperature 0.7
      compress generate smollm2-w4 --input prompts.jsonl --out answers.jsonl
      compress generate smollm2-w4 --chat --prompt "$(cat letter.txt)" --draft ngram
    """
    bulk_options = {name: options.pop(name) for name in ONLY_WITH_INPUT}
    choice = ModelChoice(
        model, dtype, head_bits, kv_cache_memory, draft, num_speculative_tokens, kv_cache_dtype
    )
    if (prompt is None) == (input_file is None):
        raise click.UsageError("give --prompt TEXT or --input FILE, one of the two")
    if input_file is not None:
        if bulk_options["out"] is None:
            raise click.UsageError("--input needs --out FILE, for the answers")
        _answer_file(
            choice, input_file, sampling_params(**options), seed, chat, as_json, **bulk_options
        )
        return
    if given := [name for name in ONLY_WITH_INPUT if bulk_options[name]]:
        raise click.UsageError(f"--{given[0].replace('_', '-')} goes with --input FILE only")
    assert prompt is not None
    _answer_prompt(choice, prompt, sampling_params(seed=seed, **options), chat, as_json)


def _answer_prompt(
    choice: ModelChoice, prompt: str, params: SamplingParams, chat: bool, as_json: bool
) -> None:
    from compress.generate import answer, as_record, prompt_tokens, speculation

    with choice.load(max_sequences=params.n) as llm:  # a cache of no more than it can use
        tokens = prompt_tokens(llm, [{"role": "user", "content": prompt}] if chat else prompt)
        llm.engine.prepare("check", tokens, params)  # refuses before anything is printed
        start = "" if chat else prompt
        streams = not as_json and params.n == 1
        if streams:
            click.echo(start, nl=False)
        done = answer(llm, tokens, params, partial(click.echo, nl=False) if streams else None)
        drafted = speculation(llm.statistics()) if llm.draft else None
    if as_json:
        record = as_record(done.prompt_tokens, done.outputs) | done.timing
        more = {"speculation": drafted} if drafted else {}
        print_json({"model": choice.model, "prompt": prompt} | record | more)
        return
    if streams:
        click.echo()
    else:
        for number, output in enumerate(done.outputs, 1):
            click.echo(f"[{number}] {start}{output.text}")
    say(
        f"{done.tokens} tokens in {done.seconds:.2f} s, the first after {done.first:.2f} s "
        f"({done.tokens / done.seconds:.1f} tokens/s), prompt of {done.prompt_tokens} tokens"
    )
    if drafted:
        say(_drafted_words(drafted))


def _answer_file(
    choice: ModelChoice,
    input_file: Path,
    params: SamplingParams,
    seed: int,
    chat: bool,
    as_json: bool,
    out: Path,
    overwrite: bool,
    restart: bool,
    in_flight: int | None,
) -> None:
    from compress.answer_file import AnswerFile
    from compress.bulk import Bulk, answer_lines, identity_of
    from compress.core.source import resolve_model
    from compress.generate import speculation

    bulk = Bulk(input_file, params, seed, chat)
    output = AnswerFile(out, overwrite)
    output.check()
    for _ in bulk.lines():  # whatever is wrong with a line is said before the model is loaded
        pass
    folder = resolve_model(choice.model).folder
    at_once = in_flight or 64
    with choice.load(max_sequences=at_once) as llm:
        identity = identity_of(llm, folder, bulk, choice.settings)
        result = answer_lines(llm, bulk, output, identity, at_once, restart)
        if llm.draft:
            result["speculation"] = speculation(llm.statistics())
    if as_json:
        print_json(result)
        return
    rows = {
        "output": result["out"],
        "answers": f"{result['answers']:,}, of which {result['answers_before']:,} from before",
        "time": f"{result['seconds']:.1f} s, {result['tokens']:,} new tokens, "
        f"{result['tokens_per_second']:.1f} tokens/s",
    }
    if "speculation" in result:
        rows["drafts"] = _drafted_words(result["speculation"])
    if result["errors"]:
        rows["errors"] = f"{result['errors']:,} answers have an 'error'"
    print_pairs("Answers", rows)


def _drafted_words(found: dict[str, Any]) -> str:
    if not found["drafts"]:
        return "no tokens were drafted"
    return (
        f"{found['drafted_tokens']:,} tokens drafted, {found['accepted_tokens']:,} accepted "
        f"({found['acceptance_rate']:.0%}), mean accepted length "
        f"{found['mean_accepted_length']:.2f}"
    )
