"""A plan's page, open in a browser."""

import json

import pytest

from compress.devices import DEVICES
from compress.planning.page import write_page
from compress.roofline import ModelShape, precision
from tests.browser import Page


@pytest.fixture(scope="session")
def llama():
    return ModelShape("Llama-2-7B", 4096, 11008, 32, 32, 128, 32, 32000)


@pytest.fixture
def opened(chromium, tmp_path, llama):
    """Opens a plan's page; at the end nothing was logged, and nothing outside was asked for."""
    paths = []

    def show(shape=llama, numbers=None, device=DEVICES["h100"], size=(1280, 900), **more):
        paths.append(tmp_path / f"plan{len(paths)}.html")
        load = {"batch": 8, "context": 1024, "new_tokens": 256} | more
        write_page(paths[-1], shape, numbers or precision("bf16"), device, **load)
        page = Page(chromium)
        page.resize(*size)
        chromium.get(paths[-1].as_uri())
        return page

    chromium.get("about:blank")  # off the page that a browser starts with, or the one before
    chromium.get_log("performance")
    chromium.get_log("browser")
    yield show
    assert chromium.get_log("browser") == []
    events = [json.loads(e["message"])["message"] for e in chromium.get_log("performance")]
    asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert paths
    assert {event["request"]["url"] for event in asked} == {path.as_uri() for path in paths}
