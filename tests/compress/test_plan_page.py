"""The page of a plan, in a real browser: its numbers are roofline.py's, its controls work by
keyboard, it asks for nothing outside itself, and no label covers another."""

import itertools
import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from compress.core.errors import InputError
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
    link_bytes,
    memory,
    parameters,
    precision,
    prefill,
    shard,
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
    urls = [
        m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"
    ]
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


def expected(shape, numbers, device, batch, context, tokens, draft, acceptance, cost, devices=1):
    """What the page should say, by compress.roofline."""
    part = shard(shape, devices)

    def time(work, rows):
        return time_of(work, device, numbers, link_bytes(shape, rows, devices))

    def latency(at):
        step = time(decode(part, numbers, batch, at), batch).seconds
        if not draft:
            return step
        check = decode(part, numbers, batch, at + draft, draft + 1)
        check_time = time(check, batch * (draft + 1)).seconds
        return (check_time + draft * cost * step) / expected_tokens(acceptance, draft)

    works = {
        "prefill": prefill(part, numbers, batch, context),
        "decode": decode(part, numbers, batch, context),
    }
    steps = {
        "prefill": time(works["prefill"], batch * context),
        "decode": time(works["decode"], batch),
    }
    held = memory(part, numbers, batch, context + tokens)
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
        "largest": largest_batch(part, numbers, device, context + tokens),
        "kvPerToken": kv_bytes_per_token(shape, numbers),
        "kvPerSequence": kv_bytes(shape, numbers, context + tokens),
        "parameters": parameters(shape).total,
        "weightBytes": weight_bytes(shape, numbers),
        "closed": speculative_speedup(acceptance, draft, cost),
    }


PAGE_SAYS = """
const [shape, cases] = arguments;
const only = (o, key) => Object.fromEntries(Object.entries(o).map(([n, v]) => [n, v[key]]));
return cases.map(([method, detail, precision, device, ...load]) => {
  const [batch, context, tokens, draft, acceptance, cost, devices] = load;
  const changed = plan.withMethod(shape, method, detail);
  if (!plan.divides(changed, devices)) return null;
  const setup = { shape: changed, precision, device, batch, context, tokens, draft, acceptance, cost };
  const all = plan.predict({ ...setup, devices });
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
        return {
            k: v for key, inner in value.items() for k, v in flat(inner, f"{path}/{key}").items()
        }
    return {path: value}


def assert_same(found, wanted):
    found, wanted = flat(found), flat(wanted)
    assert found.keys() == wanted.keys()
    words = {key for key, value in wanted.items() if isinstance(value, str)}
    assert {key: found[key] for key in words} == {key: wanted[key] for key in words}
    numbers = wanted.keys() - words
    assert {k: found[k] for k in numbers} == pytest.approx(
        {k: wanted[k] for k in numbers}, rel=CLOSE
    )


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
            many = (1, 2, 8)[number % 3] if device.link else 1
            cases.append([method, detail, asdict(numbers), asdict(device), *load, *draft, many])
            try:
                changed = with_method(shape, method, detail)
                wanted.append(expected(changed, numbers, device, *load, *draft, many))
            except InputError:  # does not divide
                wanted.append(None)
    found = opened(shape).execute_script(PAGE_SAYS, asdict(shape), cases)
    assert len(found) == len(wanted) >= 160
    assert [one is None for one in found] == [one is None for one in wanted]
    found, wanted = ([one for one in all_ if one] for all_ in (found, wanted))
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)
    assert any("link" in one["parts"]["decode"] for one in wanted)
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
    assert element(page, "devices-output").text == "1 device"
    assert [element(page, f"{name}-number").get_property("value") for name in ("batch", "context")] == [
        "37", "1500",
    ]  # fmt: skip
    assert "4.25 bits" in element(page, "weights-output").text
    assert element(page, "kv-output").text.startswith("int8")
    assert "own" in element(page, "device").text
    assert "measured" in element(page, "device-source").text


# Controls


def press(browser, name, *keys):
    element(browser, name).send_keys(*keys)


def test_the_sliders_move_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    h100 = DEVICES["h100"]
    page = opened()
    press(page, "batch", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)  # 8, 12, 16
    assert_shows(page, LLAMA, precision(), h100, 16, 1024, 256, 0, 0.7, 0.1)
    press(page, "context", Keys.END)
    press(page, "tokens", Keys.HOME)
    assert_shows(page, LLAMA, precision(), h100, 16, 131072, 0, 0, 0.7, 0.1)
    press(page, "context", Keys.ARROW_LEFT)
    assert_shows(page, LLAMA, precision(), h100, 16, 98304, 0, 0, 0.7, 0.1)
    press(page, "weights", Keys.END)  # int2
    press(page, "kv", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)  # bf16, int8 of 8.125 bits, fp8
    numbers = precision("int2", "fp8")
    assert_shows(page, LLAMA, numbers, h100, 16, 98304, 0, 0, 0.7, 0.1)
    assert not element(page, "acceptance").is_enabled()
    press(page, "draft", *[Keys.ARROW_RIGHT] * 5)
    press(page, "acceptance", Keys.ARROW_RIGHT)
    press(page, "cost", Keys.ARROW_LEFT)
    assert_shows(page, LLAMA, numbers, h100, 16, 98304, 0, 5, 0.75, 0.05)
    said = [element(page, n).get_attribute("aria-valuetext") for n in ("context", "kv", "draft")]
    assert said == ["98,304 tokens", "fp8, 8 bits", "5 tokens"]
    press(page, "method", "GQA", Keys.TAB, Keys.ARROW_LEFT)
    press(page, "detail", Keys.HOME)  # one KV head
    one = replace(LLAMA, kv_heads=1)
    assert_shows(page, one, numbers, h100, 16, 98304, 0, 5, 0.75, 0.05)
    press(page, "device", "a100")
    press(page, "devices", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert element(page, "devices").get_attribute("aria-valuetext") == "4 devices"
    assert_shows(page, one, numbers, DEVICES["a100"], 16, 98304, 0, 5, 0.75, 0.05, 4)
    press(page, "device", "cpu")  # has no link
    assert element(page, "devices").get_attribute("aria-valuetext") == "1 device"
    assert not element(page, "devices").is_enabled()
    page.find_element("css selector", "button[type=reset]").send_keys(Keys.ENTER)
    assert_shows(page, LLAMA, precision(), h100, 8, 1024, 256, 0, 0.7, 0.1)


def test_numbers_can_be_typed_and_wrong_ones_do_not_count(opened):
    from selenium.webdriver.common.keys import Keys

    h100 = DEVICES["h100"]
    page = opened()
    everything = (Keys.CONTROL, "a", Keys.NULL)
    press(page, "batch-number", *everything, "37")
    assert_shows(page, LLAMA, precision(), h100, 37, 1024, 256, 0, 0.7, 0.1)
    assert element(page, "batch").get_attribute("aria-valuetext") == "37 sequences"
    for wrong in ("0", "-5", "2.5", "99999999999"):
        press(page, "batch-number", *everything, Keys.BACKSPACE, wrong)
        assert element(page, "batch-number").get_attribute("aria-invalid") == "true"
    before = shown(page, "latency")
    press(page, "batch-number", Keys.TAB)
    assert element(page, "batch-number").get_attribute("aria-invalid") is None
    kept = element(page, "batch-number").get_property("value")
    assert (kept, before) == ("999999", shown(page, "latency"))  # on the way to the last: allowed


def test_each_method_and_a_device_of_ones_own(opened):
    page = opened()
    for method, detail in (("mha", 32), ("gqa", 4), ("mla", 512), ("window", 1024), ("shared", 2)):
        put(page, "method", method)
        changed = with_method(LLAMA, method, detail)
        assert_shows(page, changed, precision(), DEVICES["h100"], 8, 1024, 256, 0, 0.7, 0.1)
    put(page, "method", "model")
    assert not element(page, "custom-memory").is_displayed()
    choices = [o.text for o in element(page, "device").find_elements("tag name", "option")]
    assert choices == ["h100", *(name for name in DEVICES if name != "h100"), "cpu", "custom"]
    put(page, "device", choices.index("custom"))
    assert_shows(page, LLAMA, precision(), DEVICES["h100"], 8, 1024, 256, 0, 0.7, 0.1)
    for name, value in (("memory", 48), ("bandwidth", 864), ("bf16", 362.5), ("fp8", 733)):
        put(page, f"custom-{name}", value)
    put(page, "devices", 1)
    put(page, "custom-link", 25)
    own = Device("custom", 48 * 10**9, 864e9, {"bf16": 362.5e12, "fp8": 733e12}, 25e9)
    put(page, "weights", 2)
    assert element(page, "weights-output").text == "fp8, 8 bits"
    assert_shows(page, LLAMA, precision("fp8"), own, 8, 1024, 256, 0, 0.7, 0.1, 2)


def test_it_says_what_does_not_fit_and_what_is_too_long(opened):
    page = opened(batch=256, context=8192)
    settled(page)
    page.execute_async_script("setTimeout(arguments[0], 500)")  # words follow once a slider rests
    said = element(page, "said").text
    assert "It does not fit" in said
    assert "more than the model was made for (4,096)" in said
    assert "too much for 80 GB" in element(page, "bar-free").text
    assert shown(page, "largest") < 256


# What it is made of


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_nothing_in_it_reaches_outside(tmp_path):
    write_page(
        tmp_path / "p.html", LLAMA, precision(), OWN, batch=1, context=1024, new_tokens=1
    )  # fmt: skip
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    for tag, attributes in Elements(html).found:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in REFERRING or value.startswith("#")
    addresses = set(re.findall(r"[a-z]+://[^\"'\s]*", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of SVG, which nobody fetches
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|eval\(", html)
    assert "default-src 'none'" in html


def test_names_are_text_and_nothing_else(opened):
    hostile = "</script><script>window.hit = 1</script><!--<script>&amp;\u2028'\""
    shape = replace(LLAMA, name=hostile)
    device = replace(OWN, name=hostile, source=f"<img src=x onerror='window.hit = 2'>{hostile}")
    page = opened(shape=shape, device=device)
    assert page.execute_script("return window.hit") is None
    data = page.execute_script("return JSON.parse(document.getElementById('data').textContent)")
    assert data["shape"]["name"] == hostile
    assert page.find_element("tag name", "h1").get_property("textContent").startswith(hostile)
    assert element(page, "device-source").get_property("textContent") == device.source
    assert_shows(page, shape, precision(), device, 8, 1024, 256, 0, 0.7, 0.1)


# How it is laid out


STATES = [
    {},
    {"device": 3, "batch-number": 300, "context-number": 131072},
    {"batch-number": 4096, "context-number": 64, "weights": 3},
    {"batch-number": 250, "context-number": 200},
    {"batch-number": 1, "context-number": 1, "tokens-number": 0},
    {"batch-number": 1000000, "context-number": 100000000, "draft-number": 64, "weights": 6},
    {"method": "mla", "batch-number": 128, "device": 4},
    {"method": "window", "device": 6, "draft-number": 3},
]
OVERLAPS = """
const found = [], near = 0.5;
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect()]);
  boxes.forEach(([text, a], n) => {
    if (a.left < frame.left - near || a.right > frame.right + near || a.top < frame.top - near ||
        a.bottom > frame.bottom + near) found.push(`${svg.id}: ${text} sticks out: ${[a.left - frame.left, a.top - frame.top, frame.right - a.right, frame.bottom - a.bottom]}`);
    for (const [other, b] of boxes.slice(n + 1)) {
      if (a.left < b.right - near && b.left < a.right - near && a.top < b.bottom - near && b.top < a.bottom - near)
        found.push(`${svg.id}: ${text} on ${other}`);
    }
  });
}
const page = document.documentElement;
if (page.scrollWidth > page.clientWidth) found.push(`page is ${page.scrollWidth} wide`);
for (const node of document.querySelectorAll("label, input, select, output, dt, dd, h1, h2, p, li, small")) {
  if (node.closest(".scroll") || !node.getClientRects().length) continue;
  const box = node.getBoundingClientRect();
  if (box.right > page.clientWidth + near) found.push(`${node.tagName} #${node.id} sticks out`);
}
return found;
"""


@pytest.mark.parametrize("size", [(1280, 900), (768, 1000), (360, 740)])
def test_no_label_covers_another_and_nothing_sticks_out(opened, size):
    for device in (DEVICES["h100"], OWN):
        page = opened(device=device, size=size)
        for state in STATES:
            for name, value in state.items():
                put(page, name, value)
            settled(page)
            assert page.execute_script(OVERLAPS) == [], state


def test_every_control_has_a_name_and_every_chart_words(opened):
    page = opened()
    put(page, "device", 6)  # one of one's own: shows all fields
    controls = page.find_elements("css selector", "input, select, button")
    named = [c.accessible_name for c in controls if c.is_displayed()]
    assert all(named)
    assert len(set(named)) == len(named) >= 20
    assert element(page, "said").get_attribute("aria-live") == "polite"
    for chart in page.find_elements("tag name", "svg"):
        assert re.search(r"\d", chart.accessible_name), chart.get_attribute("id")
    ids = page.execute_script("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(set(ids)) == len(ids)
    referred = page.execute_script(
        "return [...document.querySelectorAll('[for], [aria-labelledby], [aria-describedby]')]"
        ".flatMap((e) => ['for', 'aria-labelledby', 'aria-describedby']"
        ".map((n) => e.getAttribute(n)).filter(Boolean))"
    )
    assert set(referred) <= set(ids)
    text = page.find_element("tag name", "body").text
    assert "predictions of a roofline" in text
    assert "What is left out" in text


CONTRAST = """
const lit = (colour) => {
  const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
const low = [];
for (const node of document.querySelectorAll("h1, h2, h3, p, li, label, legend, dt, dd, small, td, th, output, a, svg text")) {
  if (!node.getClientRects().length) continue;
  const style = getComputedStyle(node);
  const a = lit(node.tagName === "text" ? style.fill : style.color), b = lit(behind(node));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) low.push([node.tagName, node.textContent.slice(0, 30), ratio]);
}
return low;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(opened, scheme):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1."""
    page = opened(batch=300)
    resize(page, 1280, 900, scheme)
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    assert page.execute_script(CONTRAST) == []
