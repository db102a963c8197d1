"""`compress chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import click

from compress.cli.runtime_options import MODEL, ModelChoice, add_options, sampling, sampling_params
from compress.core.progress import say

HELP = "/reset forgets the conversation, /system TEXT does too and sets the system's message, "
HELP += "/exit leaves; Ctrl-C stops an answer"


@click.command("chat")
@click.argument("model")
@click.option("--system", help="The system's message.")
@add_options(sampling(max_tokens=512, temperature=0.7))
@add_options(MODEL)
def chat_command(
    model: str,
    system: str | None,
    dtype: str,
    head_bits: str | None,
    kv_cache_memory: int | None,
    kv_cache_dtype: str,
    draft: str,
    num_speculative_tokens: int | str | None,
    **options: Any,
) -> None:
    """Talk with MODEL.

    /reset forgets the conversation, /system TEXT does too and sets the system's message, /exit or
    Ctrl-D leaves.  Ctrl-C stops an answer.  Where standard input is no terminal, each line of it
    is a turn.

    \b
    Examples:
      compress chat smollm2
      compress chat smollm2-w4 --system "Answer in one sentence." --temperature 0
    """
    from compress.chat import Conversation

    params = sampling_params(**options)
    interactive = sys.stdin.isatty()
    choice = ModelChoice(
        model, dtype, head_bits, kv_cache_memory, draft, num_speculative_tokens, kv_cache_dtype
    )
    with choice.load(max_sequences=1) as llm:
        conversation = Conversation(llm, params, system)
        if interactive:
            say(HELP)
        for line in _lines(interactive):
            if line.startswith("/"):
                if not _obey(conversation, line):
                    return
                continue
            note = conversation.say(line, partial(click.echo, nl=False), keep_going=interactive)
            click.echo()
            if note:
                say(note)


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says, without empty lines, until the end of the input."""
    while True:
        if interactive:
            try:
                line = click.prompt("", default="", show_default=False, prompt_suffix="> ")
            except click.Abort:  # Ctrl-D, or Ctrl-C where there is no answer to stop
                click.echo()
                return
        elif not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()


def _obey(conversation: Any, line: str) -> bool:
    """Carry out a command; whether the conversation goes on."""
    command, _, rest = line.partition(" ")
    if command == "/exit":
        return False
    if command == "/reset":
        conversation.reset()
        say("The conversation begins anew")
    elif command == "/system" and rest.strip():
        conversation.system = rest.strip()
        conversation.reset()
        say("The conversation begins anew, with this message of the system")
    else:
        say(f"'{line}' is no command: {HELP}")
    return True
