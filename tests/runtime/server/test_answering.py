"""What long work is bounded by, before any request reaches the engine."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from compress.runtime.grammar import Grammar
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.server import answering
from compress.runtime.server.errors import ApiError


class Grammars:
    """Compiles nothing, and only once it may."""

    def __init__(self):
        self.compiled = []
        self.go_on = threading.Event()

    def knows(self, grammar):
        return grammar in self.compiled

    def compile(self, grammar):
        self.go_on.wait(10)
        self.compiled.append(grammar)


def test_only_so_many_new_grammars_wait_and_equal_ones_count_once():
    grammars = Grammars()
    llm = SimpleNamespace(engine=SimpleNamespace(grammars=grammars))

    def learn(number):
        grammar = Grammar("json_schema", f'{{"const": {number}}}')
        return asyncio.ensure_future(answering.learn_grammar(llm, SamplingParams(grammar=grammar)))

    async def run():
        several = [learn(number % answering.MOST_UNDER_WAY) for number in range(100)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await learn(-1)
        several[0].cancel()  # who leaves takes nothing from those that want the same
        grammars.go_on.set()
        results = await asyncio.gather(*several, return_exceptions=True)
        await learn(-1)
        return refused.value, results

    error, (left, *others) = asyncio.run(run())
    assert (error.status, error.code) == (429, "queue_full")
    assert int(error.headers["Retry-After"]) >= 1
    assert isinstance(left, asyncio.CancelledError)
    assert set(others) == {None}
    assert len(grammars.compiled) == answering.MOST_UNDER_WAY + 1
    assert not answering.UNDER_WAY


def test_only_so_many_long_texts_are_tokenized_at_a_time():
    """Each takes memory, many times its own size, for as long as it is worked on."""
    lock, both = threading.Lock(), threading.Barrier(2)
    running = most = 0

    def tokenizer(text, **_):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(5)
        with lock:
            running -= 1
        return {"input_ids": [len(text)]}

    async def run():
        llm = SimpleNamespace(tokenizer=tokenizer)
        several = [answering.tokens_of(llm, ["x" * 100_000], None) for _ in range(8)]
        return await asyncio.gather(*several)

    assert asyncio.run(run()) == [[[100_000]]] * 8
    assert most == 2
