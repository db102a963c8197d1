"""Every error is OpenAI's error object, whatever it comes from."""

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from compress.core.errors import InputError
from compress.runtime.engine import PromptTooLongError
from compress.runtime.sampling_params import SettingError
from compress.runtime.server.errors import ApiError, install_handlers


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    size: int = Field(ge=0, le=5)
    words: list[str] = []


@pytest.fixture
def url(serve):
    app = FastAPI()
    install_handlers(app)

    def middleware(inner):
        async def call(scope, receive, send):
            async def marked(message):
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-seen", b"yes")]
                await send(message)

            await inner(scope, receive, marked)

        return call

    app.add_middleware(middleware)

    @app.post("/body")
    async def body(body: Body) -> int:
        return body.size

    @app.get("/raise/{kind}")
    async def raises(kind: str):
        raise {
            "api": ApiError(429, "full", code="busy", param="x", retry_after=2.6),
            "long": ApiError(503, "loading", retry_after=0.01),
            "input": InputError("size = 9; allowed is 0 to 5"),
            "setting": SettingError("grammar", "grammar = 3; give a Grammar"),
            "long_prompt": PromptTooLongError("a prompt of 9 tokens"),
            "bug": KeyError("a secret of the inside"),
        }[kind]

    return serve(app).url


def error(response):
    assert response.headers["content-type"] == "application/json"
    (name,) = response.json()
    assert name == "error"
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert "\n" not in found["message"]
    return found


def test_own_errors(url):
    response = httpx.get(f"{url}/raise/api")
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert error(response) == {
        "message": "full", "type": "rate_limit_error", "param": "x", "code": "busy",
    }  # fmt: skip
    response = httpx.get(f"{url}/raise/long")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert error(response)["type"] == "server_error"


def test_bad_input_is_the_clients(url):
    response = httpx.get(f"{url}/raise/input")
    assert response.status_code == 400
    assert error(response)["message"] == "size = 9; allowed is 0 to 5"
    response = httpx.get(f"{url}/raise/setting")
    assert response.status_code == 400
    assert error(response)["param"] == "response_format"
    response = httpx.get(f"{url}/raise/long_prompt")
    assert response.status_code == 413
    assert error(response)["code"] == "context_length_exceeded"


def test_a_mistake_of_ours_tells_nothing_of_the_inside(url):
    response = httpx.get(f"{url}/raise/bug")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert error(response)["type"] == "server_error"
    assert response.headers["x-seen"] == "yes"  # by a middleware: the answer passed through it


def test_paths_and_methods(url):
    response = httpx.get(f"{url}/nowhere")
    assert response.status_code == 404
    assert "no such path" in error(response)["message"]
    response = httpx.get(f"{url}/body")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert "POST" in error(response)["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b'{"size": 9}', "size", ["size = 9", "less than or equal to 5"]),
        (b'{"size": "3"}', "size", ["size = '3'", "integer"]),
        (b"{}", "size", ["size is missing"]),
        (b'{"size": 1, "words": ["a", 3]}', "words.1", ["words.1 = 3", "string"]),
        (b"[]", None, ["JSON object"]),
        (b"", None, ["JSON object"]),
        (b'{"size": ', None, ["not JSON", "character"]),
        (b'{"size": 1' + b"0" * 5000 + b"}", None, []),
        (b"[" * 100_000, None, []),
        (b'{"size": "\xff"}', None, []),
    ],
)
def test_bodies(url, body, param, words):
    response = httpx.post(f"{url}/body", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    found = error(response)
    assert found["param"] == param
    for word in words:
        assert word in found["message"]


def test_no_content_type(url):
    response = httpx.post(f"{url}/body", content=b'{"size": 1}')
    assert response.status_code == 400
    assert "application/json" in error(response)["message"]
