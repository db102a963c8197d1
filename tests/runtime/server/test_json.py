"""JSON over HTTP: what a response format asks for is what comes, whole or in a stream."""

import json

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from compress.runtime.grammar import Grammar
from compress.runtime.sampling_params import SamplingParams
from tests.runtime.server.conftest import app_of

pytest.importorskip("llguidance", reason="llguidance is not installed")

ASK = [{"role": "user", "content": "Who?"}]
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"enum": ["small", "großartig"]},
        "people": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["name", "size", "people"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}


@pytest.fixture
def client(spelling_llm, serve):
    url = serve(app_of(spelling_llm)).url
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_schema_is_kept_to(client, spelling_llm):
    settings = {"max_tokens": 300, "seed": 3, "n": 3}
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, response_format=FORMAT, **settings
    )
    params = SamplingParams(grammar=Grammar("json_schema", json.dumps(CITY)), **settings)
    (expected,) = spelling_llm.chat(ASK, params)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [output.text for output in expected.outputs]
    assert len(set(texts)) == 3
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), CITY)


def test_in_a_stream_and_in_completions(client):
    settings = {"max_tokens": 300, "seed": 3, "response_format": FORMAT}
    whole = client.chat.completions.create(model="tiny", messages=ASK, **settings)
    stream = client.chat.completions.create(model="tiny", messages=ASK, stream=True, **settings)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    settings["extra_body"] = {"response_format": settings.pop("response_format")}
    text = client.completions.create(model="tiny", prompt="Who?", **settings).choices[0].text
    jsonschema.validate(json.loads(text), CITY)


class Person(BaseModel):
    """What the client makes a schema of."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=5)
    age: int = Field(ge=0, le=120)
    friends: list[bool] = Field(max_length=2)


def test_the_clients_own_models(client):
    answer = client.chat.completions.parse(
        model="tiny", messages=ASK, response_format=Person, max_tokens=300, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize(
    "asked", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "any"}}]
)
def test_any_object(client, spelling_llm, asked):
    bias = {spelling_llm.tokenizer.convert_tokens_to_ids(token): 4 for token in ('"', "}", '"}')}
    answer = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        response_format=asked,
        max_tokens=500,
        seed=5,
        logit_bias=bias,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_logit_bias(client, spelling_llm):
    token = spelling_llm.tokenizer.convert_tokens_to_ids("q")
    answer = client.completions.create(
        model="tiny", prompt="x", max_tokens=5, logit_bias={str(token): 100}
    )
    assert answer.choices[0].text == "qqqqq"
    with pytest.raises(openai.BadRequestError, match="99999") as found:
        client.completions.create(model="tiny", prompt="x", logit_bias={"99999": 1})
    assert found.value.param == "logit_bias"


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"$ref": "https://example.com/schema.json"}, "example.com"),
        ({"type": "object", "properties": {"\ud800": 3}}, ""),
        ({"type": "string", "pattern": "("}, ""),
    ],
)
def test_a_schema_that_is_wrong(client, schema, word):
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": ASK, "response_format": asked}
    answer = httpx.post(
        f"{client.base_url}chat/completions",
        content=json.dumps(body),  # httpx refuses lone surrogates
        headers={"Content-Type": "application/json"},
        timeout=30,
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "response_format"
    assert word in error["message"]
    assert "\n" not in error["message"]
