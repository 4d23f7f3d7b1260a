"""What Prometheus reads."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from resonance.serve.metrics import Metrics
from resonance.transcribe.mixed_engine import MixedRecognizer, load_mixed

sys.path.insert(0, str(Path(__file__).parent))
from scripted import clip
from serving import request, running, service_of


def figures(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """By name and values of labels, as Prometheus reads them."""
    text, media_type = metrics.exposition()
    assert media_type.startswith("text/plain")
    families = text_string_to_metric_families(text.decode())
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def test_two_services_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.request("/transcribe", 200, 0.3)
    one.refused("too_busy")
    one.dropped("deadline")
    one.out_of_memory()
    one.failed()
    one.not_kept()
    one.batch(3, 6.0, 1.5)
    one.answered(6.0, 2.0)
    found = figures(one)
    for name, labels, value in [
        ("resonance_requests_total", ("/transcribe", "200"), 1),
        ("resonance_request_seconds_sum", ("/transcribe",), 0.3),
        ("resonance_refused_total", ("too_busy",), 1),
        ("resonance_dropped_windows_total", ("deadline",), 1),
        ("resonance_out_of_memory_total", (), 1),
        ("resonance_failed_windows_total", (), 1),
        ("resonance_recordings_not_kept_total", (), 1),
        ("resonance_windows_total", (), 3),
        ("resonance_batch_windows_bucket", ("4.0",), 1),
        ("resonance_batch_windows_bucket", ("2.0",), 0),
        ("resonance_batch_seconds_sum", (), 1.5),
        ("resonance_real_time_factor", (), 0.25),
        ("resonance_audio_seconds_total", (), 6),
        ("resonance_answer_seconds_sum", (), 2),
    ]:
        assert found[name, labels] == value, name
    assert not any(value for (name, _labels), value in figures(other).items() if not name.endswith("_created"))


def test_no_person_is_named(
    tiny_model: Path, make_adapter: Callable[..., Path], tmp_path: Path, short_answers: None
) -> None:
    make_adapter(tmp_path / "erika-mustermann")
    engine: MixedRecognizer = load_mixed(str(tiny_model), device="cpu")

    async def main() -> None:
        async with running(service_of(engine, tmp_path)) as service:
            answer = await service.transcribe(request(clip(1), "erika-mustermann", account="dr-mabuse"))
            assert answer.voice
            text = service.metrics.exposition()[0].decode()
            assert "erika" not in text and "mabuse" not in text
            found = figures(service.metrics)
            assert service.pool
            assert found["resonance_adapters_loaded", ()] == 1
            assert found["resonance_adapters_bytes", ()] == service.pool.stats().bytes > 0
            assert found["resonance_adapters_loads_total", ()] == 1
            assert found["resonance_queued_audio_seconds", ()] == 0

    asyncio.run(main())
