"""Random requests with proposals of every kind: outputs are the plain run's, no block is lost.

RANDOM_REQUESTS=2000 runs the long one.
"""

import functools
import os
import random
import time
from array import array

import numpy as np
import pytest

from compress.runtime.engine import Engine
from compress.runtime.sampler import probabilities, sample
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.speculation.draft_model import DraftModel
from compress.runtime.speculation.ngram import NgramProposer
from compress.runtime.speculation.proposer import Draft
from compress.runtime.speculation.speculator import Speculator
from tests.runtime import fakes
from tests.runtime.fakes import VOCAB, FakeAsyncModel, FakeModel

REQUESTS = int(os.environ.get("RANDOM_REQUESTS", "70"))


class Letters:
    """One token a character, so that stop strings can be spelled."""

    def decode(self, tokens, **_):
        return "".join(chr(0x4E00 + token) for token in tokens)


class Forbids:
    """A grammar: which tokens may follow depends on the output; some outputs can only end."""

    def __init__(self, output=(), ends=True):
        self.output, self.ends = output, ends
        self.allowed = (np.arange(VOCAB) + sum(output)) % 3 > 0
        self.may_end = len(output) % 4 == 3
        if ends and len(output) >= 6 and output[-1] % 5 == 0:
            self.allowed, self.may_end = np.zeros(VOCAB, bool), True
        self.complete = not self.allowed.any()

    def copy(self):
        return Forbids(self.output, self.ends)

    def accept(self, token):
        assert self.allowed[token], "the grammar was given what it forbids"
        self.__init__((*self.output, token), self.ends)


class Knows:
    """Proposes what will come, as far as its `habit` lets it; looks at all that it is told."""

    bytes_per_block, description = 0, "knows what comes"

    def __init__(self, answers, habit, most, source):
        self.answers, self.habit, self.most, self.source = answers, habit, most, source
        self.drafted, self.last = {}, {}

    def allocate(self, num_blocks):
        self.num_blocks = num_blocks

    def copy_blocks(self, pairs):
        assert pairs

    def outlook(self, sequence, most):
        assert 0 < most <= self.most
        return [0.5] * most

    def propose(self, asked):
        return [self._draft(sequence, count) for sequence, count in asked]

    def _draft(self, sequence, count):
        assert not sequence.ended
        assert sequence.draft is None
        assert count <= sequence.request.limit - sequence.produced - 1
        assert min(sequence.tokens) >= 0, "a token to come, or a draft, is still among them"
        room = sequence.length * 4
        assert sequence.computed == len(sequence.tokens) - 1
        assert len(sequence.tokens) + count <= room, "no block for a proposed position"
        key = sequence.request.id, sequence.index
        right = self.answers[key][sequence.produced : sequence.produced + count]
        right += [1] * (count - len(right))  # beyond its end
        habit, source = self.habit, self.source
        if habit == "mixed":
            habit = source.choice(["right", "wrong", "random", "empty", "short"])
        tokens = {
            "right": right,
            "wrong": [(token + 1) % VOCAB for token in right],
            "random": [
                token if source.random() < 0.7 else source.randrange(VOCAB) for token in right
            ],
            "empty": [],
            "short": right[: source.randint(0, count)],
        }[habit]
        self.drafted[key] = len(tokens)
        self.last[key] = len(sequence.tokens), tokens
        return Draft(tokens)

    def verified(self, sequence, drafted, accepted):
        key = sequence.request.id, sequence.index
        length, tokens = self.last[key]
        new = sequence.tokens[length:].tolist()
        assert drafted == len(tokens)
        assert len(new) == accepted + 1
        assert new[:-1] == tokens[:accepted]
        assert accepted == drafted or new[-1] != tokens[accepted]
        blocks = -(-sequence.computed // 4)
        assert sequence.length == blocks, "blocks past what was accepted are kept"

    def forget(self, sequence):
        assert not sequence.tables

    def seconds(self, counts):
        return 0.0

    def behind(self, sequence):
        return 0.0


class Dice:
    """Random lengths, idle now and then."""

    def __init__(self, source):
        self.source = source

    @property
    def idle(self):
        return self.source.random() < 0.2

    def plan(self, sequences, others, outlooks):
        assert len(sequences) == len(outlooks)
        return [self.source.randint(0, len(outlook)) for outlook in outlooks]

    def observe(self, tokens, sequences, seconds, drafting, asking):
        assert tokens >= sequences > 0
        assert seconds > 0 <= drafting


def random_request(source, prefixes):
    """A prompt, often with a prefix that others have, its settings, and whether a grammar."""
    prompt = list(source.choice(prefixes))[: source.randint(0, 30)] if source.random() < 0.6 else []
    prompt += [source.randrange(VOCAB) for _ in range(source.randint(1, 12))]
    most = source.randint(1, 30)
    params = SamplingParams(
        max_tokens=most,
        temperature=source.choice([0, 0, 0.7, 1.5]),
        top_p=source.choice([1, 0.8]),
        top_k=source.choice([0, 5]),
        min_p=source.choice([0, 0.05]),
        seed=source.choice([None, 11, source.randrange(1000)]),
        n=source.choice([1, 1, 1, 2, 4]),
        stop=source.choice([(), (), (chr(0x4E00 + 9) + chr(0x4E00 + 20), chr(0x4E00 + 33))]),
        stop_token_ids=source.choice([(), (3, 50)]),
        min_tokens=source.choice([0, 0, min(4, most)]),
        repetition_penalty=source.choice([1, 1, 1.2]),
        presence_penalty=source.choice([0, 0, 0.5]),
        frequency_penalty=source.choice([0, 0, -0.4]),
        logit_bias=source.choice([None, None, {7: 6, 8: -100}]),
        logprobs=source.choice([None, None, 2]),
        prompt_logprobs=source.choice([None, None, None, None, 0]),
        ignore_eos=source.choice([False, True]),
    )
    return prompt, params, source.random() < 0.2


class Served:
    """An engine, and all that came of each output."""

    def __init__(self, model, **settings):
        self.engine = Engine(
            model, prefix_caching=True, tokenizer=Letters(), eos_ids=[60], seed=5, **settings
        )
        self.requests, self.outputs = {}, {}

    def add(self, name, prompt, params, grammar):
        request = self.engine.prepare(name, prompt, params)
        request.grammar = Forbids() if grammar else None
        self.engine.add(request)
        self.requests[name] = request

    def step(self):
        for new in self.engine.step():
            tokens, text, logprobs, ends = self.outputs.setdefault(
                (new.request_id, new.index), ([], [], [], [])
            )
            assert not ends, "something came after the end"
            tokens += new.token_ids
            text.append(new.text)
            logprobs += new.logprobs or []
            if new.finish_reason:
                ends.append((new.finish_reason, new.error))
        self.engine.check()

    def output(self, key):
        """Tokens, text, log-probabilities, end."""
        tokens, text, logprobs, ends = self.outputs[key]
        return tokens, "".join(text), logprobs, ends


def plain_run(asked):
    """What each request gives without speculation, alone on the cache for long."""
    served = Served(FakeModel(), num_blocks=2000, max_sequences=32)
    for name, request in asked.items():
        served.add(name, *request)
    while served.engine.has_work():
        served.step()
    prompts = {name: request.prompt_logprobs for name, request in served.requests.items()}
    return {key: served.output(key) for key in served.outputs}, prompts


@functools.cache
def workload(seed):
    """Requests, and what they give."""
    source = random.Random(seed)
    prefixes = [[source.randrange(VOCAB) for _ in range(30)] for _ in range(4)]
    asked = {str(number): random_request(source, prefixes) for number in range(REQUESTS)}
    return asked, *plain_run(asked)


@pytest.mark.parametrize("kind", [FakeModel, FakeAsyncModel], ids=["host", "device"])
@pytest.mark.parametrize(
    ("habit", "seed"),
    [("right", 0), ("wrong", 0), ("random", 1), ("mixed", 1), ("mixed", 2), ("mixed", 3)],
)
def test_outputs_are_those_of_the_plain_run(habit, seed, kind):
    source = random.Random(seed)
    asked, expected, prompts = workload(seed)
    answers = {key: output[0] for key, output in expected.items()}
    speculator = Speculator(Knows(answers, habit, source.choice([1, 3, 9]), source), Dice(source))
    served, aborted = serve(kind(), speculator, asked, source)
    compare(served, aborted, expected, prompts)
    now = served.engine.statistics()
    assert now.preemptions > 0
    assert now.cached_prompt_tokens > 0
    assert aborted
    assert (now.accepted_tokens > 0) == (habit != "wrong")


def serve(model, speculator, asked, source):
    """Requests at random times on a tiny cache, some aborted: what came, and who was aborted."""
    served = Served(
        model,
        num_blocks=source.choice([18, 24, 40]),
        max_tokens_per_step=source.choice([8, 19, 64]),
        max_sequences=8,
        speculator=speculator,
    )
    engine, coming, aborted = served.engine, list(asked), set()
    while coming or engine.has_work():
        while coming and source.random() < 0.4:
            name = coming.pop(0)
            served.add(name, *asked[name])
        if engine.requests and source.random() < 0.02:
            name = source.choice(list(engine.requests))
            aborted.add(name)
            engine.abort(name)
            engine.check()
        served.step()
        orders = [s.order for s in [*engine.scheduler.running, *engine.scheduler.waiting]]
        assert orders == sorted(orders), "a younger sequence is ahead"
    return served, aborted


def compare(served, aborted, expected, prompts):
    """What came is what the plain run gives, and nothing is left."""
    for key, output in expected.items():
        got = served.output(key)
        if key[0] in aborted and got[3] == [("abort", None)]:
            assert got[0] == output[0][: len(got[0])]
            assert got[2] == output[2][: len(got[2])]
        else:
            assert got == output
            assert served.requests[key[0]].prompt_logprobs == prompts[key[0]]
    now = served.engine.statistics()
    assert now.running == now.waiting == now.blocks_in_use == 0
    assert now.blocks_cached + now.blocks_free == served.engine.pool.num_blocks
    assert now.drafts > 0
    assert now.drafted_tokens >= now.accepted_tokens == sum(now.accepted_at)


class Smaller(FakeModel):
    """Says what the model says after two prefixes of three."""

    def logits_of(self, tokens):
        row = super().logits_of(tokens)
        return row if sum(tokens) % 3 else row.roll(1)


class SmallerOnDevice(Smaller, FakeAsyncModel):
    most_unfinished = 9  # a chain of drafts waits once


class Checked(DraftModel):
    """A draft model whose every token is drawn again, from the whole prefix."""

    def propose(self, asked):
        drafts = super().propose(asked)
        for (sequence, _), draft in zip(asked, drafts, strict=True):
            state, prefix = sequence.sampling.fork(), sequence.tokens.tolist()
            for place, token in enumerate(draft.tokens):
                row = self._model.logits_of(prefix)
                if draft.probabilities is None:
                    assert sample(row[None], [state])[0] == [token]
                else:
                    q = probabilities(state.adjusted(row.numpy()), state.params)
                    assert np.array_equal(draft.probabilities[place], q)
                state.record(token)
                prefix.append(token)
        return drafts


@pytest.mark.parametrize("kind", [FakeModel, FakeAsyncModel], ids=["host", "device"])
@pytest.mark.parametrize("draft_kind", [Smaller, SmallerOnDevice], ids=["drawn", "chained"])
@pytest.mark.parametrize("seed", [4, 5])
def test_a_draft_model_reads_the_sequence_and_nothing_else(seed, draft_kind, kind):
    source = random.Random(seed)
    asked, expected, prompts = workload(seed)
    model = kind()
    proposer = Checked(draft_kind(), model, source.choice([3, 9]), 64, 8, "smaller")
    served, aborted = serve(model, Speculator(proposer, Dice(source)), asked, source)
    comparable = {
        key: output
        for key, output in expected.items()
        if (params := asked[key[0]][1]).seed is not None or params.greedy  # the rest are samples
    }
    compare(served, aborted, comparable, prompts)
    now = served.engine.statistics()
    assert now.drafted_tokens > now.accepted_tokens > 0.3 * now.drafted_tokens
    assert not proposer._contexts, "a sequence that has ended is remembered"


@pytest.mark.parametrize("kind", [FakeModel, FakeAsyncModel], ids=["host", "device"])
def test_copies_of_a_text_that_repeats_itself(kind, monkeypatch):
    """Logits that depend on the last two tokens; the proposer is what users get."""
    logits_of = fakes.logits_of
    monkeypatch.setattr(fakes, "logits_of", lambda tokens: logits_of([t % 3 for t in tokens[-2:]]))
    source = random.Random(0)
    asked = {str(number): random_request(source, [[1, 2, 3] * 10]) for number in range(REQUESTS)}
    expected, prompts = plain_run(asked)
    served, aborted = serve(kind(), Speculator(NgramProposer(), Dice(source)), asked, source)
    compare(served, aborted, expected, prompts)
    assert served.engine.statistics().accepted_tokens > 50


class Poisoned(FakeModel):
    """Its logits are NaN after a token."""

    poison = None

    def forward(self, batch):
        logits = super().forward(batch)
        logits[batch.tokens[batch.rows] == self.poison] = float("nan")
        return logits


def with_right_guesses(model, asked, most, **settings):
    """A speculating engine to which nothing but what comes is proposed, and what comes."""
    expected, _ = plain_run(asked)
    answers = {key: output[0] for key, output in expected.items()}
    speculator = Speculator(Knows(answers, "right", most, random.Random(0)), Most())
    return Served(model, speculator=speculator, **settings), expected


class Most(Dice):
    """As many tokens as can be."""

    idle = False

    def __init__(self):
        pass

    def plan(self, sequences, others, outlooks):
        self.others = others
        return [len(outlook) for outlook in outlooks]


@pytest.mark.parametrize("setting", [{"temperature": 0}, {"logprobs": 1}, {"seed": 4}], ids=str)
def test_nan_after_an_accepted_token_ends_that_sequence_alone(setting):
    params = SamplingParams(max_tokens=12, **setting)
    asked = {name: ([number, 5], params, False) for number, name in enumerate("ab")}
    model = Poisoned()
    served, expected = with_right_guesses(model, asked, 8, num_blocks=100)
    tokens = expected["a", 0][0]
    model.poison = next(t for t in tokens[2:6] if t not in expected["b", 0][0] + tokens[:2])
    for name, request in asked.items():
        served.add(name, *request)
    while served.engine.has_work():
        served.step()
    assert served.output(("b", 0)) == expected["b", 0]
    got, _, _, ((reason, error),) = served.output(("a", 0))
    assert got == tokens[: tokens.index(model.poison) + 1]
    assert reason == "error"
    assert "NaN" in error
    assert served.engine.pool.in_use == 0
    assert len(served.engine.pool.match(array("q", [0, 5, *got, 1]))[0][0]) == 0, (
        "the poisoned cache can be found"
    )


def test_proposals_hold_up_no_prompt():
    """A prompt of many steps that fits is begun in the step in which it comes."""
    greedy = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    asked = {name: ([number], greedy, False) for number, name in enumerate("abcd")}
    served, _ = with_right_guesses(
        FakeModel(), asked, 15, num_blocks=60, max_tokens_per_step=40, max_sequences=8
    )
    for name, request in asked.items():
        served.add(name, *request)
    for _ in range(3):
        served.step()
    engine = served.engine
    decodes = sum(sequence.computed % 4 == 0 for sequence in engine.scheduler.running)
    fits = (engine.pool.available - decodes) * 4
    served.add("long", [9] * fits, SamplingParams(max_tokens=1), False)
    served.step()
    assert not engine.scheduler.waiting
    engine.abort("long")
    served.step()


def test_a_prompt_that_is_not_admitted_keeps_nobody_from_proposing():
    greedy = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    asked = {name: ([number], greedy, False) for number, name in enumerate("ab")}
    served, _ = with_right_guesses(
        FakeModel(), asked, 9, num_blocks=60, max_tokens_per_step=20, max_sequences=2
    )
    for name, request in asked.items():
        served.add(name, *request)
    served.step()
    served.add("waits", [9] * 100, SamplingParams(max_tokens=1), False)
    served.step()
    assert served.engine.scheduler.waiting
    assert served.engine.model.batches[-1].tokens.numel() == 20  # 2 * (1 + 9)
    assert served.engine._speculator.lengths.others == 0


class Slow(Dice):
    """Takes long to say that nothing is to be proposed, and is idle but when told."""

    idle = True

    def __init__(self):
        self.seen = []

    def plan(self, sequences, others, outlooks):
        time.sleep(0.05)
        return [0] * len(outlooks)

    def observe(self, tokens, sequences, seconds, drafting, asking):
        self.seen.append((seconds, drafting, asking))


def test_a_step_is_charged_for_its_own_questions_alone():
    """The slow one is of a step with a prompt in it, which tells nothing of steps of decodes."""
    lengths = Slow()
    engine = Engine(FakeModel(), num_blocks=20, speculator=Speculator(NgramProposer(), lengths))
    params = SamplingParams(max_tokens=8, temperature=0)
    engine.add(engine.prepare("one", [1, 2, 3], params))
    engine.step()
    engine.add(engine.prepare("two", [4, 5, 6], params))
    lengths.idle = False
    engine.step()
    lengths.idle = True
    lengths.seen.clear()
    engine.step()
    ((seconds, drafting, asking),) = lengths.seen
    assert seconds > 0
    assert drafting == asking == 0
