"""What every route works with: the model once it is loaded, and who may use it now.

    loading -> ready -> draining -> cut off

A request is taken only when ready.  `drain` refuses new ones and lets those taken finish; `cut_off`
ends what is left.  A fault of the engine (`LLM.fault`) refuses too, and where the engine's thread
will say nothing more, its requests are ended here, so that nobody waits for ever.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.runtime.engine_loop import QueueFullError
from compress.runtime.server.errors import ApiError
from compress.runtime.server.metered import MeteredStream
from compress.runtime.server.metrics import Metrics
from compress.runtime.server.request_log import current_record

if TYPE_CHECKING:
    from compress.runtime.llm import LLM
    from compress.runtime.sampling_params import SamplingParams

logger = logging.getLogger("compress.server")

MIB = 1 << 20
SECONDS_WHILE_LOADING = 5  # when to ask again; nobody knows how long it takes
SECONDS_AFTER_FAULT = 30
LONGEST_RETRY = 60  # seconds; an estimate from a long queue is worth no more


@dataclass(frozen=True)
class ServerSettings:
    """How a server behaves, whatever its model."""

    model_names: tuple[str, ...]  # what requests may call the model; answers give the first
    api_keys: tuple[str, ...] = ()  # any of them opens; none: open to all
    max_body_bytes: int = 4 * MIB
    body_seconds: float = 60.0  # until a request's body has to be there
    allowed_hosts: tuple[str, ...] | None = None  # in Host and Origin; None: any
    metrics: bool = True  # /metrics
    drain_seconds: float = 30.0  # that running requests get when the server ends


class Service:
    """The model behind the routes, its state, and its metrics."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.created = int(time.time())  # Unix time, for /v1/models
        self.draining = False
        self.metrics = Metrics(settings.model_names[0], self._statistics)
        self._llm: LLM | None = None
        self._streams: weakref.WeakSet[MeteredStream] = weakref.WeakSet()  # not ended

    def attach(self, llm: LLM) -> None:
        """Serve `llm` from now on."""
        self._llm = llm

    def load(
        self,
        make_llm: Callable[[], LLM],
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        """Make the model in a thread, and say there how it went."""
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._refusal() is None

    @property
    def state(self) -> str:
        """In a word: loading, ready, draining or fault."""
        raise NotImplementedError

    def health(self) -> tuple[bool, str]:
        """Whether this process can do its work, or soon will; and why not."""
        raise NotImplementedError

    @property
    def llm(self) -> LLM:
        """The model.  ApiError 503 while it loads, at the end, and when the engine is broken."""
        raise NotImplementedError

    def submit(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> list[MeteredStream]:
        """Queue requests, all of them or none.  They are streams as `LLM.stream` returns them.

        ApiError 429 when the queue is full, 503 as `llm`; InputError for what can never run.
        """
        raise NotImplementedError
