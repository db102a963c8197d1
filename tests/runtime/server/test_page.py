"""The chat page in a real browser, served by the real application on a model that has a script.

That nothing is asked for outside of the server the fixture `opened` sees to in each test; that the
browser logs nothing, in each test that expects no refusal.
"""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

import compress.runtime.server as server_package
from compress.runtime.engine import Engine
from compress.runtime.llm import LLM
from tests.browser import Page
from tests.runtime.server.scripted import Bytes, ScriptedModel

FOLDER = Path(server_package.__file__).parent / "page"
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
            return None  # not whole: the server ends the connection
        first = [message]
        return await self.app(
            scope, lambda: _given(first.pop()) if first else receive(), send
        )


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
        more = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        body = json.dumps({"error": error}).encode()
        self.gate.instead.append((status, [(b"content-type", b"application/json"), *more], body, True))

    def stream(self, *events, whole=True):
        """Answer the next question with these events."""
        body = "".join(f"data: {event}\n\n" for event in events).encode()
        self.gate.instead.append((200, [(b"content-type", b"text/event-stream")], body, whole))


def text_chunk(text):
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


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


# An answer


def test_an_answer_comes_piece_by_piece_with_its_facts(opened, quiet):
    page = opened()
    model = page.site.model
    model.answers["When?"] = "Half of it, then **the rest**."
    model.hold_at = 12
    page.ask("When?")
    page.eventually(lambda: page.turns() == ["When?", "Half of it, "], "the first half")
    assert "first token after" in page.text(page.all(".facts")[0])
    page.eventually(lambda: page.text(page["running"]) == "1", "the load")
    # The prompt and 12 tokens are 20 of 16 * 64; the sequence holds two blocks.
    assert page.text(page["kv"]) == "3 %"
    assert page.number("kv") == 2 / 64
    assert page["stop"].is_displayed()
    model.release.set()
    answer = page.answered()
    assert page.turns() == ["When?", "Half of it, then the rest."]
    assert page.text(page.part(answer, "strong")) == "the rest"
    tokens = len("Half of it, then **the rest**.") + 1  # and the one that ends it
    facts = page.text(page.part(answer, ".facts"))
    assert re.fullmatch(rf"{tokens} tokens · first token after [\d,.]+ m?s · [\d,.]+ tokens/s", facts)
    assert page.driver.switch_to.active_element == page["prompt"]
    assert page["prompt"].get_property("value") == ""
    page.eventually(lambda: page.text(page["running"]) == "0", "the load afterwards")
    assert page.text(page["kv"]) == "0 %"


def test_the_times_are_those_that_the_user_saw(opened):
    page = opened()
    page.site.model.delay = 0.02
    page.ask("x" * 50)
    facts = page.text(page.part(page.answered(), ".facts"))
    rate = float(re.search(r"([\d.]+) tokens/s", facts)[1])
    first = float(re.search(r"([\d.]+) ms", facts)[1])
    assert 20 <= first <= 500
    # A step of 20 ms makes at most 50 a second; the machine may be busy with other things.
    assert 10 < rate <= 51


def test_the_conversation_and_the_settings_are_sent(opened, quiet):
    page = opened(model_names=("scripted", "other"))
    site = page.site
    page["settings-button"].click()
    page.put("system", "Be brief.")
    page.put("temperature", "0.5")
    page.put("top_k", "7")
    page.put("seed", "11")
    page.put("max_completion_tokens", "4")
    page["model"].send_keys("other")
    page.ask("first question")
    assert page.text(page.part(page.answered(), ".facts")).endswith("cut off at the limit of tokens")
    system = {"role": "system", "content": "Be brief."}
    first = {"role": "user", "content": "first question"}
    wanted = {
        "model": "other",
        "messages": [system, first],
        "temperature": 0.5,
        "top_k": 7,
        "seed": 11,
        "max_completion_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert site.gate.asked == [wanted]
    page.driver.refresh()  # settings and conversation are still there
    page.eventually(lambda: page.all("option"), "the page")
    assert page.turns() == ["first question", "firs"]
    page["settings-button"].click()
    page.all("button[type=reset]")[0].click()
    page.ask("second")
    page.answered(2)
    messages = [first, {"role": "assistant", "content": "firs"}, {"role": "user", "content": "second"}]
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    assert site.gate.asked[1] == {"model": "other", "messages": messages} | stream


@pytest.mark.parametrize("by", ["button", "escape"])
def test_stopping_frees_the_sequence_and_keeps_the_text(opened, quiet, by):
    from selenium.webdriver.common.keys import Keys

    page = opened()
    page.site.model.delay = 0.005
    page.ask("x" * 2000)
    page.eventually(lambda: len(page.turns()[-1]) > 10, "the beginning")
    if by == "button":
        page["stop"].click()
    else:
        page["prompt"].send_keys(Keys.ESCAPE)
    answer = page.answered()
    page.eventually(lambda: page.site.llm.statistics().running == 0, "the end in the engine", 2)
    assert page.text(page.part(answer, ".facts")).endswith("stopped")
    assert page.text(page.part(answer, ".problem")) == ""
    kept = page.turns()[1]
    assert 10 < len(kept) < 2000
    page.ask("And?")
    page.answered(2)
    assert page.site.gate.asked[1]["messages"][1] == {"role": "assistant", "content": kept}


def test_answers_are_made_anew_and_questions_edited(opened, quiet):
    from selenium.webdriver.common.keys import Keys

    page = opened()
    asked = page.site.gate.asked
    page.ask("one")
    page.answered()
    page.ask("two")
    page.answered(2)
    visible = [b.text for b in page.all("#messages button") if b.is_displayed()]
    assert visible == ["Copy", "Edit", "Copy", "Regenerate"]  # only the last can be changed
    page.choose(".again")
    page.answered(2)
    assert asked[2] == asked[1]
    page.choose(".edit")
    field = page.all(".editor textarea")[0]
    assert page.driver.switch_to.active_element == field
    assert field.get_property("value") == "two"
    field.send_keys(Keys.ESCAPE)
    assert not page.all(".editor")
    page.choose(".edit")
    page.all(".editor textarea")[0].send_keys(" and a half", Keys.ENTER)
    page.answered(2)
    assert page.turns() == ["one", "one", "two and a half", "two and a half"]
    assert asked[3]["messages"] == [*asked[1]["messages"][:2], {"role": "user", "content": "two and a half"}]
    page.choose("#new")
    assert page.turns() == []
    assert page["welcome"].is_displayed()
    page.ask("three")
    page.answered()
    assert asked[4]["messages"] == [{"role": "user", "content": "three"}]


def test_a_new_chat_ends_the_answer_of_the_old_one(opened, quiet):
    page = opened()
    page.site.model.delay = 0.01
    page.ask("x" * 1000)
    page.eventually(lambda: len(page.turns()[-1]) > 5, "the beginning")
    page["new"].click()
    page.site.model.delay = 0
    page.ask("again")
    page.answered()
    assert page.turns() == ["again", "again"]
    page.eventually(lambda: page.site.llm.statistics().running == 0, "the end in the engine", 2)


def test_long_messages_are_typed_and_sent(opened, quiet):
    from selenium.webdriver.common.keys import Keys

    page = opened()
    low = page["prompt"].size["height"]
    page["prompt"].send_keys("a", Keys.SHIFT + Keys.ENTER + Keys.NULL, "b")
    assert page["prompt"].size["height"] > low
    page["prompt"].send_keys(Keys.ENTER)
    page.answered()
    assert page.turns() == ["a\nb", "a\nb"]
    assert page["prompt"].size["height"] == low
    page.ask("  ")  # nothing to send
    page.wait(100)
    assert len(page.turns()) == 2


# What a model writes is text

HOSTILE = (
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 2'>",
    "**<svg onload=window.hit=3>** and `<iframe src=javascript:window.hit=4>`",
    "# <a href=javascript:window.hit=5>x</a>",
    "- <b>item</b>\n  1. <style>*{display:none}</style>",
    "> <object data=x>",
    "|<td onclick=hit()>|b|\n|---|---|\n|</table><script>window.hit=6</script>|c|",
    "```<script>window.hit=7</script>\n</code></pre><script>window.hit=8</script>\n```",
    "[click](javascript:window.hit=9) ![x](http://127.0.0.1:1/x.png) <http://example.org>",
    "</div></article></template><script>window.hit=10</script><!-- &lt; &amp;",
)
PLAIN = {
    "ARTICLE", "BLOCKQUOTE", "BUTTON", "CODE", "DIV", "EM", "FIGCAPTION", "FIGURE", "H3", "LI",
    "OL", "P", "PRE", "SPAN", "STRONG", "TABLE", "TBODY", "TD", "TH", "TR", "UL",
}  # fmt: skip


def test_what_a_model_writes_is_never_html(opened, quiet):
    page = opened()
    page.site.model.answers["hit"] = "\n\n".join(HOSTILE)
    page.ask("hit")
    answer = page.answered()
    assert page.run("return window.hit") is None
    assert page.run("return [...document.scripts].map((s) => s.outerHTML)") == [
        '<script type="module" src="chat.js"></script>'
    ]
    used = page.run("return [...arguments[0].querySelectorAll('*')].map((e) => e.tagName)", answer)
    assert set(used) <= PLAIN
    shown = page.text(page.part(answer, ".text"))
    for tag in ("<script>window.hit = 1</script>", "<img src=x onerror='window.hit = 2'>", "<object data=x>",
                "[click](javascript:window.hit=9)", "![x](http://127.0.0.1:1/x.png)", "&lt; &amp;"):
        assert tag in shown
    attributes = page.run(
        "return [...arguments[0].querySelectorAll('.text *')].flatMap((e) => e.getAttributeNames())", answer
    )
    assert set(attributes) <= {"class", "dir", "tabindex", "type", "start"}


def test_nor_is_what_the_server_says(opened):
    page = opened()
    page.site.refuse(400, "<img src=x onerror='window.hit = 1'>")
    page.ask("<script>window.hit = 2</script>")
    answer = page.answered()
    assert page.text(page.part(answer, ".problem")) == "<img src=x onerror='window.hit = 1'>"
    assert page.turns()[0] == "<script>window.hit = 2</script>"
    assert page.run("return [window.hit, document.images.length]") == [None, 0]


def test_the_browser_itself_would_refuse_html_and_foreign_code(opened):
    page = opened()
    refused = page.driver.execute_async_script("""
      const done = arguments[0], found = [];
      document.addEventListener("securitypolicyviolation", (e) => found.push(e.effectiveDirective));
      const script = document.createElement("script");
      try { script.text = "window.hit = 1"; } catch { found.push("text"); }
      try { document.body.innerHTML = "<p>"; } catch { found.push("innerHTML"); }
      const image = new Image();
      image.src = "http://127.0.0.1:1/x.png";
      fetch("http://127.0.0.1:1/").catch(() => {});
      setTimeout(() => done(found), 200);
    """)
    assert {"text", "innerHTML", "img-src", "connect-src", "require-trusted-types-for"} <= set(refused)


# When things go wrong


def test_errors_are_said_in_words_and_can_be_tried_again(opened):
    page = opened()
    page.site.refuse(429, "the queue is full", Retry_After="3")
    page.ask("hello")
    answer = page.answered()
    assert page.text(page.part(answer, ".problem")) == "the queue is full Try again in 3 s."
    assert page.part(answer, ".again").text == "Try again"
    page.site.gate.instead.append((502, [], b"<html>Bad gateway</html>", True))
    page.choose(".again")
    page.eventually(lambda: len(page.site.gate.asked) == 2, "the second try")
    assert "status 502" in page.text(page.part(page.answered(), ".problem"))
    page.choose(".again")
    page.eventually(lambda: len(page.site.gate.asked) == 3, "the third try")
    page.answered()
    assert page.turns() == ["hello", "hello"]
    assert page.text(page.all(".problem")[-1]) == ""


def test_a_setting_that_the_server_refuses_is_marked(opened):
    page = opened()
    page["settings-button"].click()
    page.put("top_p", "3")
    page["settings-button"].click()
    page.ask("hello")
    answer = page.answered()
    assert "top_p" in page.text(page.part(answer, ".problem"))
    assert page["top_p"].get_attribute("aria-invalid") == "true"
    assert page["top_p"].is_displayed()
    page.put("top_p", "0.9")
    assert page["top_p"].get_attribute("aria-invalid") is None
    page.choose(".again")
    page.eventually(lambda: page.turns() == ["hello", "hello"], "the answer")
    page["seed"].send_keys("1-2")  # no number: not sent at all
    page.ask("more")
    page.wait(100)
    assert len(page.site.gate.asked) == 2
    assert page["prompt"].get_property("value") == "more"


def test_a_server_that_goes_away_amid_an_answer(opened):
    page = opened()
    page.site.stream(text_chunk("Only the beg"), whole=False)
    page.ask("hello")
    problem = page.part(page.answered(), ".problem")
    assert "went away" in page.text(problem)
    assert page.turns() == ["hello", "Only the beg"]
    page.site.stream(text_chunk("Whole, but without an end"))
    page.choose(".again")
    page.eventually(lambda: page.turns()[-1].startswith("Whole"), "the second answer")
    assert "went away" in page.text(page.part(page.answered(), ".problem"))
    page.site.served.stop()
    page.choose(".again")
    page.eventually(lambda: "cannot be reached" in page.text(page.all(".problem")[-1]), "the news")


def test_an_engine_that_fails_amid_an_answer(opened):
    page = opened()
    page.site.model.answers["break"] = "so far\0"
    page.ask("break")
    answer = page.answered()
    assert page.turns() == ["break", "so far"]
    assert len(page.text(page.part(answer, ".problem"))) > 10
    page.ask("and now?")
    page.answered(2)
    assert page.turns()[-1] == "and now?"


def test_a_model_that_is_still_being_loaded(opened):
    page = opened(load=False, wait="#notice:not(:empty)")
    assert page.text(page["notice"]) == "The model is being loaded."
    page.site.service.attach(page.site.llm)
    page.eventually(lambda: page.all("option"), "the model")
    assert page.text(page["notice"]) == ""
    page.ask("hello")
    page.answered()


def test_without_metrics_there_is_no_load_and_one_question_for_it(opened):
    page = opened(metrics=False)
    page.ask("hello")
    page.answered()
    page.wait(1200)
    assert not page["load"].is_displayed()
    assert page.site.gate.paths.count("/metrics") <= 2  # one for each time that the page was opened


# The API key


def test_the_key_is_asked_for_and_kept_in_the_tab_alone(opened):
    from selenium.webdriver.common.keys import Keys

    page = opened(api_keys=("s3cret",), wait="dialog[open]")
    assert "API key" in page.text(page["key-reason"])
    assert page.driver.switch_to.active_element == page["key"]
    page["key"].send_keys("wrong", Keys.ENTER)
    page.eventually(lambda: page.site.gate.headers[-1].get(b"authorization") == b"Bearer wrong", "a try")
    page.eventually(lambda: page.all("dialog[open]"), "the second question")
    assert page["key"].get_property("value") == ""
    page["key"].send_keys("k\u00e9y \u20ac", Keys.ENTER)
    page.eventually(lambda: "cannot be sent" in page.text(page["key-reason"]), "a third question")
    page["key"].send_keys("s3cret", Keys.ENTER)
    page.eventually(lambda: page.all("option"), "the models")
    assert not page.all("dialog[open]")
    page.ask("hello")
    page.answered()
    assert page.turns() == ["hello", "hello"]
    page.eventually(lambda: page["load"].is_displayed(), "the load, which needs the key too")
    kept = page.run("return [localStorage.length, document.cookie, sessionStorage['compress.key']]")
    assert kept == [0, "", "s3cret"]
    page.driver.refresh()
    page.eventually(lambda: page.all("option"), "the models, without being asked")
    page.run("sessionStorage.setItem('compress.key', 'old')")  # as if the server had a new key
    page.ask("more")
    page.eventually(lambda: page.all("dialog[open]"), "the question for the new key")
    page["key"].send_keys("s3cret", Keys.ENTER)
    page.answered(2)
    assert page.turns()[2:] == ["more", "more"]


def test_who_has_no_key_is_told_so(opened):
    from selenium.webdriver.common.keys import Keys

    page = opened(api_keys=("s3cret",), wait="dialog[open]")
    page["key"].send_keys(Keys.ESCAPE)
    page.eventually(lambda: "API key" in page.text(page["notice"]), "the reason")
    page["settings-button"].click()
    page["key-button"].click()
    page["key"].send_keys("s3cret", Keys.ENTER)
    page.eventually(lambda: page.all("option"), "the models")
    assert page.text(page["notice"]) == ""


# How it looks


LONG = "w" * 300 + "\n\n```\n" + "code " * 80 + "\n```\n\n" + "|" + "wide cell " * 9 + "|b|\n|-|-|\n|c|d|"
STICKS_OUT = """
const page = document.documentElement, found = [];
if (page.scrollWidth > page.clientWidth) found.push(`page is ${page.scrollWidth} wide`);
for (const node of document.querySelectorAll("body *")) {
  if (node.closest("pre, .scroll, .hidden, template, option") || !node.getClientRects().length) continue;
  const box = node.getBoundingClientRect();
  if (box.right > page.clientWidth + 0.5 || box.left < -0.5) found.push(node.outerHTML.slice(0, 80));
}
return found;
"""


@pytest.mark.parametrize("size", [(1280, 900), (768, 1000), (360, 740)])
def test_nothing_sticks_out(opened, quiet, size):
    page = opened(size=size, model_names=("a-model-of-a-very-long-name-" * 3,))
    assert page.run("return document.documentElement.scrollHeight") <= size[1]
    page.site.model.answers["long " + "q" * 200] = LONG
    page.ask("long " + "q" * 200)
    page.answered()
    assert page.run(STICKS_OUT) == []
    page.all(".edit")[-1].click()
    page["settings-button"].click()
    assert page.run(STICKS_OUT) == []
    assert page["settings-button"].get_attribute("aria-expanded") == "true"
    assert page["key-button"].is_displayed()
    page["settings-button"].click()
    page.all(".editor .cancel")[0].click()
    low = page.run("return document.querySelector('footer').getBoundingClientRect().bottom")
    assert low <= size[1]  # the field stays in view


def test_the_end_stays_in_view_unless_the_user_looks_elsewhere(opened, quiet):
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


CONTRAST = """
const read = (css) => css.match(/[\\d.]+/g).map(Number);
const light = (rgb) => { const [r, g, b] = rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
function behind(node) {
  for (; node; node = node.parentElement) {
    const c = read(getComputedStyle(node).backgroundColor);
    if (c.length === 3) return c;
  }
  return [255, 255, 255];
}
return [...document.querySelectorAll("body *")].filter((n) => n.getClientRects().length &&
  [...n.childNodes].some((c) => c.nodeType === 3 && c.data.trim())).map((n) => {
  const [a, b] = [light(read(getComputedStyle(n).color).slice(0, 3)), light(behind(n))].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), n.outerHTML.slice(0, 60)];
}).filter(([ratio]) => ratio < 4.5);
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
    dark = page.run("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
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
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, (e) => done(`${e}`))"
    for button, wanted in ((".code .copy", "x = 1"), (".answer > .under .copy", text)):
        page.all(button)[0].click()
        page.eventually(lambda button=button: page.all(button)[0].text == "Copied", "the copy")
        assert page.driver.execute_async_script(read) == wanted
    # Where there is no clipboard, as in a page by plain http from another machine, the old way.
    page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })")
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
            sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(|import\("
            assert not re.search(sinks, text), file
            assert set(re.findall(r'from "(.*)"', text)) <= {f"./{f.name}" for f in FOLDER.iterdir()}
