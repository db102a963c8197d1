"""What clients see of a server that drafts: increments of several tokens, and nothing else."""

import asyncio
import json

import httpx
import pytest

from compress.bench.client import text_of
from compress.runtime.sampler import draw
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.server.merged_metrics import merged
from compress.runtime.server.service import ServerSettings, Service
from compress.runtime.speculation.proposer import Draft
from compress.runtime.speculation.speculator import Speculator
from tests.runtime.fakes import VOCAB, logits_of, tokens_of
from tests.runtime.server.conftest import app_of
from tests.runtime.server.test_sse import events

MOST = 5


class Foresight:
    """Draws as the model will, as far as the prompt and settings without penalties tell.

    Every seventh token of an output is proposed wrongly.
    """

    most = MOST
    bytes_per_block = 0
    description = "foresight"

    def allocate(self, num_blocks):
        pass

    def copy_blocks(self, pairs):
        pass

    def outlook(self, sequence, most):
        return [0.8] * most

    def propose(self, asked):
        return [Draft(self._tokens(*each)) for each in asked]

    def verified(self, sequence, drafted, accepted):
        pass

    def forget(self, sequence):
        pass

    def seconds(self, counts):
        return 0.0

    def behind(self, sequence):
        return 0.0

    def _tokens(self, sequence, count):
        state, text, found = sequence.sampling, sequence.tokens.tolist(), []
        for produced in range(sequence.produced, sequence.produced + count):
            logits = logits_of(text + found).numpy()
            token = draw(logits, state.params, state.uniform(produced))
            found.append((token + (produced % 7 == 6)) % VOCAB)
        return found


class Always:
    """All that is proposed."""

    idle = False

    def plan(self, sequences, others, outlooks):
        return [len(outlook) for outlook in outlooks]

    def observe(self, tokens, sequences, seconds, drafting, asking):
        pass


def foresight():
    return Speculator(Foresight(), Always())


GREEDY = {"temperature": 0, "max_tokens": 40}
SETTINGS = {
    "greedy": GREEDY,
    "seeded": {"temperature": 0.9, "seed": 3, "max_tokens": 30, "n": 2},
    "penalties": GREEDY | {"frequency_penalty": 0.5, "logit_bias": {"7": -3}},
    "stop": {"temperature": 0, "max_tokens": 60, "stop": ["5G-2", "sK)$", "?EmAC"]},
    "end": {"temperature": 1.2, "seed": 5, "max_tokens": 150},
    "one token": {"temperature": 0, "max_tokens": 1},
}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 2}
PATHS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": ["Hello", "you"], "logprobs": 2},
}


@pytest.fixture(scope="module")
def plain(make_module_letters, serve_module):
    return serve_module(app_of(make_module_letters(eos_ids=(96,)))).url


@pytest.fixture(scope="module")
def drafting_llm(make_module_letters):
    return make_module_letters(eos_ids=(96,), speculator=foresight())


@pytest.fixture(scope="module")
def drafting(drafting_llm, serve_module):
    return serve_module(app_of(drafting_llm)).url


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("path", PATHS)
def test_whole_answers_are_those_without_drafts(plain, drafting, path, settings):
    found = [
        httpx.post(url + path, json=PATHS[path] | settings).json() for url in (plain, drafting)
    ]
    for answer in found:
        assert answer.pop("id")
        assert answer.pop("created")
    assert found[0] == found[1]
    if "stop" in settings:
        assert found[0]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("path", PATHS)
def test_streams_add_up_to_the_whole_answer(drafting, path, settings):
    """Text, log-probabilities and their offsets; usage says at any time what has come."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = PATHS[path] | settings
    whole = httpx.post(drafting + path, json=body).json()
    streamed = body | {"stream": True, "stream_options": options}
    *data, end = events(httpx.post(drafting + path, json=streamed).text)
    assert end == "[DONE]"
    chunks = [json.loads(line) for line in data]
    assert chunks.pop()["usage"] == whole["usage"]
    texts, logprobs, reasons, lengths = {}, {}, {}, []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        index = choice["index"]
        texts[index] = texts.get(index, "") + text_of(choice)
        if entries := choice["logprobs"]:
            lengths.append(len(entries["content"] if "chat" in path else entries["tokens"]))
            assert chunk["usage"]["completion_tokens"] == sum(lengths)
            for name, values in entries.items():
                if values is not None:
                    logprobs.setdefault(index, {}).setdefault(name, []).extend(values)
        if choice["finish_reason"]:
            assert index not in reasons
            reasons[index] = choice["finish_reason"]
    for choice in whole["choices"]:
        index = choice["index"]
        given = {name: values for name, values in choice["logprobs"].items() if values is not None}
        assert texts[index] == choice.get("text", choice.get("message", {}).get("content"))
        assert logprobs[index] == given
        assert reasons[index] == choice["finish_reason"]
    assert max(lengths) > 2 or settings["max_tokens"] == 1


def test_metrics_count_drafts(make_letters):
    llm = make_letters(delay=0.005, speculator=foresight())
    service = Service(ServerSettings(("m",)))
    service.attach(llm)
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=1, ignore_eos=True)

    async def run():
        streams = service.submit([[1, 2, 3], [4, 5]], [params, params])

        async def all_of(stream):
            got = []
            while news := await stream.next():
                got += news
            return got

        return await asyncio.gather(*map(all_of, streams))

    outputs = asyncio.run(run())
    assert [len(tokens_of(output)) for output in outputs] == [30, 30]
    assert max(len(new.token_ids) for output in outputs for new in output) == MOST + 1

    def number(name, **labels):
        labels = {"model_name": "m", **labels}
        return service.metrics.registry.get_sample_value(f"compress:{name}", labels)

    found = llm.statistics()
    assert number("spec_decode_num_drafts_total") == found.drafts > 0
    assert number("spec_decode_num_draft_tokens_total") == found.drafted_tokens
    assert number("spec_decode_num_accepted_tokens_total") == found.accepted_tokens
    places = [
        number("spec_decode_num_accepted_tokens_per_pos_total", position=str(place))
        for place in range(MOST)
    ]
    assert places == list(found.accepted_at)
    assert sum(places) == found.accepted_tokens > 20
    # Tokens of one increment share the time since the one before: a gap for each pair of tokens.
    assert number("inter_token_latency_seconds_count") == 2 * 29
    gaps = number("inter_token_latency_seconds_sum")
    means = number("request_time_per_output_token_seconds_sum")
    assert gaps == pytest.approx(29 * means)
    text = service.metrics.text()
    several = merged(b"", {"0": text, "1": text}).decode()
    name = "compress:spec_decode_num_accepted_tokens_per_pos_total"
    line = f'{name}{{model_name="m",position="0",replica="1"}} {places[0]:.1f}'
    assert line in several.splitlines()


def test_metrics_without_drafts(make_letters):
    service = Service(ServerSettings(("m",)))
    service.attach(make_letters())
    text = service.metrics.text().decode()
    assert 'compress:spec_decode_num_drafts_total{model_name="m"} 0.0' in text
    assert "position=" not in text
