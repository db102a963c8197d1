"""The command line: `compress COMMAND`.  One module a command; heavy imports wait for the run."""

import importlib
import os
import time
from typing import Any

import click

from compress.core.errors import InputError
from compress.core.progress import IS_FIRST, say

# Seconds: of several processes the first to end makes `accelerate launch` end the others, and all
# of them fail on bad input, so the others leave it to the first to say why.
PATIENCE = 30

# command -> (module, attribute); loaded when used, so that --help and errors come at once
COMMANDS = {
    "quantize": ("compress.cli.quantize", "quantize_command"),
    "prune": ("compress.cli.prune", "prune_command"),
    "convert": ("compress.cli.convert", "convert_command"),
    "distill": ("compress.cli.distill", "distill_command"),
    "run": ("compress.cli.run", "run_command"),
    "export": ("compress.cli.export", "export_command"),
    "eval": ("compress.cli.eval", "eval_command"),
    "compare": ("compress.cli.compare", "compare_command"),
    "generate": ("compress.cli.generate", "generate_command"),
    "chat": ("compress.cli.chat", "chat_command"),
    "serve": ("compress.cli.serve", "serve_command"),
    "bench": ("compress.cli.bench", "bench_command"),
    "plan": ("compress.cli.plan", "plan_command"),
    "inspect": ("compress.cli.inspect", "inspect_command"),
    "doctor": ("compress.cli.doctor", "doctor_command"),
}


class CommandGroup(click.Group):
    """A group whose commands load on use, and where the user's errors are one line and exit 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        return getattr(importlib.import_module(module), attribute)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (InputError, click.UsageError) as error:
            text = error.format_message() if isinstance(error, click.UsageError) else str(error)
            if not IS_FIRST:
                time.sleep(PATIENCE)
            click.echo(f"Error: {' '.join(text.split())}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            say("Interrupted")
            ctx.exit(130)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="compress-llm", prog_name="compress")
def main() -> None:
    """Make language models small and fast, and know what it cost.

    \b
    Examples:
      compress quantize smollm2 --method awq --bits 4 --out smollm2-w4
      compress eval smollm2-w4 --text wiki.txt --against smollm2
      compress generate smollm2-w4 --prompt "The capital of France is"
    """
    # Results go to standard output and everything else to standard error; the libraries' own
    # progress bars would only repeat ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
