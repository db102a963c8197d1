"""How the page of a plan is made and laid out: harmless, self-contained, readable, accessible."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from compress.devices import DEVICES
from compress.planning.page import write_page
from compress.roofline import Device, Efficiency, precision

OWN = Device(
    "own", 24 * 10**9, 0.9e12, {"bf16": 165e12},
    efficiency=Efficiency(bandwidth=0.8, matmul=0.6, overhead=2e-4), source="measured",
)  # fmt: skip
REFERRING = {"src", "href", "xlink:href", "data", "action", "srcset", "poster", "background"}


# What it is made of


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_nothing_in_it_reaches_outside(tmp_path, llama):
    write_page(
        tmp_path / "p.html", llama, precision(), OWN, batch=1, context=1024, new_tokens=1
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


def test_names_are_text_and_nothing_else(opened, llama):
    hostile = "</script><script>window.hit = 1</script><!--<script>&amp;\u2028'\""
    shape = replace(llama, name=hostile)
    device = replace(OWN, name=hostile, source=f"<img src=x onerror='window.hit = 2'>{hostile}")
    page = opened(shape=shape, device=device)
    assert page.run("return window.hit") is None
    data = page.run("return JSON.parse(document.getElementById('data').textContent)")
    assert data["shape"]["name"] == hostile
    assert page.all("h1")[0].get_property("textContent").startswith(hostile)
    assert page["device-source"].get_property("textContent") == device.source
    assert page.number("latency") > 0


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
  const texts = [...svg.querySelectorAll("text")];
  const boxes = texts.map((t) => [t.textContent, t.getBoundingClientRect()]);
  boxes.forEach(([text, a], n) => {
    if (a.left < frame.left - near || a.right > frame.right + near || a.top < frame.top - near ||
        a.bottom > frame.bottom + near) found.push(`${svg.id}: ${text} sticks out`);
    for (const [other, b] of boxes.slice(n + 1)) {
      const aside = a.left >= b.right - near || b.left >= a.right - near;
      const above = a.top >= b.bottom - near || b.top >= a.bottom - near;
      if (!aside && !above) found.push(`${svg.id}: ${text} on ${other}`);
    }
  });
}
const page = document.documentElement;
if (page.scrollWidth > page.clientWidth) found.push(`page is ${page.scrollWidth} wide`);
const kinds = "label, input, select, output, dt, dd, h1, h2, p, li, small";
for (const node of document.querySelectorAll(kinds)) {
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
                page.put(name, value)
            page.wait()
            assert page.run(OVERLAPS) == [], state


def test_every_control_has_a_name_and_every_chart_words(opened):
    page = opened()
    page.put("device", 6)  # one of one's own: shows all fields
    controls = page.all("input, select, button")
    named = [c.accessible_name for c in controls if c.is_displayed()]
    assert all(named)
    assert len(set(named)) == len(named) >= 20
    assert page["said"].get_attribute("aria-live") == "polite"
    for chart in page.all("svg"):
        assert re.search(r"\d", chart.accessible_name), chart.get_attribute("id")
    ids = page.run("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(set(ids)) == len(ids)
    referred = page.run(
        "return [...document.querySelectorAll('[for], [aria-labelledby], [aria-describedby]')]"
        ".flatMap((e) => ['for', 'aria-labelledby', 'aria-describedby']"
        ".map((n) => e.getAttribute(n)).filter(Boolean))"
    )
    assert set(referred) <= set(ids)
    text = page.all("body")[0].text
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
const kinds = "h1, h2, h3, p, li, label, legend, dt, dd, small, td, th, output, a, svg text";
for (const node of document.querySelectorAll(kinds)) {
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
    page.resize(1280, 900, scheme)
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    assert page.run(CONTRAST) == []
