"""The page's Markdown: what CommonMark says where it has it, at any moment of a stream, in time."""

import itertools
import random
from html.parser import HTMLParser

import pytest

# What both should read alike.  Left out is what the page leaves out: links, escapes, nested quotes.
SAMPLES = (
    "one\ntwo\n\nthree",
    "# One\n\n## Two ##x\n### Three\n#### Four\n##### Five\n#no heading",
    "a **bold** and __bold__ word, *italic* and _italic_, ***both***",
    "**bold with *italic* and `code` inside**",
    "snake_case_name and 2 * 3 * 4 and a*b*c",
    "**not closed, *nor this",
    "** no bold ** and _ no italic _",
    "`code` ``a`b`` `` ` `` ` x ` `not closed",
    "`**no bold**` and **`code`**",
    "- a\n- b\n- c",
    "* a\n* b",
    "1. a\n2. b",
    "7) a\n8) b",
    "- a\n  - b\n    - c\n  - d\n- e",
    "1. a\n   - b\n   - c\n2. d\n   1. e",
    "- a\ngoes on\n- b\n  goes on",
    "- a\n\n- b\n\nno item",
    "para\n- list",
    "- list\n\npara",
    "- a\n1. b\n- c",
    "- a\n---\n- b",
    "***\n---\n_ _ _",
    "> quoted *text*\n> goes on\n\nnot",
    "```python\ndef f():\n    return '<b>'\n```",
    "```\nnot closed\n\n# no heading",
    "~~~~ js x\n```\n~~~\n~~~~",
    "text\n```\ncode\n```\ntext",
    "1. a\n\n```\ncode\n```\n\n2. b",
    "  ```\n    a\n  b\n c\n  ```",
    "|a|b|\n|-|:-:|\n|**c**|d|\n|e|f|",
    "a | b\n--- | ---\nc | d\n\nafter",
    "no | table\nat all",
    "<b>html</b> & <script>",
    "\n\n  \n",
    "windows\r\nlines\r\n\r\nhere",
)


LEFT_OUT = ("thead", "tbody", "br")
NAMES = {"h5": "h4", "h6": "h4"}  # the page has four levels


class Normal(HTMLParser):
    """Tags and texts, without what the page has no use for, as paragraphs in items and quotes."""

    def __init__(self, html):
        super().__init__()
        self.open = []
        self.found = []
        self.feed(html)
        stripped = [entry if entry.startswith("<") else entry.strip("\n") for entry in self.found]
        self.found = [entry for entry in stripped if entry.strip()]

    def handle_starttag(self, tag, attrs):
        start = dict(attrs).get("start", "1")
        self.put(tag, f"<{NAMES.get(tag, tag)}{'' if start == '1' else f' {start}'}>")
        if tag != "hr":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "hr":
            self.open.pop()
            self.put(tag, f"</{NAMES.get(tag, tag)}>")

    def put(self, tag, entry):
        within = {"p": {"li", "blockquote"}, "code": {"pre"}}.get(tag, set())
        if tag not in LEFT_OUT and not within & {*self.open}:
            self.found.append(entry)

    def handle_data(self, data):
        data = data.replace("<", "\u2039")  # so that no text is taken for a tag
        if self.found and not self.found[-1].startswith("<"):
            self.found[-1] += data
        else:
            self.found.append(data)


SHOWN = """
const [text, done] = arguments;
import("/markdown.js").then(({ render }) => {
  const target = document.createElement("div");
  render(target, text);
  for (const figure of target.querySelectorAll("figure")) {
    figure.querySelector("figcaption").remove();
    figure.replaceWith(figure.firstElementChild);
  }
  for (const table of target.querySelectorAll("table")) table.parentElement.replaceWith(table);
  done(target.innerHTML.replace(/(<[/]?h)([3-6])/g, (_, tag, level) => tag + (level - 2)));
});
"""


def test_it_reads_what_commonmark_reads(opened):
    markdown_it = pytest.importorskip("markdown_it")
    reference = markdown_it.MarkdownIt("commonmark", {"html": False}).enable("table")
    page = opened()
    differing = []
    for text in SAMPLES:
        html = page.driver.execute_async_script(SHOWN, text)
        found, wanted = Normal(html).found, Normal(reference.render(text)).found
        if found != wanted:
            differing.append((text, found, wanted))
    assert differing == []


STREAMED = """
const [texts, done] = arguments;
import("/markdown.js").then(({ render }) => {
  const wrong = [];
  for (const text of texts) {
    const growing = document.createElement("div");
    for (let end = 0; end <= text.length; end += 1) {
      const fresh = document.createElement("div");
      render(growing, text.slice(0, end));
      render(fresh, text.slice(0, end));
      if (growing.innerHTML !== fresh.innerHTML) wrong.push(text.slice(0, end));
    }
  }
  done(wrong);
});
"""
PIECES = (
    "word", " ", "\n", "\n\n", "**", "*", "_", "`", "```", "```py\n", "- ", "  - ", "1. ", "# ",
    "> ", "|a|b|\n", "|-|-|\n", "---\n", "~~~\n", "é€😀", "<b>",
)  # fmt: skip


def test_a_growing_text_shows_what_the_same_text_at_once_does(opened):
    generator = random.Random(5)
    texts = ["".join(generator.choices(PIECES, k=24)) for _ in range(150)]
    assert opened().driver.execute_async_script(STREAMED, texts) == []


TIMED = """
const [before, piece, length, done] = arguments;
import("/markdown.js").then(({ render }) => {
  const text = before + piece.repeat(Math.ceil(length / piece.length));
  const target = document.createElement("div");
  const began = performance.now();
  render(target, text);
  render(target, text + "x");
  done((performance.now() - began) / 1000);
});
"""


BEFORE = ("", "# x", "- x", "|a|b|\n|-|-|\n", "```", "`", "**")
REPEATED = (
    "*", "**a ", "*a **b _c __d ", "`", "` `` ``` ```` ", "``a`", " ", "\t", "\n", "- ", "- a\n",
    "  - a\n    - b\n", "1. a\n\n", "#", "# #", "> a\n", "|", "|a", "|-|\n", "|a|b|\n|-|-|\n",
    "---\n", "- - ", "_a_", "```\n", "```a ", "~", "<", "[a](",
)  # fmt: skip


def test_no_text_takes_long(opened):
    page = opened()
    slow = {}
    for before, piece in itertools.product(BEFORE, REPEATED):
        seconds = page.driver.execute_async_script(TIMED, before, piece, 40_000)
        # What is quadratic takes many seconds for so long a text; the slowest of these 0.1 s.
        if seconds > 1.5:
            slow[before, piece] = seconds
    assert slow == {}
