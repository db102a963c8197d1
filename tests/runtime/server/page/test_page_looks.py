"""How the chat page is laid out and made: readable, accessible, self-contained."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import compress.runtime.server as server_package

FOLDER = Path(server_package.__file__).parent / "page"

# How it is laid out

LONG = (
    "w" * 300
    + "\n\n```\n"
    + "code " * 80
    + "\n```\n\n"
    + "|"
    + "wide cell " * 9
    + "|b|\n|-|-|\n|c|d|"
)
STICKS_OUT = """
const page = document.documentElement, found = [];
if (page.scrollWidth > page.clientWidth) found.push(`page is ${page.scrollWidth} wide`);
for (const node of document.querySelectorAll("body *")) {
  if (node.closest("pre, .scroll, .hidden, option") || !node.getClientRects().length) continue;
  const { left, right } = node.getBoundingClientRect();
  if (right > page.clientWidth + 0.5 || left < -0.5) found.push(node.outerHTML.slice(0, 80));
}
return found;
"""


@pytest.mark.parametrize("size", [(1280, 900), (768, 1000), (360, 740)])
def test_nothing_sticks_out(opened, quiet, size):
    page = opened(size=size, model_names=("a-model-of-a-very-long-name-" * 3,))
    assert page.run("return document.documentElement.scrollHeight") <= size[1]
    page.site.model.answers["long " + "q" * 200] = LONG
    page.put("prompt", "long " + "q" * 200)
    page.ask("")
    page.answered()
    assert page.run(STICKS_OUT) == []
    page.choose(".edit")
    page["settings-button"].click()
    assert page.run(STICKS_OUT) == []
    assert page["settings-button"].get_attribute("aria-expanded") == "true"
    assert page["key-button"].is_displayed()
    page["settings-button"].click()
    page.all(".editor .cancel")[0].click()
    low = page.run("return document.querySelector('footer').getBoundingClientRect().bottom")
    assert low <= size[1]  # the field stays in view


def test_the_end_stays_in_view_unless_the_user_looks_elsewhere(opened):
    page = opened(size=(800, 600))
    page.site.model.answers["lines"] = "\n\n".join(f"line {n}" for n in range(60))
    page.site.model.hold_at = 400
    page.ask("lines")
    at_end = "return innerHeight + scrollY >= document.documentElement.scrollHeight - 40"
    page.eventually(lambda: "line 40" in page.turns()[-1], "two thirds")
    assert page.run(at_end)
    assert page.run("return scrollY") > 200
    page.run("scrollTo(0, 0)")
    page.site.model.release.set()
    page.answered()
    assert page.run("return scrollY") == 0
    page.site.refuse(500, "an error")
    page.ask("who asks wants to see what comes")
    page.answered(2)
    assert page.run(at_end)


CONTRAST = """
const read = (css) => css.match(/[\\d.]+/g).map(Number);
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
function luminance(rgb) {
  const [r, g, b] = rgb.map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
}
function behind(node) {
  for (; node; node = node.parentElement) {
    const colour = read(getComputedStyle(node).backgroundColor);
    if (colour.length === 3) return colour; // with a fourth number it is transparent
  }
}
const hasText = (node) => [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
const found = [];
for (const node of document.querySelectorAll("body *")) {
  if (!node.getClientRects().length || !hasText(node)) continue;
  const one = luminance(read(getComputedStyle(node).color)), other = luminance(behind(node));
  const ratio = Math.max(one, other) / Math.min(one, other);
  if (ratio < 4.5) found.push([ratio, node.outerHTML.slice(0, 60)]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(opened, scheme):
    page = opened(size=(1280, 900, scheme))
    page.site.model.answers["all"] = "# a\n\n`b` **c**\n\n> d\n\n```\ne\n```"
    page.ask("all")
    page.answered()
    page.site.refuse(500, "an error")
    page.ask("more")
    page.answered(2)
    page["settings-button"].click()
    assert page.run(CONTRAST) == []  # WCAG 2.2, 1.4.3
    dark = (
        page.run("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    )
    assert dark == (scheme == "dark")


def test_every_control_has_a_name_and_can_be_reached_by_key(opened, quiet):
    from selenium.webdriver.common.keys import Keys

    page = opened()
    page.ask("```\ncode\n```")
    page.answered()
    page["settings-button"].click()
    controls = [c for c in page.all("input, select, textarea, button") if c.is_displayed()]
    names = [c.accessible_name for c in controls]
    assert all(names)
    assert len(set(names)) == len(names) >= 15
    page.run("document.activeElement.blur(); scrollTo(0, 0)")
    reached = []
    for _ in range(len(controls) + 3):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.driver.switch_to.active_element)
    assert {c.id for c in controls} <= {r.id for r in reached}
    status = page.text(page["announcement"])
    assert status == "The answer is complete."
    assert page["announcement"].aria_role == "status"


def test_copies(opened, quiet):
    page = opened()
    text = "Look:\n\n```python\nx = 1\n```"
    page.site.model.answers["code"] = text
    page.ask("code")
    answer = page.answered()
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"origin": page.site.url, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    read = (
        "const done = arguments[0]; navigator.clipboard.readText().then(done, (e) => done(`${e}`))"
    )
    for button, wanted in ((".code .copy", "x = 1"), (".answer > .under .copy", text)):
        page.all(button)[0].click()
        page.eventually(lambda button=button: page.all(button)[0].text == "Copied", "the copy")
        assert page.driver.execute_async_script(read) == wanted
    # Where there is no clipboard, as in a page by plain http from another machine, the old way.
    page.run(
        "Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })"
    )
    page.part(answer, ".code .copy").click()
    page.run("delete navigator.clipboard")
    page.eventually(lambda: page.all(".code .copy")[0].text == "Copied", "the copy")
    assert page.driver.execute_async_script(read) == "x = 1"


# What it is made of


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_it_has_nothing_inline_and_nothing_from_elsewhere():
    for tag, attributes in Elements((FOLDER / "index.html").read_text(encoding="utf-8")).found:
        assert tag not in {"style", "img", "iframe", "object", "embed", "base"}
        assert tag != "script" or attributes["src"] == "chat.js"
        for name, value in attributes.items():
            assert name != "style"
            assert not name.startswith("on")
            if name in ("href", "src"):
                assert (FOLDER / value).is_file()
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|@import|url\(", text), file
        if file.suffix == ".js":
            sinks = (
                r"innerHTML|outerHTML|AdjacentHTML|document\.write|\beval\b|\bFunction\(|import\("
            )
            assert not re.search(sinks, text), file
            assert set(re.findall(r'from "(.*)"', text)) <= {
                f"./{f.name}" for f in FOLDER.iterdir()
            }
