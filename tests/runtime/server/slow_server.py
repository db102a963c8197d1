"""A process of `compress serve` around a model that takes its time: python -m ... URL_FILE ARGS.

Arguments are JSON: {"delay": seconds a step, "load": seconds, "settings": {...}, ...}.
Its first line on standard output is its URL, once it is ready.
"""

import contextlib
import json
import os
import sys
import time

from compress.runtime.engine import Engine
from compress.runtime.llm import LLM
from compress.runtime.server.listener import bind, url_of
from compress.runtime.server.process import run
from compress.runtime.server.service import ServerSettings, Service
from tests.runtime.server.conftest import Letters, SlowModel


def main() -> int:
    given = json.loads(sys.argv[1])
    listener = bind("127.0.0.1", 0)
    print(url_of(listener), flush=True)

    def make_llm() -> LLM:
        time.sleep(given.get("load", 0))
        if given.get("broken"):
            raise ValueError("a library's\nwords")
        model, tokenizer = SlowModel(), Letters()
        model.delay = given.get("delay", 0.0)
        sequences = given.get("max_sequences", 64)
        engine = Engine(model, 400, max_sequences=sequences, seed=3, tokenizer=tokenizer)
        return LLM.from_engine(
            engine, tokenizer, max_queued_requests=given.get("max_queued_requests")
        )

    settings = ServerSettings(("slow",), **given.get("settings", {}))
    service = Service(settings)
    if given.get("replicas"):
        from compress.runtime.server.replicas import ReplicatedService

        service = ReplicatedService(settings, given["replicas"])
    with contextlib.closing(service):
        return run(service, make_llm, listener, lambda: print("ready", flush=True))


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # as the command does
