"""What the service counts and measures, for Prometheus. No patient and no account is named in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from resonance.serve.pool import PoolStats

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
WINDOWS = (1, 2, 4, 8, 16, 32, 64)
POOL_GAUGES = {
    "loaded": "Adapters in memory",
    "bytes": "Memory that adapters take",
    "budget_bytes": "Memory that adapters may take",
    "pinned": "Adapters in use",
    "behind": "People answered by an older version, because the newest cannot be used",
}
POOL_COUNTERS = {
    "hits": "Times an adapter was in memory already",
    "misses": "Times an adapter had to be read",
    "evictions": "Adapters that made room for others",
    "loads": "Adapters read",
    "loads_failed": "Adapters that could not be read or used",
}


class Metrics:
    """The figures of one service. Two services in one process do not share any."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self._requests = Counter(
            "resonance_requests", "Requests answered, by route and status", ["route", "status"], registry=own
        )
        self._request_seconds = Histogram(
            "resonance_request_seconds", "Time from request to answer", ["route"], buckets=SECONDS, registry=own
        )
        self._refused = Counter(
            "resonance_refused", "Recordings not transcribed, by the error's code", ["code"], registry=own
        )
        self._dropped = Counter(
            "resonance_dropped_windows", "Windows nobody waited for any more, not decoded", ["why"], registry=own
        )
        self._queued = Gauge(
            "resonance_queued_audio_seconds", "Audio that waits or is being decoded, in seconds", registry=own
        )
        self._windows = Counter("resonance_windows", "Windows decoded", registry=own)
        self._window_seconds = Counter(
            "resonance_window_audio_seconds", "Audio in the windows decoded, in seconds", registry=own
        )
        self._batches = Histogram("resonance_batch_windows", "Windows in a batch", buckets=WINDOWS, registry=own)
        self._batch_seconds = Histogram(
            "resonance_batch_seconds", "Time the model takes for a batch", buckets=SECONDS, registry=own
        )
        self._answer_seconds = Histogram(
            "resonance_answer_seconds", "Time from request to transcript", buckets=SECONDS, registry=own
        )
        self._audio = Counter("resonance_audio_seconds", "Audio transcribed, in seconds", registry=own)
        self._speed = Gauge(
            "resonance_real_time_factor",
            "Time the model took for the last batch, divided by the length of its audio",
            registry=own,
        )
        self._out_of_memory = Counter("resonance_out_of_memory", "Batches that did not fit into memory", registry=own)
        self._connections = Gauge("resonance_connections", "Connections that are open", registry=own)
        self._connections_dropped = Counter(
            "resonance_connections_dropped", "Connections closed on clients, by reason", ["why"], registry=own
        )
        self._failed = Counter("resonance_failed_windows", "Windows on which the model failed", registry=own)
        self._not_kept = Counter(
            "resonance_recordings_not_kept", "Recordings answered that could not be kept, or not in time", registry=own
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """route: its pattern, without ids; seconds: from the request to the end of the answer."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def answered(self, audio_seconds: float, seconds: float) -> None:
        """A recording of `audio_seconds` has been transcribed, so many seconds after it came."""
        self._audio.inc(audio_seconds)
        self._answer_seconds.observe(seconds)

    def batch(self, windows: int, audio_seconds: float, seconds: float) -> None:
        """The model has decoded a batch, in so many seconds."""
        self._windows.inc(windows)
        self._window_seconds.inc(audio_seconds)
        self._batches.observe(windows)
        self._batch_seconds.observe(seconds)
        if audio_seconds:
            self._speed.set(seconds / audio_seconds)

    def dropped(self, why: Literal["cancelled", "deadline"]) -> None:
        self._dropped.labels(why).inc()

    def out_of_memory(self) -> None:
        self._out_of_memory.inc()

    def failed(self) -> None:
        self._failed.inc()

    def not_kept(self) -> None:
        """A recording was to be kept, and was not by the time of its answer."""
        self._not_kept.inc()

    def watch_queue(self, seconds: Callable[[], float]) -> None:
        """seconds: gives the audio that waits now."""
        self._queued.set_function(seconds)

    def connection_dropped(self, why: str) -> None:
        """why: silent, slow_reader, or room, where another needed it."""
        self._connections_dropped.labels(why).inc()

    def watch_connections(self, count: Callable[[], float]) -> None:
        """count: gives the connections that are open now."""
        self._connections.set_function(count)

    def watch_pool(self, stats: Callable[[], PoolStats]) -> None:
        """stats: gives the figures of the pool of adapters now."""
        self.registry.register(_PoolFigures(stats))

    def exposition(self) -> tuple[bytes, str]:
        """All figures in Prometheus's text format, and its media type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _PoolFigures(Collector):
    def __init__(self, stats: Callable[[], PoolStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, help_text in POOL_GAUGES.items():
            yield GaugeMetricFamily(f"resonance_adapters_{name}", help_text, value=getattr(stats, name))
        for name, help_text in POOL_COUNTERS.items():
            yield CounterMetricFamily(f"resonance_adapters_{name}", help_text, value=getattr(stats, name))
