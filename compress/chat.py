"""A conversation with a model: its history, and answers that can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from compress.core.errors import InputError
from compress.generate import answer, prompt_tokens
from compress.runtime.llm import LLM
from compress.runtime.sampling_params import SamplingParams


class Conversation:
    """Keeps what was said; each turn finds the turns before it in the runtime's prefix cache.

    Raises InputError when the model has no chat template, or one that takes no system message.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._llm = llm
        self._params = params
        self._turns = 0  # of all conversations: a turn said again gets another answer
        self.system = system
        self.reset()
        prompt_tokens(llm, [*self.messages, {"role": "user", "content": "Hello"}])

    def reset(self) -> None:
        """Forget what was said; the system's message stays."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.messages: list[dict[str, Any]] = system

    def say(self, text: str, write: Callable[[str], None], keep_going: bool = True) -> str | None:
        """Answer `text`, which goes to `write` as it comes; return what the user should know.

        An interrupt ends the answer; what was written of it stays in the history.  A turn that
        cannot be answered, for want of context above all, is left out of the history: an
        InputError, or with `keep_going` a note.
        """
        context = self._llm.engine.model.max_context
        turn = [*self.messages, {"role": "user", "content": text}]
        written: list[str] = []

        def take(piece: str) -> None:
            written.append(piece)
            write(piece)

        note = None
        params = replace(self._params, seed=(self._params.seed or 0) + self._turns)
        self._turns += 1
        try:
            prompt = prompt_tokens(self._llm, turn)
            if len(prompt) >= context:
                raise InputError(
                    f"the conversation has {len(prompt)} tokens with this turn, and the model's "
                    f"context holds {context}; shorten the turn, or begin anew with /reset"
                )
            (output,) = answer(self._llm, prompt, params, take).outputs
        except InputError as error:
            if not keep_going:
                raise
            return f"Not answered: {error}"
        except KeyboardInterrupt:
            note = "(stopped)"
        else:
            if output.finish_reason == "length":
                note = "(cut off: --max-tokens is reached)"
                if len(prompt) + len(output.token_ids) >= context:
                    note = f"(cut off: the model's context of {context} tokens is full; /reset)"
        self.messages = [*turn, {"role": "assistant", "content": "".join(written)}]
        return note
