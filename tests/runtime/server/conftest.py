"""Servers for tests: real uvicorn on a free port, models small enough to watch."""

import threading
import time

import pytest
import uvicorn

from compress.runtime.engine import Engine
from compress.runtime.llm import LLM
from compress.runtime.server.app import make_app
from compress.runtime.server.http_protocol import http_protocol
from compress.runtime.server.service import ServerSettings, Service
from tests.runtime.fakes import VOCAB, FakeModel


class Letters:
    """A tokenizer of one token a printable ASCII character; the last two spell nothing."""

    chat_template = "yes"
    eos_token_id = 96
    bos_token_id = None
    all_special_ids = (95, 96)

    def __call__(self, text, **_):
        return {"input_ids": [(ord(c) - 32) % 95 for c in text]}

    def decode(self, tokens, **_):
        return "".join(chr(32 + token) for token in tokens if token < 95)

    def convert_ids_to_tokens(self, tokens):
        return [chr(32 + token) if token < 95 else f"<{token}>" for token in tokens]

    def get_added_vocab(self):
        return {"<95>": 95, "<96>": 96}

    def apply_chat_template(self, messages, **_):
        return "".join(f"{m['role'][0]}:{m['content']}|" for m in messages) + "a:"


class SlowModel(FakeModel):
    """Takes `delay` seconds a step.  `fail_on` is a token that breaks the step it is in."""

    delay = 0.0

    def forward(self, batch):
        time.sleep(self.delay)
        return super().forward(batch)


def _made_letters():
    """Context 200, vocabulary 97, blocks of 4 tokens.

    What it generates looks random and is a function of the whole prefix
    (`tests.runtime.fakes.naive`).
    """
    made = []

    def make(delay=0.0, num_blocks=400, max_sequences=64, eos_ids=(), speculator=None, **more):
        model = SlowModel()
        model.delay = delay
        tokenizer = Letters()
        engine = Engine(
            model, num_blocks, max_sequences=max_sequences, seed=3, tokenizer=tokenizer,
            eos_ids=eos_ids, speculator=speculator,
        )  # fmt: skip
        assert model.vocab_size == VOCAB
        made.append(LLM.from_engine(engine, tokenizer, **more))
        return made[-1]

    yield make
    for llm in made:
        llm.engine.model.delay = 0
        llm.close()


@pytest.fixture
def make_letters():
    """A function that makes an LLM of `SlowModel` and `Letters`; closed at the end."""
    yield from _made_letters()


@pytest.fixture(scope="module")
def make_module_letters():
    """`make_letters` for what all tests of a module share."""
    yield from _made_letters()


@pytest.fixture(scope="session")
def tiny_llm(model_folder):
    """A tiny random Llama with its byte-level tokenizer and a chat template; float32."""
    from shutil import copytree

    source = model_folder("llama")
    folder = source.with_name(f"{source.name}-chat")
    copytree(source, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }} {{ m.content }} w1 {% endfor %}w2", "utf-8"
    )
    with LLM(str(folder), dtype="float32", kv_cache_memory="16MiB", max_sequences=16) as llm:
        yield llm


class Served:
    """An app that runs in uvicorn, in a thread of this process."""

    def __init__(self, app):
        self.app = app
        config = uvicorn.Config(
            app, "127.0.0.1", 0, log_level="warning", lifespan="on", http=http_protocol()
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started or not self.thread.is_alive())
        assert self.server.started, "uvicorn did not start"
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive(), "uvicorn did not stop"


def app_of(llm, **settings):
    """The application around `llm`; its service is `app.state.service`."""
    service = Service(ServerSettings(model_names=("tiny", "org/tiny"), **settings))
    service.attach(llm)
    return make_app(service)


def _serving():
    running = []

    def start(app):
        running.append(Served(app))
        return running[-1]

    yield start
    for served in running:
        served.stop()


@pytest.fixture
def serve():
    """A function that runs an app in uvicorn and gives its `Served`; stopped at the end."""
    yield from _serving()


@pytest.fixture(scope="module")
def serve_module():
    """`serve` for what all tests of a module share."""
    yield from _serving()


def until(condition, seconds=5.0):
    """Wait until `condition()` holds; whether it does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()
