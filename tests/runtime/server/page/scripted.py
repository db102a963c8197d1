"""A model that answers by a script, so that tests know each character, and a tokenizer of bytes."""

import threading
import time

import numpy as np
import torch

from compress.runtime.cache_layout import CacheLayout

USER, ANSWER, END, SYSTEM = range(256, 260)
VOCAB = 260


class Bytes:
    """A tokenizer of one token a byte; the last four have no text."""

    chat_template = "yes"
    eos_token_id = END
    bos_token_id = None
    all_special_ids = (USER, ANSWER, END, SYSTEM)

    def __call__(self, text, **_):
        ids = []
        for character in text:
            special = ord(character) - 0xE000
            ids += [special] if special in self.all_special_ids else character.encode()
        return {"input_ids": ids}

    def decode(self, tokens, **_):
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def convert_ids_to_tokens(self, tokens):
        return [f"<{token}>" for token in tokens]

    def get_added_vocab(self):
        return {f"<{token}>": token for token in self.all_special_ids}

    def apply_chat_template(self, messages, **_):
        user, answer, end, system = (chr(0xE000 + token) for token in self.all_special_ids)
        marks = {"user": user, "assistant": answer, "system": system}
        return "".join(f"{marks[m['role']]}{m['content']}{end}" for m in messages) + answer


class ScriptedModel:
    """Answers the last question by `answers`, or repeats it, whatever else the prompt holds.

    It takes `delay` seconds a step.  After `hold_at` tokens of an answer it waits for `release`.
    An answer that holds a zero byte breaks the engine's step there.
    """

    vocab_size = VOCAB
    max_context = 4096
    block_size = 16
    layout = CacheLayout.of([None], 16)
    bytes_per_block = 16

    def __init__(self):
        self.answers = {}
        self.delay = 0.0
        self.hold_at = None
        self.release = threading.Event()

    def allocate(self, num_blocks):
        self.cache = np.full((num_blocks, self.block_size), -1)

    def copy_blocks(self, pairs):
        for source, target in pairs:
            self.cache[target] = self.cache[source]

    def forward(self, batch):
        time.sleep(self.delay)
        self.cache.reshape(-1)[batch.slots[0].numpy()] = batch.tokens.numpy()
        wanted, rows = set(batch.rows.tolist()), []
        for place, context in enumerate(batch.contexts.tolist()):
            table = batch.block_tables[0, place].numpy()
            read = self.cache[table].reshape(-1)[:context].tolist()
            for row in range(batch.starts[place], batch.starts[place + 1]):
                if row in wanted:
                    rows.append(self._next(read[: int(batch.positions[row]) + 1]))
        logits = torch.full((len(rows), VOCAB), -100.0)
        logits[range(len(rows)), rows] = 0
        return logits

    def _next(self, tokens):
        if ANSWER not in tokens:  # what an engine asks itself after a fault
            return END
        answer = len(tokens) - tokens[::-1].index(ANSWER)
        question = answer - tokens[:answer][::-1].index(USER)
        asked = bytes(t for t in tokens[question:answer] if t < 256).decode()
        text = self.answers.get(asked, asked).encode()
        written = len(tokens) - answer
        if written == self.hold_at:
            self.release.wait(20)
        if written == len(text):
            return END
        if not text[written]:
            raise RuntimeError("the model broke")
        return text[written]
