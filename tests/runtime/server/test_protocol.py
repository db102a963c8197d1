"""Parameters: served, without effect, or refused by name; and what is wrong is said."""

import json
import time

import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from compress.core.errors import InputError
from compress.runtime.server import answering, protocol
from compress.runtime.server.errors import error_of
from compress.runtime.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest
from tests.runtime.server.conftest import app_of

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
TEXT = {"prompt": "Hello", "max_tokens": 1}
TABLES = [
    ("/v1/chat/completions", CHAT, ChatRequest),
    ("/v1/completions", TEXT, CompletionRequest),
]
ENDPOINTS = [(path, body) for path, body, _ in TABLES]


@pytest.fixture(scope="module")
def client(make_module_letters, serve_module):
    url = serve_module(app_of(make_module_letters())).url
    with httpx.Client(base_url=url, headers={"Content-Type": "application/json"}) as made:
        yield made


def post(client, path, body):
    content = json.dumps(body)  # httpx refuses NaN and lone surrogates
    return client.post(path, content=content, timeout=20)


def error(response, status=400):
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.mark.parametrize(("path", "body", "model"), TABLES)
def test_what_is_not_served_is_refused_by_name_or_asks_for_nothing(client, path, body, model):
    for name, harmless in model.unsupported.items():
        for value in (None, *harmless):
            assert post(client, path, body | {name: value}).status_code == 200, (name, value)
        found = error(post(client, path, body | {name: "something"}))
        assert found["code"] == "unsupported_parameter"
        assert found["param"] == name
        assert name in found["message"]
        assert "something" in found["message"]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user", "me"),
        ("metadata", {"a": "b"}),
        ("store", False),
        ("service_tier", "auto"),
        ("service_tier", "default"),
        ("safety_identifier", "x"),
        ("prompt_cache_key", "x"),
        ("prompt_cache_retention", "24h"),
        ("n", 1),
        ("response_format", {"type": "text"}),
        ("stream_options", None),
        ("logit_bias", {}),
        ("stop", []),
        ("stop", None),
        ("stop_token_ids", []),
        ("ignore_eos", True),
        ("model", None),
        ("seed", -1),
        ("top_k", -1),
    ],
)
def test_what_has_no_effect_or_asks_for_nothing(client, path, body, name, value):
    assert post(client, path, body | {name: value}).status_code == 200


@pytest.mark.parametrize(("path", "body", "model"), TABLES)
def test_null_is_as_good_as_absent(client, path, body, model):
    optional = [name for name, field in model.model_fields.items() if not field.is_required()]
    assert post(client, path, body | dict.fromkeys(optional)).status_code == 200


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"temperature": -1}, "temperature", ["temperature = -1", "greater than or equal to 0"]),
        ({"temperature": float("nan")}, "temperature", ["nan", "finite"]),
        ({"temperature": float("inf")}, "temperature", ["finite"]),
        ({"temperature": "hot"}, "temperature", ["'hot'", "number"]),
        ({"temperature": True}, "temperature", ["number"]),
        ({"temperature": 10**400}, "temperature", ["number"]),
        ({"top_p": 0}, "top_p", ["greater than 0"]),
        ({"top_p": 1.5}, "top_p", ["less than or equal to 1"]),
        ({"n": 0}, "n", ["greater than or equal to 1"]),
        ({"n": 129}, "n", ["less than or equal to 128"]),
        ({"n": 1.5}, "n", ["integer"]),
        ({"n": 100}, "n", ["max_sequences = 64"]),
        ({"max_tokens": "many"}, "max_tokens", ["integer"]),
        ({"max_tokens": -1}, "max_tokens", ["greater than or equal to"]),
        ({"min_tokens": 5}, "min_tokens", ["min_tokens = 5", "0 to 1"]),
        ({"seed": 2**64}, "seed", ["less than"]),
        ({"stop": [""]}, "stop", ["1 to 1000 characters"]),
        ({"stop": ["a"] * 17}, "stop", ["at most 16"]),
        ({"stop": 5}, "stop", ["stop = 5"]),
        ({"stop": "\ud800"}, "stop", ["UTF-8"]),
        ({"stop_token_ids": [97]}, "stop_token_ids", ["97", "0 to 96"]),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", ["greater than or equal to 0"]),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", ["pattern"]),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", ["less than or equal to 100"]),
        ({"logit_bias": dict.fromkeys(map(str, range(10_001)), 1)}, "logit_bias", ["10000"]),
        ({"stop_token_ids": [1] * 10_001}, "stop_token_ids", ["10000"]),
        ({"logit_bias": [1]}, "logit_bias", ["dictionary"]),
        ({"frequency_penalty": 3}, "frequency_penalty", ["less than or equal to 2"]),
        ({"temprature": 1}, "temprature", ["did you mean 'temperature'?"]),
        ({"\ud800": 1}, "\\ud800", ["no such parameter"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream is true"]),
        (
            {"stream": True, "stream_options": {"usage": True}},
            "stream_options.usage",
            ["did you mean 'include_usage'?"],
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", ["json_schema"]),
        ({"response_format": {"type": "json_schema"}}, "response_format", ["json_schema goes"]),
        ({"store": True}, "store", ["not supported"]),
        ({"service_tier": "flex"}, "service_tier", ["auto and default"]),
        ({"user": "\udfff"}, "user", ["UTF-8"]),
        ({"model": 3}, "model", ["model = 3"]),
    ],
)
def test_what_is_wrong_is_said(client, path, body, wrong, param, words):
    found = error(post(client, path, body | wrong))
    assert found["param"] == param
    assert found["type"] == "invalid_request_error"
    for word in words:
        assert word in found["message"]


@pytest.mark.parametrize(
    ("wrong", "param", "word"),
    [
        ({"prompt": []}, "prompt", "token ids"),
        ({"prompt": [[]]}, "prompt", "token ids"),
        ({"prompt": ["a", 1]}, "prompt", "token ids"),
        ({"prompt": [1, True]}, "prompt", "token ids"),
        ({"prompt": ["a"] * 2049}, "prompt", "up to 2048"),
        ({"prompt": [1.0]}, "prompt", "token ids"),
        ({"prompt": {"a": 1}}, "prompt", "token ids"),
        ({"prompt": None}, "prompt", "token ids"),
        ({"prompt": "\ud800"}, "prompt", "UTF-8"),
        ({"prompt": ["a", "\ud800"]}, "prompt", "UTF-8"),
        ({"prompt": [97]}, None, "0 to 96"),
        ({"prompt": [-1]}, None, "0 to 96"),
        ({"prompt": [10**30]}, None, "0 to 96"),
        ({"prompt": ""}, None, "no token"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"best_of": 2}, "best_of", "as many as n"),
    ],
)
def test_what_is_wrong_in_completions(client, wrong, param, word):
    found = error(post(client, "/v1/completions", TEXT | wrong))
    assert found["param"] == param
    assert word in found["message"]


def test_best_of_as_many_as_n_asks_for_nothing(client):
    assert post(client, "/v1/completions", TEXT | {"n": 3, "best_of": 3}).status_code == 200
    assert post(client, "/v1/completions", TEXT | {"best_of": 1}).status_code == 200


def user(content, **more):
    return {"messages": [{"role": "user", "content": content} | more]}


@pytest.mark.parametrize(
    ("wrong", "param", "word", "code"),
    [
        ({"messages": []}, "messages", "at least 1", None),
        ({"messages": "Hello"}, "messages", "list", None),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing", None),
        (user(None), "messages.0.content", "text", None),
        (user(3), "messages.0.content", "text", None),
        (user("\ud800"), "messages.0.content", "UTF-8", None),
        (user([{"type": "text"}]), "messages.0.content.0.text", "missing", None),
        (
            user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
            "messages.0.content.1.image_url",
            "not supported",
            "unsupported_parameter",
        ),
        (
            user([{"type": "input_audio", "text": "a"}]),
            "messages.0.content.0.type",
            "not supported",
            "unsupported_parameter",
        ),
        (
            user("x", tool_calls=[{}]),
            "messages.0.tool_calls",
            "not supported",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages.0.role",
            "tools are not supported",
            "unsupported_parameter",
        ),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages.0.role", "'user'", None),
        (user("x", nme="y"), "messages.0.nme", "did you mean 'name'?", "unknown_parameter"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs is true", None),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "equal to 20", None),
        ({"logprobs": 3}, "logprobs", "boolean", None),
        ({"max_tokens": 0}, "max_tokens", "equal to 1", None),
    ],
)
def test_what_is_wrong_in_chat(client, wrong, param, word, code):
    found = error(post(client, "/v1/chat/completions", CHAT | wrong))
    assert found["param"] == param
    assert word in found["message"]
    assert code is None or found["code"] == code


def test_several_mistakes_are_said_at_once_and_not_without_end(client):
    wrong = {"temperature": -1, "top_p": 2, "n": 0, "min_p": 3, "seed": "x"}
    message = error(post(client, "/v1/completions", TEXT | wrong))["message"]
    assert "temperature = -1" in message
    assert "and 2 more mistakes" in message
    long = {"logit_bias": {f"{'x' * 5000}{number}": 1 for number in range(500)}}
    found = error(post(client, "/v1/completions", TEXT | long))
    assert len(found["message"]) < 1500
    assert len(found["param"]) <= 200


def test_a_deep_schema_is_not_walked(client):
    deep = {}
    for _ in range(900):
        deep = {"a": deep}
    found = error(post(client, "/v1/completions", TEXT | {"metadata": deep}))
    assert len(found["message"]) < 1500
    deep_list = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    response = client.post("/v1/completions", content=deep_list)
    assert error(response)["type"] == "invalid_request_error"


def test_long_work_is_done_in_a_thread(client, monkeypatch):
    """The same answers, whether the event loop does it or not."""
    long = "x" * 30_000
    found = post(client, "/tokenize", {"prompt": long}).json()
    assert (found["count"], set(found["tokens"])) == (30_000, {88})
    found = post(client, "/tokenize", {"messages": [{"role": "user", "content": "ab"}] * 500})
    assert found.json()["count"] == 500 * len("u:ab|") + len("a:")
    assert error(post(client, "/v1/completions", TEXT | {"prompt": long}), 413)
    body = TEXT | {"logprobs": 1, "echo": True, "temperature": 0, "max_tokens": 150}
    on_the_loop = post(client, "/v1/completions", body).json()["choices"]
    monkeypatch.setattr(answering, "LONG", 10)
    assert post(client, "/v1/completions", body).json()["choices"] == on_the_loop


@pytest.mark.parametrize(
    ("path", "wrong", "param"),
    [
        ("/v1/completions", {"prompt": [1] * 800_000 + ["a"]}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 500_000 + [1]}, "prompt"),
        ("/v1/completions", {"prompt": [[1]] * 500_000}, "prompt"),
        ("/v1/completions", {"stop_token_ids": ["a"] * 500_000}, "stop_token_ids.0"),
        ("/v1/completions", {"logit_bias": {f"a{i}": "b" for i in range(200_000)}}, "logit_bias"),
        ("/v1/completions", {"metadata": {str(i): 1 for i in range(200_000)}}, "metadata"),
        ("/v1/completions", {"y" * 4_000_000: 1}, "y" * 100),
        ("/detokenize", {"tokens": [-1] * 800_000}, "tokens.0"),
        ("/v1/chat/completions", {"messages": [1] * 800_000}, "messages.0"),
        ("/v1/chat/completions", {"messages": CHAT["messages"] * 80_000}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{}] * 800_000}]},
            "messages.0.content.0.type",
        ),
    ],
)
def test_long_lists_of_what_is_wrong_are_refused_soon(path, wrong, param):
    """pydantic would keep an error for each entry: 30 s and 3 GiB for a body of 4 MiB.

    Five seconds are allowed where some 0.2 s are taken, for machines that do much else.
    """
    models = {path: model for path, _, model in TABLES} | {"/detokenize": DetokenizeRequest}
    began = time.perf_counter()
    with pytest.raises(ValidationError) as found:
        models[path].model_validate({"prompt": "x"} | wrong if path == "/v1/completions" else wrong)
    answer = error_of(RequestValidationError(found.value.errors()))
    assert time.perf_counter() - began < 5
    assert answer.param == param
    assert len(answer.message) < 1500


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_a_model_that_is_not_served(client, path):
    body = {"/v1/completions": TEXT, "/v1/chat/completions": CHAT, "/tokenize": {"prompt": "x"}}
    found = error(post(client, path, body[path] | {"model": "gpt-4"}), 404)
    assert found["code"] == "model_not_found"
    assert "tiny, org/tiny" in found["message"]


def test_settings_reach_the_runtime_as_they_are():
    body = {
        "prompt": "x",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "n": 2,
        "stop": "a",
        "stop_token_ids": [5],
        "ignore_eos": True,
        "min_tokens": 2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
    }
    params = CompletionRequest.model_validate(body).sampling(9, logprobs=4)
    for name in protocol.SAMPLING:
        assert getattr(params, name) == body[name], name
    assert (params.stop, params.stop_token_ids) == (("a",), (5,))
    assert (params.max_tokens, params.logprobs) == (9, 4)
    with pytest.raises(InputError, match="min_tokens"):
        CompletionRequest.model_validate(body).sampling(1)


def test_tokenize(client):
    found = post(client, "/tokenize", {"prompt": "ab", "return_token_strs": True}).json()
    assert found == {"count": 2, "max_model_len": 200, "tokens": [65, 66], "token_strs": ["a", "b"]}
    found = post(client, "/tokenize", {"messages": CHAT["messages"]}).json()
    assert post(client, "/detokenize", {"tokens": found["tokens"]}).json() == {
        "prompt": "u:Hello|a:"
    }
    assert post(client, "/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert post(client, "/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert "either prompt or messages" in error(post(client, "/tokenize", {}))["message"]
    for token in (97, 10**30):
        found = error(post(client, "/detokenize", {"tokens": [token]}))
        assert (found["param"], "0 to 96" in found["message"]) == ("tokens", True)
    assert error(post(client, "/detokenize", {"tokens": [-1]}))["param"] == "tokens.0"
    assert error(post(client, "/tokenize", {"prompt": "\ud800"}))["param"] == "prompt"
