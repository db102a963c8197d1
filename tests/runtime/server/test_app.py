"""The application as a whole: state, documents, the page's files, refusals counted."""

import asyncio
import re

import httpx
import pytest

from compress.runtime.server import app as app_module
from compress.runtime.server.app import make_app
from compress.runtime.server.docs_page import docs_page
from compress.runtime.server.service import ServerSettings, Service


def ask(app, method="GET", path="/", **more) -> httpx.Response:
    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **more)

    return asyncio.run(run())


def loading(**settings):
    return make_app(Service(ServerSettings(("m",), **settings)))


def test_state_as_it_changes(make_letters):
    llm = make_letters()
    app = loading()
    service = app.state.service
    assert [ask(app, path=path).status_code for path in ("/health", "/ready")] == [200, 503]
    service.attach(llm)
    assert ask(app, path="/ready").json()["status"] == "ready"
    llm.engine.model.fail_on = 0  # what the engine tries by itself fails too
    failing = {"model": "m", "prompt": [0, 1], "max_tokens": 1}
    answer = ask(app, "POST", "/v1/completions", json=failing)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_fault"
    for path in ("/health", "/ready"):
        answer = ask(app, path=path)
        assert (answer.status_code, answer.json()["status"]) == (503, "fault")
        assert answer.headers["Retry-After"].isdigit()
    assert "the model broke" in ask(app, path="/health").json()["reason"]
    assert ask(app, "POST", "/v1/completions", json=failing).status_code == 503
    service.drain()
    assert ask(app, path="/ready").json()["status"] == "draining"


def test_without_metrics():
    assert ask(loading(), path="/metrics").status_code == 200
    app = loading(metrics=False)
    assert ask(app, path="/metrics").status_code == 404
    assert "/metrics" not in ask(app, path="/openapi.json").json()["paths"]


def test_documents_need_no_network():
    """Every route and field of the description is on the page, and nothing is fetched for it."""
    app = loading()
    description = ask(app, path="/openapi.json").json()
    answer = ask(app, path="/docs")
    assert answer.headers["Content-Type"].startswith("text/html")
    for path, methods in description["paths"].items():
        for method in methods:
            assert f"<h2>{method.upper()} {path}</h2>" in answer.text
    fields = description["components"]["schemas"]["CompletionRequest"]["properties"]
    assert len(fields) > 15
    for field in fields:
        assert f"<td>{field}<" in answer.text
    assert "<script" not in answer.text
    assert re.findall(r'(?:src|href)="?([^" >]*)', answer.text) == ["openapi.json"]


def test_documents_escape_what_they_show():
    info = {"title": "<b>", "version": "1"}
    schema = {"properties": {"<i>": {"description": "<u>", "enum": ["<s>"]}}}
    route = {
        "summary": "<q>",
        "requestBody": {"content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "<a>"}},
    }
    text = docs_page({"info": info, "paths": {"/<x>": {"get": route}}})
    for tag in ("<b>", "<i>", "<u>", "<s>", "<q>", "<a>", "<x>"):
        assert tag not in text
        assert tag.replace("<", "&lt;").replace(">", "&gt;") in text


def test_files_of_the_page(tmp_path, monkeypatch):
    """They are open, though the rest needs a key, and nothing else of the disk is."""
    (tmp_path / "index.html").write_text("<p>page")
    (tmp_path / "chat.js").write_text("script")
    (tmp_path / "chat.css").write_text("style")
    monkeypatch.setattr(app_module, "PAGE", tmp_path)
    app = loading(api_keys=("key",))
    for path, kind, content in (
        ("/", "text/html", "<p>page"),
        ("/chat.js", "text/javascript", "script"),
        ("/chat.css", "text/css", "style"),
    ):
        answer = ask(app, path=path)
        assert (answer.status_code, answer.text) == (200, content)
        assert answer.headers["Content-Type"].startswith(kind)
    for path in ("/index.html", "/app.py", "/../app.py", "/%2e%2e/app.py"):
        assert ask(app, path=path).status_code == 401
    assert (
        ask(app, path="/%2e%2e/app.py", headers={"Authorization": "Bearer key"}).status_code == 404
    )


def test_refusals_are_counted():
    app = loading(api_keys=("key",), allowed_hosts=("127.0.0.1",), max_body_bytes=10)
    key = {"Authorization": "Bearer key"}
    ask(app, path="/nothing", headers=key)
    ask(app, path="/v1/models")
    ask(app, path="/v1/models", headers={"Host": "evil"})
    ask(app, "POST", "/v1/completions", headers=key, content=b"x" * 11)
    ask(app, "POST", "/v1/completions", headers=key, content=b"{}")
    ask(app, path="/health")
    ask(app, path="/ready")  # red, but asked by a machine, every second
    registry = app.state.service.metrics.registry

    def count(reason):
        labels = {"model_name": "m", "reason": reason}
        return registry.get_sample_value("compress:requests_rejected_total", labels)

    assert count("unauthorized") == 1
    assert count("forbidden") == 1
    assert count("too_large") == 1
    assert count("invalid") == 1
    assert count("not_found") == 1
    assert count("unavailable") is None
    model = {"model": "m", "prompt": "x"}
    app = loading()
    ask(app, "POST", "/v1/completions", json=model)
    registry = app.state.service.metrics.registry
    assert count("unavailable") == 1


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/docs", "/nothing"])
def test_a_method_that_a_path_does_not_take(path):
    answer = ask(loading(), "DELETE", path)
    assert answer.status_code == (404 if path == "/nothing" else 405)
    assert answer.json()["error"]["message"]
