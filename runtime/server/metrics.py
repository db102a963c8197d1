"""What /metrics shows: the names of vLLM's, with our own prefix, in Prometheus' text format.

Counts that the engine keeps are read from it when somebody asks; times are observed as requests
go by.  All times are in seconds, and as seen here: from a request's arrival in the engine's queue
to the moment its tokens were taken out to be sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from compress.runtime.outputs import Statistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "compress:"

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

GAUGES: dict[str, tuple[str, Callable[[Statistics], float]]] = {
    "num_requests_running": ("Sequences in the batch.", lambda s: s.running),
    "num_requests_waiting": ("Sequences that wait for a place in it.", lambda s: s.waiting),
    "kv_cache_usage_perc": (
        "Share of the cache's blocks in use, 0 to 1.",
        lambda s: s.blocks_in_use / max(1, s.blocks_in_use + s.blocks_cached + s.blocks_free),
    ),
    "kv_cache_bytes_per_token": (
        "Memory that keys and values of a token take.",
        lambda s: s.cache_bytes_per_token,
    ),
}
COUNTERS: dict[str, tuple[str, Callable[[Statistics], float]]] = {
    "prompt_tokens": ("Tokens of prompts.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda s: s.generated_tokens),
    "prefix_cache_queries": ("Tokens looked up in the prefix cache.", lambda s: s.prompt_tokens),
    "prefix_cache_hits": ("Tokens found there.", lambda s: s.cached_prompt_tokens),
    "num_preemptions": ("Sequences that gave up their blocks.", lambda s: s.preemptions),
    "spec_decode_num_drafts": ("Drafts that were verified.", lambda s: s.drafts),
    "spec_decode_num_draft_tokens": ("Tokens of drafts.", lambda s: s.drafted_tokens),
    "spec_decode_num_accepted_tokens": ("Of these, accepted.", lambda s: s.accepted_tokens),
}
ACCEPTED_AT = "spec_decode_num_accepted_tokens_per_pos"
TIMES = {
    "time_to_first_token_seconds": ("Until the first token of a request.", LONG),
    "inter_token_latency_seconds": ("Between two tokens of an output.", SHORT),
    "request_time_per_output_token_seconds": ("The mean of that over an output.", SHORT),
    "e2e_request_latency_seconds": ("Until a request ended.", LONG),
    "request_queue_time_seconds": ("Until a request's prompt was begun.", LONG),
}


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, model_name: str, statistics: Callable[[], Statistics | None]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_EngineCollector(model_name, statistics))
        self._model_name = model_name
        self._abandoned: deque[int] = deque()
        times = {
            name: Histogram(
                PREFIX + name, text, ["model_name"], registry=self.registry, buckets=buckets
            ).labels(model_name)
            for name, (text, buckets) in TIMES.items()
        }
        self.time_to_first_token = times["time_to_first_token_seconds"]
        self.inter_token_latency = times["inter_token_latency_seconds"]
        self.time_per_output_token = times["request_time_per_output_token_seconds"]
        self.end_to_end = times["e2e_request_latency_seconds"]
        self.queue_time = times["request_queue_time_seconds"]
        self._finished = self._counter("request_success", "Outputs ended.", "finished_reason")
        self._rejected = self._counter("requests_rejected", "Requests refused.", "reason")

    def finished(self, reason: str) -> None:
        """Count an output that ended."""
        self._finished.labels(self._model_name, reason).inc()

    def rejected(self, reason: str) -> None:
        """Count an HTTP request that was refused."""
        self._rejected.labels(self._model_name, reason).inc()

    def abandoned(self, outputs: int) -> None:
        """Count outputs that were dropped.  For finalizers: takes no lock, as the others do."""
        self._abandoned.append(outputs)

    def text(self) -> bytes:
        """The whole of /metrics."""
        while self._abandoned:
            for _ in range(self._abandoned.popleft()):
                self.finished("abort")
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", label], registry=self.registry)


class _EngineCollector(Collector):
    """The engine's own counts, at the moment they are asked for."""

    def __init__(self, model_name: str, statistics: Callable[[], Statistics | None]) -> None:
        self._model_name = model_name
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        statistics = self._statistics()
        kinds = ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS))
        for family, entries in kinds:
            for name, (text, value) in entries.items():
                metric = family(PREFIX + name, text, labels=["model_name"])
                count = value(statistics) if statistics else 0
                metric.add_metric([self._model_name], count)
                yield metric
        accepted = CounterMetricFamily(
            PREFIX + ACCEPTED_AT,
            "Tokens of drafts that were accepted, by their place in the draft, from 0.",
            labels=["model_name", "position"],
        )
        for position, count in enumerate(statistics.accepted_at if statistics else ()):
            accepted.add_metric([self._model_name, str(position)], count)
        yield accepted
