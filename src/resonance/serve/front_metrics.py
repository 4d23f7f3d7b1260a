"""The figures of several copies of the model as one text for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from resonance.serve.metrics import Metrics

FRONT = "resonance_request"  # what the front counts itself


class FrontMetrics(Metrics):
    """Requests are counted here; all else is what the copies said last, with a label that tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Mapping[str, bytes] = {}

    def exposition(self) -> tuple[bytes, str]:
        own, _type = super().exposition()
        return generate_latest(_Merged(own, self.copies)), CONTENT_TYPE_LATEST


class _Merged(Collector):
    def __init__(self, front: bytes, copies: Mapping[str, bytes]) -> None:
        self._front, self._copies = front, copies

    def collect(self) -> Iterable[Metric]:
        found = {family.name: family for family in _families(self._front) if family.name.startswith(FRONT)}
        for copy, text in self._copies.items():
            for family in _families(text):
                if family.name.startswith(FRONT):
                    continue
                whole = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    whole.add_sample(sample.name, {**sample.labels, "copy": copy}, sample.value)
        return found.values()


def _families(text: bytes) -> Iterable[Metric]:
    return text_string_to_metric_families(text.decode())
