"""/metrics of several replicas in one text: the same names, with a label `replica` more.

Metrics of a process that have no such label are of the process in front.  What HTTP requests were
refused is counted where clients are answered, not by the replicas, since what one of them refuses
another may have taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from compress.runtime.server.metrics import PREFIX

REJECTED = PREFIX + "requests_rejected"


def merged(front: bytes, replicas: Mapping[str, bytes]) -> bytes:
    """Prometheus' text from that of the process in front and of each replica, by its label."""
    return generate_latest(_Merged(front, replicas))


class _Merged(Collector):
    def __init__(self, front: bytes, replicas: Mapping[str, bytes]) -> None:
        self._front = front
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        """The families, each once, with the samples of all."""
        running = GaugeMetricFamily(PREFIX + "replicas", "Replicas that answer.")
        running.add_metric([], len(self._replicas))
        yield running
        families: dict[str, Metric] = {}
        for metric in _parse(self._front):
            if metric.name == REJECTED or not metric.name.startswith(PREFIX):
                families[metric.name] = metric
        for label, text in self._replicas.items():
            for metric in _parse(text):
                if metric.name == REJECTED:
                    continue
                family = families.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                )
                for sample in metric.samples:
                    labels = {**sample.labels, "replica": label}
                    family.add_sample(sample.name, labels, sample.value, sample.timestamp)
        yield from families.values()


def _parse(text: bytes) -> Iterator[Metric]:
    yield from text_string_to_metric_families(text.decode())
