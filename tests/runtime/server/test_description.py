"""The description of the API is true: schemathesis asks what it allows, and what it does not.

Each answer has a status, a content type and a body that the description lists, none is a 5xx, and
what the description forbids is refused.  Not the reverse: JSON Schema cannot say everything that is
refused, such as an empty prompt.
"""

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from compress.runtime.server.answers import ChatCompletion, Completion
from tests.runtime.server.conftest import app_of

EXAMPLES = 25  # of each kind a route; each takes some 10 ms
ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def url(make_module_letters, serve_module):
    """A server whose cache and queue are small, so that requests are refused for that too."""
    llm = make_module_letters(num_blocks=60, max_sequences=4, max_queued_requests=8)
    return serve_module(app_of(llm)).url


@pytest.fixture(scope="module")
def description(url):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize(
    ("kind", "method", "path"),
    [("POSITIVE", *route) for route in ROUTES]
    + [("NEGATIVE", *route) for route in ROUTES if route[0] == "POST"],
)
def test_every_route(description, kind, method, path):
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS

    cases = description[path][method].as_strategy(generation_mode=GenerationMode[kind])
    checks = CHECKS.get_all()
    impossible = [check for check in checks if check.__name__ == "positive_data_acceptance"]
    assert len(impossible) == 1

    statuses = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def ask(case):
        response = case.call_and_validate(timeout=20, excluded_checks=impossible)
        statuses.add(response.status_code)

    ask()
    assert (200 in statuses) == (kind == "POSITIVE" and "{name}" not in path)


def test_the_list_of_routes_is_whole(url):
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    found = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert found == set(ROUTES)


def test_each_route_has_its_answers_described(url):
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = paths[path]["post"]["responses"]
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"4XX", "5XX"} <= set(responses)
        assert "422" not in responses


def test_answers_fit_their_models_to_the_letter(url):
    body = {"prompt": "ab", "max_tokens": 3, "logprobs": 2, "echo": True, "n": 2}
    answer = httpx.post(f"{url}/v1/completions", json=body).content
    Completion.model_validate_json(answer, strict=True)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "logprobs": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"top_logprobs": 3}).content
    ChatCompletion.model_validate_json(answer, strict=True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 1, "echo": True}),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 2}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}],
                "stream_options": {"include_usage": True},
                "logprobs": True,
            },
        ),
    ],
)
def test_the_events_of_a_stream_are_described(description, path, body):
    case = description[path]["POST"].Case(body=body | {"stream": True, "max_tokens": 3})
    assert case.call_and_validate().status_code == 200
