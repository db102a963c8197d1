"""The `openai` client drives the server; answers equal what the runtime gives to the same calls."""

import asyncio

import openai
import pytest

from compress.runtime.sampling_params import SamplingParams
from tests.runtime.fakes import naive
from tests.runtime.server.conftest import Letters, app_of

PROMPT = "The quick brown fox"
HELLO = [{"role": "user", "content": "Hello"}]
LETTERS = Letters()


@pytest.fixture
def llm(make_letters):
    return make_letters(eos_ids=(96,))


@pytest.fixture
def client(llm, serve):
    url = serve(app_of(llm)).url
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ids(text):
    return LETTERS(text)["input_ids"]


def offsets(tokens):
    """Where tokens of one character begin; special ones, `<95>` and `<96>`, are not in the text."""
    return [sum(len(token) == 1 for token in tokens[:place]) for place in range(len(tokens))]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "org/tiny"]
    assert client.models.retrieve("org/tiny").id == "org/tiny"
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("gpt-4")
    assert found.value.code == "model_not_found"
    assert found.value.param == "model"


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"seed": 5},
        {"seed": 5, "temperature": 1.5, "top_p": 0.6},
        {"temperature": 0, "frequency_penalty": 2.0, "presence_penalty": -1.0},
        {"seed": 1, "n": 3},
    ],
)
def test_completions_equal_generate(client, llm, settings):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, **settings)
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=30, **settings))
    assert [choice.text for choice in answer.choices] == [o.text for o in expected.outputs]
    reasons = [choice.finish_reason for choice in answer.choices]
    assert reasons == [output.finish_reason for output in expected.outputs]
    assert [choice.index for choice in answer.choices] == list(range(settings.get("n", 1)))
    generated = sum(len(output.token_ids) for output in expected.outputs)
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == generated
    assert answer.usage.total_tokens == len(PROMPT) + generated
    assert (answer.model, answer.object) == ("tiny", "text_completion")


def test_other_servers_settings(client, llm):
    extra = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2, "min_tokens": 20}
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=30, seed=3, extra_body=extra
    )
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=30, seed=3, **extra))
    assert answer.choices[0].text == expected.outputs[0].text


def test_prompts_of_every_kind(client):
    several = client.completions.create(
        model="tiny", prompt=["ab", "cde"], max_tokens=5, temperature=0, n=2
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    greedy = SamplingParams(max_tokens=5, temperature=0)
    expected = [LETTERS.decode(naive(ids(text), greedy)) for text in ("ab", "cde")]
    assert [choice.text for choice in several.choices] == [text for text in expected for _ in "12"]
    assert several.usage.prompt_tokens == 5
    for prompt in (ids("ab"), [ids("ab")], [ids("ab"), ids("cde")]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, temperature=0)
        assert [choice.text for choice in answer.choices] == expected[: len(answer.choices)]


def test_default_lengths_are_openais(client):
    text = client.completions.create(model="tiny", prompt="x", logit_bias=None)
    assert text.usage.completion_tokens <= 16
    # as many as the context of 200 holds, unless it ends by itself
    chat = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0)
    done = chat.usage.total_tokens == 200
    assert chat.choices[0].finish_reason == ("length" if done else "stop")


def test_echo_and_logprobs(client, llm):
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=6, seed=2, echo=True, logprobs=3
    )
    params = SamplingParams(max_tokens=6, seed=2, logprobs=3, prompt_logprobs=3)
    (expected,) = llm.generate(PROMPT, params)
    (choice,) = answer.choices
    assert choice.text == PROMPT + expected.outputs[0].text
    tokens = expected.prompt_token_ids + expected.outputs[0].token_ids
    entries = expected.prompt_logprobs + expected.outputs[0].logprobs
    found = choice.logprobs
    assert found.tokens == [LETTERS.convert_ids_to_tokens([token])[0] for token in tokens]
    assert found.token_logprobs == [entry and entry.logprob for entry in entries]
    assert found.text_offset == offsets(found.tokens)
    assert found.top_logprobs[0] is None
    for entry, top in zip(entries[1:], found.top_logprobs[1:], strict=True):
        names = {LETTERS.convert_ids_to_tokens([token])[0]: p for token, p in entry.top}
        own = {LETTERS.convert_ids_to_tokens([entry.token_id])[0]: entry.logprob}
        assert top == names | own
        assert len(top) in (3, 4)
    scored = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0
    )
    assert scored.choices[0].text == PROMPT
    assert scored.choices[0].finish_reason == "length"
    assert scored.choices[0].logprobs.token_logprobs == found.token_logprobs[: len(PROMPT)]
    assert scored.usage.completion_tokens == 0
    nothing = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0)
    assert (nothing.choices[0].text, nothing.choices[0].logprobs) == ("", None)


def test_stop(client, llm):
    (whole,) = llm.generate(PROMPT, SamplingParams(max_tokens=40, temperature=0))
    text = whole.outputs[0].text
    for stop in (text[7:9], [text[20:22], text[7:9]]):
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, stop=stop
        )
        assert answer.choices[0].text == text[:7]
        assert answer.choices[0].finish_reason == "stop"
    token = whole.outputs[0].token_ids[4]
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=40,
        temperature=0,
        extra_body={"stop_token_ids": [token]},
    )
    place = whole.outputs[0].token_ids.index(token)
    assert answer.choices[0].text == text[:place]


def test_chat_equals_the_runtimes(client, llm):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d", "name": "Eve"},
    ]
    answer = client.chat.completions.create(
        model="org/tiny", messages=messages, max_completion_tokens=12, seed=4, n=2
    )
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    (expected,) = llm.chat(plain, SamplingParams(max_tokens=12, seed=4, n=2))
    assert [choice.message.content for choice in answer.choices] == [
        output.text for output in expected.outputs
    ]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert (answer.model, answer.object) == ("org/tiny", "chat.completion")
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_cached_tokens_are_told(client):
    long = [{"role": "user", "content": "x" * 100}]
    for _ in range(2):
        answer = client.chat.completions.create(model="tiny", messages=long, max_tokens=2)
    details = answer.usage.prompt_tokens_details
    assert details.cached_tokens == answer.usage.prompt_tokens // 4 * 4 - (
        4 if answer.usage.prompt_tokens % 4 == 0 else 0
    )


def test_chat_logprobs(client, llm):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, seed=1, logprobs=True, top_logprobs=2
    )
    (expected,) = llm.chat(HELLO, SamplingParams(max_tokens=5, seed=1, logprobs=2))
    content = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == [
        entry.logprob for entry in expected.outputs[0].logprobs
    ]
    assert "".join(bytes(entry.bytes).decode() for entry in content) == expected.outputs[0].text
    assert [[top.logprob for top in entry.top_logprobs] for entry in content] == [
        [logprob for _, logprob in entry.top] for entry in expected.outputs[0].logprobs
    ]


def test_streams(client, llm):
    settings = {"max_tokens": 20, "seed": 7, "n": 2}
    stream = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        **settings,
    )
    chunks = list(stream)
    (expected,) = llm.chat(HELLO, SamplingParams(logprobs=0, **settings))
    assert len({chunk.id for chunk in chunks}) == 1
    last = chunks.pop()
    assert last.choices == []
    generated = sum(len(output.token_ids) for output in expected.outputs)
    assert last.usage.completion_tokens == generated
    assert all(chunk.usage is None for chunk in chunks)
    for output in expected.outputs:
        own = [c.choices[0] for c in chunks if c.choices[0].index == output.index]
        assert own[0].delta.role == "assistant"
        assert not any(choice.delta.role for choice in own[1:])
        assert "".join(choice.delta.content or "" for choice in own) == output.text
        assert [choice.finish_reason for choice in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == output.finish_reason
        assert own[-1].delta.content is None
        found = [
            entry.logprob for choice in own if choice.logprobs for entry in choice.logprobs.content
        ]
        assert found == [entry.logprob for entry in output.logprobs]


def test_streams_of_completions(client, llm):
    settings = {"max_tokens": 15, "seed": 7, "n": 2}
    prompts = ["one", "three"]
    chunks = list(
        client.completions.create(
            model="tiny", prompt=prompts, stream=True, echo=True, logprobs=1, **settings
        )
    )
    whole = client.completions.create(
        model="tiny", prompt=prompts, echo=True, logprobs=1, **settings
    )
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(piece.text for piece in own) == choice.text
        assert own[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [entry for piece in own for entry in getattr(piece.logprobs, name)]
            assert joined == getattr(choice.logprobs, name)
        assert choice.logprobs.text_offset == offsets(choice.logprobs.tokens)
    assert all(chunk.usage is None for chunk in chunks)


def test_many_at_once(llm, serve):
    """Async client, streams and whole answers mixed; each equals its own."""
    url = serve(app_of(llm)).url

    async def one(client, number):
        text = f"Request {number}"
        if number % 2:
            answer = await client.completions.create(
                model="tiny", prompt=text, max_tokens=20, temperature=0
            )
            return answer.choices[0].text
        stream = await client.completions.create(
            model="tiny", prompt=text, max_tokens=20, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everything():
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*(one(client, number) for number in range(60)))

    found = asyncio.run(everything())
    greedy = SamplingParams(max_tokens=20, temperature=0)
    expected = llm.generate([f"Request {number}" for number in range(60)], greedy)
    assert found == [output.outputs[0].text for output in expected]


def test_errors_have_the_clients_types(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match=r"top_p = 3") as found:
        client.completions.create(model="tiny", prompt="x", top_p=3)
    assert found.value.param == "top_p"
    with pytest.raises(openai.APIStatusError, match="context of 200") as found:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x" * 300}], stream=True
        )
    assert found.value.status_code == 413
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools") as found:
        client.chat.completions.create(model="tiny", messages=HELLO, tools=[{"type": "function"}])
    assert found.value.code == "unsupported_parameter"
    assert found.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="min_tokens = 9") as found:
        client.completions.create(
            model="tiny", prompt="x", max_tokens=3, extra_body={"min_tokens": 9}
        )
    assert found.value.param == "min_tokens"
    with pytest.raises(openai.BadRequestError, match="no token"):
        client.completions.create(model="tiny", prompt=["ab", ""])


def test_a_full_queue(make_letters, serve):
    llm = make_letters(delay=0.02, max_sequences=1, max_queued_requests=1)
    url = serve(app_of(llm)).url
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    running = client.completions.create(model="tiny", prompt="ab", max_tokens=180, stream=True)
    with running, pytest.raises(openai.RateLimitError) as found:
        client.completions.create(model="tiny", prompt=["ab", "cd"])
    assert int(found.value.response.headers["retry-after"]) >= 1
    assert found.value.code == "queue_full"
    with pytest.raises(openai.BadRequestError, match="allowed are 2"):  # at any time
        client.completions.create(model="tiny", prompt=["ab", "cd", "ef"])
    assert client.completions.create(model="tiny", prompt="ab").choices[0].text


def test_a_tiny_transformer(tiny_llm, serve):
    """Over a real vocabulary of pieces, real kernels and a real template."""
    url = serve(app_of(tiny_llm)).url
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "w12 w3 w77"}]
    for settings in ({"temperature": 0}, {"seed": 3, "temperature": 0.8}):
        (expected,) = tiny_llm.chat(messages, SamplingParams(max_tokens=25, **settings))
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=25, **settings
        )
        assert answer.choices[0].message.content == expected.outputs[0].text
        stream = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=25, stream=True, **settings
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == expected.outputs[0].text
