"""The page of a plan, in a real browser: its numbers are roofline.py's, its controls work by
keyboard, it asks for nothing outside itself, and no label covers another."""

import itertools
import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from compress.devices import DEVICES
from compress.planning.page import write_page
from compress.roofline import (
    Device,
    Efficiency,
    Mla,
    ModelShape,
    Precision,
    decode,
    expected_tokens,
    kv_bytes,
    kv_bytes_per_token,
    largest_batch,
    memory,
    parameters,
    precision,
    prefill,
    speculative_speedup,
    time_of,
    weight_bytes,
)

# Both sides compute in double precision, in sums of some tens of terms in another order at most.
CLOSE = 1e-9

LLAMA = ModelShape("Llama-2-7B", 4096, 11008, 32, 32, 128, 32, 32000)
SHAPES = {
    "llama": LLAMA,
    "tied, biases, norms on queries and keys": ModelShape(
        "tied", 896, 4864, 14, 2, 64, 24, 151936, tied=True, max_context=32768, qkv_bias=True,
        out_bias=True, mlp_bias=True, head_bias=True, norm_bias=True, qk_norm="head",
    ),
    "windows, four norms": ModelShape(
        "windows", 2304, 9216, 8, 4, 256, 26, 256000, tied=True, windows=(4096, None) * 13, norms=4,
        qk_norm="all",
    ),
    "latents": ModelShape(
        "latents", 2048, 10944, 16, 16, 128, 27, 102400, mla=Mla(512, 64, 128, 128, 1536),
        qkv_bias=True,
    ),
    "shared caches, a table of positions": ModelShape(
        "shared", 1024, 4096, 16, 1, 64, 21, 50000, gated=False, kv_share=4, positions=2048,
        windows=(512, None, 128) * 7,
    ),
}  # fmt: skip
OWN = Device(
    "own", 24 * 10**9, 0.9e12, {"bf16": 165e12},
    efficiency=Efficiency(bandwidth=0.8, matmul=0.6, overhead=2e-4), source="measured",
)  # fmt: skip
DEVICE_LIST = [OWN, *DEVICES.values()]
REFERRING = {"src", "href", "xlink:href", "data", "action", "srcset", "poster", "background"}


# The browser


def chromium_program():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    program, driver = chromium_program(), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no Chromium with a chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        started = webdriver.Chrome(options=options, service=Service(driver))
    except WebDriverException as error:
        pytest.skip(f"Chromium does not start: {error.msg}")
    started.set_script_timeout(60)
    yield started
    started.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page of a model; at the end nothing was logged, and nothing outside asked for."""
    pages = []

    def show(shape=LLAMA, numbers=None, device=DEVICES["h100"], size=(1280, 900), **more):
        path = tmp_path / f"plan{len(pages)}.html"
        load = {"batch": 8, "context": 1024, "new_tokens": 256} | more
        write_page(path, shape, numbers or precision("bf16"), device, **load)
        pages.append(path.as_uri())
        resize(browser, *size)
        browser.get(path.as_uri())
        return browser

    browser.get("about:blank")  # off the page that a browser starts with, or the one before
    browser.get_log("performance")
    browser.get_log("browser")
    yield show
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert pages
    assert set(urls) == set(pages)


def resize(browser, width, height, scheme="light"):
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def element(browser, name):
    return browser.find_element("id", name)


def shown(browser, name):
    """The number in full that stands behind a text."""
    return float(element(browser, name).get_property("value"))


def put(browser, name, value):
    """Set a control as a user's input would."""
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', { bubbles: true }));", name, str(value),
    )  # fmt: skip


def settled(browser):
    """After the next frame, in which observers of sizes have drawn."""
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")


# Numbers


def with_method(shape, method, detail):
    if method == "mha":
        return replace(shape, mla=None, kv_heads=shape.heads)
    if method == "gqa":
        return replace(shape, mla=None, kv_heads=detail)
    if method == "mla":
        usual = Mla(detail, 64, shape.head_dim, shape.head_dim, None)
        return replace(shape, mla=replace(shape.mla, kv_rank=detail) if shape.mla else usual)
    if method == "window":
        windows = tuple(detail if w is None else min(w, detail) for w in shape.windows)
        return replace(shape, windows=windows)
    return replace(shape, kv_share=detail) if method == "shared" else shape


def expected(shape, numbers, device, batch, context, tokens, draft, acceptance, cost):
    """What the page should say, by compress.roofline."""

    def latency(at):
        step = time_of(decode(shape, numbers, batch, at), device, numbers).seconds
        if not draft:
            return step
        check = decode(shape, numbers, batch, at + draft, draft + 1)
        check_time = time_of(check, device, numbers).seconds
        return (check_time + draft * cost * step) / expected_tokens(acceptance, draft)

    works = {
        "prefill": prefill(shape, numbers, batch, context),
        "decode": decode(shape, numbers, batch, context),
    }
    steps = {name: time_of(work, device, numbers) for name, work in works.items()}
    held = memory(shape, numbers, batch, context + tokens)
    first = steps["prefill"].seconds
    return {
        "works": {n: {"flops": dict(w.flops), "bytes": dict(w.bytes)} for n, w in works.items()},
        "parts": {n: {p: t.seconds for p, t in s.parts.items()} for n, s in steps.items()},
        "limits": {n: {p: t.limit for p, t in s.parts.items()} for n, s in steps.items()},
        "limit": {name: step.limit for name, step in steps.items()},
        "latency": latency(context),
        "first": first,
        "throughput": batch / latency(context),
        "answer": first + tokens * latency(context + tokens // 2),
        "weights": held.weights,
        "kv": held.kv,
        "largest": largest_batch(shape, numbers, device, context + tokens),
        "kvPerToken": kv_bytes_per_token(shape, numbers),
        "kvPerSequence": kv_bytes(shape, numbers, context + tokens),
        "parameters": parameters(shape).total,
        "weightBytes": weight_bytes(shape, numbers),
        "closed": speculative_speedup(acceptance, draft, cost),
    }


PAGE_SAYS = """
const [shape, cases] = arguments;
const only = (o, key) => Object.fromEntries(Object.entries(o).map(([n, v]) => [n, v[key]]));
return cases.map(([method, detail, precision, device, batch, context, tokens, draft, acceptance, cost]) => {
  const changed = plan.withMethod(shape, method, detail);
  const all = plan.predict({ shape: changed, precision, device, batch, context, tokens, draft, acceptance, cost });
  const { prefill, decode } = all.steps;
  return {
    works: all.works,
    parts: { prefill: only(prefill.parts, "seconds"), decode: only(decode.parts, "seconds") },
    limits: { prefill: only(prefill.parts, "limit"), decode: only(decode.parts, "limit") },
    limit: { prefill: prefill.limit, decode: decode.limit },
    latency: all.latency, first: all.first, throughput: all.throughput, answer: all.answer,
    weights: all.memory.weights, kv: all.memory.kv, largest: all.largest,
    kvPerToken: all.kvPerToken, kvPerSequence: all.kvPerSequence, parameters: all.parameters,
    weightBytes: plan.weightBytes(changed, precision),
    closed: plan.speculativeSpeedup(acceptance, draft, cost),
  };
});
"""


def flat(value, path=""):
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}/{key}").items()}
    return {path: value}


def assert_same(found, wanted):
    found, wanted = flat(found), flat(wanted)
    assert found.keys() == wanted.keys()
    words = {key for key, value in wanted.items() if isinstance(value, str)}
    assert {key: found[key] for key in words} == {key: wanted[key] for key in words}
    numbers = wanted.keys() - words
    assert {k: found[k] for k in numbers} == pytest.approx({k: wanted[k] for k in numbers}, rel=CLOSE)


@pytest.mark.parametrize("name", SHAPES)
def test_the_formulas_are_those_of_roofline(opened, name):
    shape = SHAPES[name]
    methods = [
        ("model", None), ("mha", None), ("gqa", 1), ("gqa", 2), ("mla", 512), ("mla", 192),
        ("window", 100), ("window", 3000), ("shared", 2), ("shared", 5),
    ]  # fmt: skip
    loads = [(1, 1024, 0), (64, 1000, 257), (2, 3, 5), (2000, 64, 1), (7, 131072, 4096)]
    drafts = [(0, 0.7, 0.1), (4, 0.8, 0.11), (16, 1.0, 0.0), (3, 0.0, 1.5)]
    precisions = [
        precision("bf16"),
        precision("fp8", "int8"),
        precision("w8a8", "fp8", head="int8"),
        precision("int4-g64", "int4", embeddings="int8", head="bf16"),
        Precision(weights=2.7, embeddings=5.1, head=3.3, kv=2.25),
    ]
    cases, wanted = [], []
    for number, ((method, detail), load, draft) in enumerate(
        itertools.product(methods, loads, drafts)
    ):
        for device in DEVICE_LIST[number % 2 :: 2]:
            numbers = precisions[len(cases) % len(precisions)]
            cases.append([method, detail, asdict(numbers), asdict(device), *load, *draft])
            changed = with_method(shape, method, detail)
            wanted.append(expected(changed, numbers, device, *load, *draft))
    found = opened(shape).execute_script(PAGE_SAYS, asdict(shape), cases)
    assert len(found) == len(wanted) >= 160
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)
    for step in ("prefill", "decode"):  # the grid lies on both sides of the roof's corner
        assert {w["limit"][step] for w in wanted} >= {"compute", "memory"}


FACTS = ("latency", "throughput", "first", "answer", "largest")


def assert_shows(browser, shape, numbers, device, *load):
    wanted = expected(shape, numbers, device, *load)
    assert {f: shown(browser, f) for f in FACTS} == pytest.approx(
        {f: wanted[f] for f in FACTS}, rel=CLOSE
    )
    assert shown(browser, "bar-weights") == pytest.approx(wanted["weights"], rel=CLOSE)
    assert shown(browser, "bar-kv") == pytest.approx(wanted["kv"], rel=CLOSE)
    free = device.memory - wanted["weights"] - wanted["kv"]
    assert shown(browser, "bar-free") == pytest.approx(free, rel=CLOSE, abs=1)  # a difference
    assert element(browser, "limit").get_property("value") == wanted["limit"]["decode"]


def test_it_begins_with_what_was_given(opened):
    numbers = precision("int4-g64", "int8", embeddings="int8")
    more = {"draft_length": 5, "acceptance": 0.83, "draft_cost": 0.07}
    page = opened(numbers=numbers, device=OWN, batch=37, context=1500, new_tokens=77, **more)
    assert_shows(page, LLAMA, numbers, OWN, 37, 1500, 77, 5, 0.83, 0.07)
    assert [element(page, f"{name}-number").get_property("value") for name in ("batch", "context")] == [
        "37", "1500",
    ]  # fmt: skip
    assert "4.25 bits" in element(page, "weights-output").text
    assert element(page, "kv-output").text.startswith("int8")
    assert "own" in element(page, "device").text
    assert "measured" in element(page, "device-source").text
