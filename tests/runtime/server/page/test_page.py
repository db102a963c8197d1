"""The chat page in a real browser, on a model that has a script.

That nothing is asked for outside of the server the fixture `opened` sees to in each test; that the
browser logs nothing, `quiet`, in each test that expects no refusal.
"""

import json
import re

import pytest

USAGE = {"include_usage": True, "continuous_usage_stats": True}


def text_chunk(text):
    return json.dumps(
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    )


# An answer


def test_an_answer_comes_piece_by_piece_with_its_facts(opened, quiet):
    page = opened()
    model = page.site.model
    model.answers["When?"] = "Half of it, then **the rest**."
    model.hold_at = 12
    page.ask("When?")
    page.eventually(lambda: page.turns() == ["When?", "Half of it, "], "the first half")
    facts = "12 tokens · first token after [0-9.]+ m?s · [0-9.,]+ tokens/s"  # so far
    assert re.fullmatch(facts, page.text(page.all(".facts")[0]))
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
    assert re.fullmatch(
        rf"{tokens} tokens · first token after [\d,.]+ m?s · [\d,.]+ tokens/s", facts
    )
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
    first, unit = re.search(r"after ([\d.]+) (m?s)", facts).groups()
    # A step takes 20 ms or more; how much more is the machine's, which may have other work.
    assert 0.02 <= float(first) / {"ms": 1000, "s": 1}[unit] < 5
    assert 2 < rate <= 51


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
    assert page.text(page.part(page.answered(), ".facts")).endswith(
        "cut off at the limit of tokens"
    )
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
        "stream_options": USAGE,
    }
    assert site.gate.asked == [wanted]
    page.driver.refresh()  # settings and conversation are still there
    page.eventually(lambda: page.all("option"), "the page")
    assert page.turns() == ["first question", "firs"]
    page["settings-button"].click()
    page.all("button[type=reset]")[0].click()
    page.ask("second")
    page.answered(2)
    messages = [
        first,
        {"role": "assistant", "content": "firs"},
        {"role": "user", "content": "second"},
    ]
    stream = {"stream": True, "stream_options": USAGE}
    assert site.gate.asked[1] == {"model": "other", "messages": messages} | stream


@pytest.mark.parametrize("by", ["button", "escape"])
def test_stopping_frees_the_sequence_and_keeps_the_text(opened, quiet, by):
    from selenium.webdriver.common.keys import Keys

    page = opened()
    page.site.model.delay = 0.01
    page.site.model.answers["long"] = "x" * 800
    page.ask("long")
    page.eventually(lambda: len(page.turns()[-1]) > 10, "the beginning")
    if by == "button":
        page["stop"].click()
    else:
        page["prompt"].send_keys(Keys.ESCAPE)
    answer = page.answered()
    page.eventually(lambda: page.site.llm.statistics().running == 0, "the end in the engine", 2)
    kept = page.turns()[1]
    facts = page.text(page.part(answer, ".facts"))
    assert facts.startswith(f"{len(kept)} tokens · ")
    assert facts.endswith(" tokens/s · stopped")
    assert page.text(page.part(answer, ".problem")) == ""
    assert 10 < len(kept) < 800
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
    assert asked[3]["messages"] == [
        *asked[1]["messages"][:2],
        {"role": "user", "content": "two and a half"},
    ]
    page.choose("#new")
    assert page.turns() == []
    assert page["welcome"].is_displayed()
    page.ask("three")
    page.answered()
    assert asked[4]["messages"] == [{"role": "user", "content": "three"}]


def test_a_reload_amid_an_answer_keeps_what_had_arrived(opened, quiet):
    page = opened()
    page.site.model.answers["long"] = "x" * 800
    page.site.model.delay = 0.01
    page.ask("long")
    page.eventually(lambda: len(page.turns()[-1]) > 10, "the beginning")
    page.driver.refresh()
    page.eventually(lambda: page.all("option"), "the page")
    assert page.turns()[0] == "long"
    assert 10 < len(page.turns()[1]) < 800
    assert page.text(page.all(".facts")[-1]).endswith("stopped")
    page.eventually(lambda: page.site.llm.statistics().running == 0, "the end in the engine", 2)


def test_a_new_chat_ends_the_answer_of_the_old_one(opened, quiet):
    page = opened()
    page.site.model.delay = 0.01
    page.site.model.answers["long"] = "x" * 800
    page.ask("long")
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
    for tag in (
        "<script>window.hit = 1</script>",
        "<img src=x onerror='window.hit = 2'>",
        "<object data=x>",
        "[click](javascript:window.hit=9)",
        "![x](http://127.0.0.1:1/x.png)",
        "&lt; &amp;",
    ):
        assert tag in shown
    names = (
        "return [...arguments[0].querySelectorAll('.text *')].flatMap(e => e.getAttributeNames())"
    )
    attributes = page.run(names, answer)
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
    page.driver.get_log("performance")  # the image was asked for here, which is what was refused
    assert {"text", "innerHTML", "img-src", "connect-src", "require-trusted-types-for"} <= set(
        refused
    )


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
    assert page.text(page.all(".answer .problem")[-1]) == ""


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
    assert "top_p" in page.text(page["setting-problem"])  # on a phone the settings cover the answer
    page.put("top_p", "0.9")
    assert page["top_p"].get_attribute("aria-invalid") is None
    assert page.text(page["setting-problem"]) == ""
    page.choose(".again")
    page.eventually(lambda: page.turns() == ["hello", "hello"], "the answer")
    page["seed"].send_keys("1-2")  # no number: not sent at all
    page.ask("more")
    page.wait(100)
    assert len(page.site.gate.asked) == 2
    assert page["prompt"].get_property("value") == "more"


def test_a_server_that_has_another_model_by_now(opened):
    page = opened(model_names=("one", "two"))
    page.run("document.getElementById('model').append(new Option('old', 'old', true, true))")
    page.ask("hello")
    assert "old" in page.text(page.part(page.answered(), ".problem"))
    page.eventually(lambda: [o.text for o in page.all("option")] == ["one", "two"], "the models")
    page.choose(".again")
    page.eventually(lambda: page.turns() == ["hello", "hello"], "the answer")


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
    page.eventually(
        lambda: "cannot be reached" in page.text(page.all(".answer .problem")[-1]), "the news"
    )


def test_an_engine_that_fails_amid_an_answer(opened):
    page = opened()
    page.site.model.answers["break"] = "so far\0"
    page.ask("break")
    answer = page.answered()
    assert page.turns() == ["break", "so far"]
    assert len(page.text(page.part(answer, ".problem"))) > 10
    page.eventually(lambda: page.site.service.ready, "the end of the fault")
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
    page.eventually(
        lambda: page.site.gate.headers[-1].get(b"authorization") == b"Bearer wrong", "a try"
    )
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
