"""`compress generate`: continue a prompt."""

import click

from compress.cli.output import print_json


@click.command("generate")
@click.argument("model")
@click.option("--prompt", required=True, help="Text to continue, or to answer with --chat.")
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="0 is greedy.",
)
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def generate_command(
    model: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    chat: bool,
    seed: int,
    dtype: str,
    as_json: bool,
) -> None:
    """Continue a prompt with MODEL, through transformers.

    \b
    Examples:
      compress generate smollm2-w4 --prompt "The capital of France is"
      compress generate smollm2-w4 --chat --prompt "Why is the sky blue?" --temperature 0.7
    """
    from compress.core.source import resolve_model
    from compress.generate import generate_text

    result = generate_text(resolve_model(model), prompt, max_tokens, temperature, chat, seed, dtype)
    if as_json:
        print_json(result)
        return
    click.echo(result["text"] if chat else prompt + result["text"])
    click.echo(
        f"{result['tokens']} tokens in {result['seconds']} s "
        f"({result['tokens_per_second']} tokens/s)",
        err=True,
    )
