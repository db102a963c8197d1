"""What every route works with: the model once it is loaded, and who may use it now.

    loading -> ready -> draining -> cut off

A request is taken only when ready.  `drain` refuses new ones and lets those taken finish; `cut_off`
ends what is left.  A fault of the engine refuses too, until the engine is over it; one that lasts
ends what is waiting for it, so that nobody waits for ever.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

from compress.runtime.engine_loop import QueueFullError
from compress.runtime.outputs import Statistics
from compress.runtime.server.errors import ApiError
from compress.runtime.server.metered import MeteredStream
from compress.runtime.server.metrics import Metrics
from compress.runtime.server.request_log import current_record

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from compress.runtime.llm import LLM
    from compress.runtime.sampling_params import SamplingParams

logger = logging.getLogger("compress.server")

MIB = 1 << 20
SECONDS_TO_LOAD = 5  # when to ask again while it loads; nobody knows how long that takes
SECONDS_TO_RECOVER = 10  # the same after a fault, or from a server that takes the place of this one
LONGEST_RETRY = 60  # seconds; an estimate from a long queue is worth no more
WATCH = 1.0  # seconds between looks at the engine
MOST_LOGPROBS = 1_000_000  # of one HTTP request, for all its tokens; each takes 250 bytes
PATIENCE = 5  # looks at a fault before those who wait for the engine are told


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


def _log_probabilities(prompt: int, params: SamplingParams, context: int) -> int:
    """The most log-probabilities that a request over `prompt` tokens keeps until it ends."""
    new = min(params.max_tokens or context, max(0, context - prompt))
    of_prompt = 0 if params.prompt_logprobs is None else prompt * (1 + params.prompt_logprobs)
    return of_prompt + (0 if params.logprobs is None else params.n * new * (1 + params.logprobs))


class Service:
    """The model behind the routes, its state, and its metrics."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.created = int(time.time())  # Unix time, for /v1/models
        self.draining = False
        self.metrics = Metrics(settings.model_names[0], self._statistics)
        self._llm: LLM | None = None
        self._streams: weakref.WeakSet[MeteredStream] = weakref.WeakSet()  # unfinished
        self._seconds = 1.0  # that a request runs: a moving average

    def attach(self, llm: LLM) -> None:
        """Serve `llm` from now on."""
        self._llm = llm

    def load(
        self,
        make_llm: Callable[[], LLM],
        on_ready: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """Make the model in a thread, and say there how it went."""

        def make() -> None:
            try:
                self.attach(make_llm())
            except BaseException as error:  # even what a library means for a whole process
                on_failure(error)
            else:
                on_ready()

        threading.Thread(target=make, name="loading", daemon=True).start()

    @property
    def state(self) -> str:
        """In a word: loading, ready, draining or fault."""
        if self.draining:
            return "draining"
        if self._llm is None:
            return "loading"
        return "fault" if self._llm.fault else "ready"

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.state == "ready"

    def health(self) -> tuple[bool, str]:
        """Whether the engine works, or is not there yet; and why not."""
        fault = self._llm.fault if self._llm else None
        return fault is None, fault or "ok"

    @property
    def active(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._streams)

    def check_ready(self) -> None:
        """ApiError 503 while the model loads, at the end, and when the engine is broken."""
        state = self.state
        if state == "ready":
            return
        if state == "loading":
            message, seconds = "the model is being loaded", SECONDS_TO_LOAD
        elif state == "draining":
            message, seconds = "the server is shutting down", SECONDS_TO_RECOVER
        else:
            message, seconds = "the engine has failed; /health says why", SECONDS_TO_RECOVER
        raise ApiError(503, message, code=state, retry_after=seconds)

    @property
    def llm(self) -> LLM:
        """The model; raises as `check_ready`."""
        self.check_ready()
        assert self._llm is not None
        return self._llm

    def submit(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> list[MeteredStream]:
        """Queue requests, all of them or none.  They are used as `LLM.stream`'s streams are.

        ApiError 400 for more log-probabilities than a request may keep, 429 when the queue is full,
        503 as `llm`; InputError for what can never run.
        """
        llm = self.llm
        context = llm.engine.model.max_context
        kept = sum(map(_log_probabilities, map(len, prompts), params, repeat(context)))
        if kept > MOST_LOGPROBS:
            raise ApiError(
                400,
                f"the request could keep {kept:,} log-probabilities; allowed are "
                f"{MOST_LOGPROBS:,}; ask for fewer a token, or fewer tokens, prompts or n",
                param="logprobs",
            )
        try:
            streams = llm.streams(prompts, params)
        except QueueFullError as error:
            raise ApiError(
                429, f"the queue is full: {error}", code="queue_full", retry_after=self._wait()
            ) from None
        record = current_record.get()
        metered = [MeteredStream(stream, self.metrics, record, self._ended) for stream in streams]
        self._streams.update(metered)
        return metered

    def drain(self) -> None:
        """Take no more requests; those taken go on."""
        self.draining = True

    def cut_off(self) -> int:
        """End the requests that are left, with an error; how many there were."""
        return self._fail(
            ApiError(
                503,
                "the server is shutting down and could not finish this request",
                code="draining",
                retry_after=SECONDS_TO_RECOVER,
            )
        )

    def first_routes(self) -> list[BaseRoute]:
        """Routes of the application that come before its own: none here."""
        return []

    def close(self) -> None:
        """End what was started beside this process: nothing here."""

    async def watch(self) -> None:
        """For ever: where a fault lasts, tell those who wait for the engine."""
        looks = 0
        while True:
            await asyncio.sleep(WATCH)
            ok, reason = self.health()
            looks = 0 if ok else looks + 1
            if looks == 1:
                logger.error("%s", reason)
            if looks >= PATIENCE and self.active:
                logger.error("%d requests end with the engine's fault", self.active)
                self._fail(ApiError(500, f"the server cannot answer: {reason}", code="fault"))

    def _fail(self, error: ApiError) -> int:
        streams = list(self._streams)
        for stream in streams:
            stream.fail(error)
        return len(streams)

    def _ended(self, stream: MeteredStream) -> None:
        self._streams.discard(stream)
        if (started := stream.request.started) is not None:
            self._seconds += 0.1 * (time.monotonic() - started - self._seconds)

    def _wait(self) -> float:
        """Seconds until the sequences that wait now are likely to have begun."""
        statistics = self._statistics()
        if statistics is None:
            return 1
        waiting, running = statistics.waiting + 1, max(1, statistics.running)
        return min(LONGEST_RETRY, self._seconds * waiting / running)

    def _statistics(self) -> Statistics | None:
        return self._llm.statistics() if self._llm else None
