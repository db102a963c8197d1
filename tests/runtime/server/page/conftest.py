"""The chat page, open in a real browser, served by the real application."""

import asyncio
import json
import time

import pytest

from compress.runtime.engine import Engine
from compress.runtime.llm import LLM
from tests.browser import Page
from tests.runtime.server.page.scripted import Bytes, ScriptedModel

CHAT = "/v1/chat/completions"


class Gate:
    """Stands before an application: keeps what chat was asked, and may answer in its place."""

    def __init__(self, app):
        self.app = app
        self.asked = []  # bodies
        self.headers = []  # of all requests
        self.paths = []
        self.instead = []  # (status, headers, body, whether it is whole), for the next of chat

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        self.paths.append(scope["path"])
        self.headers.append(dict(scope["headers"]))
        if scope["path"] != CHAT:
            return await self.app(scope, receive, send)
        message = await receive()
        assert not message.get("more_body")
        self.asked.append(json.loads(message["body"]))
        if self.instead:
            status, headers, body, whole = self.instead.pop(0)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": not whole})
            if not whole:
                await asyncio.sleep(0.2)  # until the browser has given the page what there is
            return None  # not whole: the server ends the connection
        first = [message]
        return await self.app(scope, lambda: _given(first.pop()) if first else receive(), send)


async def _given(message):
    return message


class Site:
    """A server with a scripted model; `model` is None until it is loaded."""

    def __init__(self, serve, load=True, **settings):
        from compress.runtime.server.app import make_app
        from compress.runtime.server.service import ServerSettings, Service

        self.model = ScriptedModel()
        engine = Engine(
            self.model, 64, max_sequences=4, seed=3, tokenizer=Bytes(), eos_ids={Bytes.eos_token_id}
        )
        self.llm = LLM.from_engine(engine, Bytes())
        self.service = Service(ServerSettings(**{"model_names": ("scripted",)} | settings))
        if load:
            self.service.attach(self.llm)
        self.gate = Gate(make_app(self.service))
        self.served = serve(self.gate)
        self.url = self.served.url + "/"

    def refuse(self, status, message, param=None, **headers):
        """Answer the next question with an error."""
        error = {"message": message, "type": "x", "param": param, "code": None}
        more = [
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        ]
        body = json.dumps({"error": error}).encode()
        self.gate.instead.append(
            (status, [(b"content-type", b"application/json"), *more], body, True)
        )

    def stream(self, *events, whole=True):
        """Answer the next question with these events."""
        body = "".join(f"data: {event}\n\n" for event in events).encode()
        self.gate.instead.append((200, [(b"content-type", b"text/event-stream")], body, whole))


class Chat(Page):
    """The open page."""

    def ask(self, text):
        from selenium.webdriver.common.keys import Keys

        self["prompt"].send_keys(text, Keys.ENTER)

    def eventually(self, condition, what="it", seconds=8):
        """Wait until `condition()` holds."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"{what} did not come: {self.text(self.body)[-400:]!r}"
            time.sleep(0.01)
        return found

    def answered(self, count=1):
        """The last answer, once there are so many and none is under way."""
        self.eventually(
            lambda: len(self.all(".answer")) == count and not self.all(".answering"), "the answer"
        )
        return self.all(".answer")[-1]

    @property
    def body(self):
        return self.all("body")[0]

    def text(self, element):
        return element.get_property("textContent")

    def turns(self):
        return [self.text(e) for e in self.all("#messages > article > .text")]

    def part(self, element, selector):
        return element.find_element("css selector", selector)

    def choose(self, selector):
        """Press a button by keyboard."""
        from selenium.webdriver.common.keys import Keys

        self.all(selector)[-1].send_keys(Keys.ENTER)


@pytest.fixture
def opened(chromium, serve):
    """Opens the page of a new site; at the end, nothing outside of it was asked for."""
    sites = []

    def show(size=(1280, 900), wait="option", **more):
        site = Site(serve, **more)
        sites.append(site)
        page = Chat(chromium)
        page.site = site
        page.resize(*size)
        chromium.get(site.url)
        chromium.execute_script("sessionStorage.clear()")
        chromium.get_log("browser")
        page.eventually(lambda: page.all(wait), "the page")
        return page

    chromium.get("about:blank")
    chromium.get_log("performance")
    chromium.get_log("browser")
    yield show
    chromium.get("about:blank")  # closes its connections, which a server that ends waits for
    for site in sites:
        site.model.release.set()
        site.llm.close()
    events = [json.loads(e["message"])["message"] for e in chromium.get_log("performance")]
    asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    outside = {e["request"]["url"] for e in asked} - {"about:blank"}
    assert all(url.startswith(tuple(site.url for site in sites)) for url in outside), outside


@pytest.fixture
def quiet(chromium):
    """The browser has nothing to say at the end."""
    yield
    assert chromium.get_log("browser") == []
