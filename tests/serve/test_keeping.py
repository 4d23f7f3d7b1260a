"""Recordings are kept beside the service: a disk or a store that hangs holds up no transcript."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resonance.serve import keeping, threads
from resonance.serve.faults import ServiceError
from resonance.serve.keep_audio import KeptAudio
from resonance.serve.service import Service
from resonance.serve.speech import Answer

sys.path.insert(0, str(Path(__file__).parent))
from scripted import WAIT, ScriptedEngine, clip
from serving import metric, request, running, service_of

SLACK = 5.0  # of a machine that does something else
NOT_KEPT = "resonance_recordings_not_kept_total"


class SlowDisk(KeptAudio):
    """Nothing is written before `go`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 7)
        self.go, self.entered = threading.Event(), threading.Semaphore(0)

    def keep(self, samples: np.ndarray, answer: Answer, *, account: str, patient: str | None) -> Path | None:
        self.entered.release()
        self.go.wait()
        return super().keep(samples, answer, account=account, patient=patient)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    found = SlowDisk(tmp_path / "kept")
    yield found
    found.go.set()


def files(disk: KeptAudio) -> list[str]:
    return sorted(path.suffix for path in disk.folder.rglob("*") if path.is_file())


def run(service: Service, main: Callable[[], Any]) -> None:
    async def whole() -> None:
        async with running(service):
            await main()

    asyncio.run(whole())


def test_changes_of_adapters_that_hang_keep_no_recording_from_being_kept(tmp_path: Path) -> None:
    disk, never = KeptAudio(tmp_path / "kept", 7), threading.Event()
    service = service_of(ScriptedEngine(), kept=disk)

    async def main() -> None:
        for _i in range(threads.WRITERS + 4):
            service._threads.write(never.wait)
        answer = await asyncio.wait_for(service.transcribe(request(clip(1))), WAIT)
        assert answer.result.text and files(disk) == [".json", ".wav"]
        assert metric(service, NOT_KEPT) == 0

    try:
        run(service, main)
    finally:
        never.set()


def test_a_transcript_waits_for_its_recording_to_be_kept_no_longer_than_its_deadline(
    disk: SlowDisk, caplog: pytest.LogCaptureFixture
) -> None:
    service = service_of(ScriptedEngine(), kept=disk)

    async def main() -> None:
        begun = time.monotonic()
        answer = await asyncio.wait_for(service.transcribe(request(clip(1), deadline=begun + 1)), WAIT)
        assert answer.result.text and time.monotonic() - begun < 1 + keeping.KEEP_SECONDS / 2
        assert metric(service, NOT_KEPT) == 1 and metric(service, "resonance_queued_audio_seconds") == 0
        assert "could not be kept" in caplog.text and answer.result.text not in caplog.text

    run(service, main)


def test_while_the_disk_hangs_nobody_waits_for_it_and_afterwards_recordings_are_kept_again(
    disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "KEEP_SECONDS", 0.5)
    service = service_of(ScriptedEngine(), kept=disk)
    many = keeping.KEEPERS + 3

    async def main() -> None:
        begun = time.monotonic()
        answers = await asyncio.gather(*(service.transcribe(request(clip(i + 1))) for i in range(many)))
        assert all(answer.result.text for answer in answers) and time.monotonic() - begun < 0.5 + SLACK
        assert metric(service, NOT_KEPT) == many
        monkeypatch.setattr(keeping, "KEEP_SECONDS", 0.01)  # nobody waits even so long
        for _i in range(2):
            await service.transcribe(request(clip(9)))
        assert metric(service, NOT_KEPT) == many + 2
        assert disk.entered._value == keeping.KEEPERS  # what was given up is never begun
        monkeypatch.setattr(keeping, "KEEP_SECONDS", WAIT)
        disk.go.set()
        until = time.monotonic() + WAIT
        while len(files(disk)) < 2 * keeping.KEEPERS and time.monotonic() < until:
            await asyncio.sleep(0.01)
        await service.transcribe(request(clip(10)))
        assert metric(service, NOT_KEPT) == many + 2

    run(service, main)
    # What had been begun is there, whole.
    assert files(disk) == [".json"] * (keeping.KEEPERS + 1) + [".wav"] * (keeping.KEEPERS + 1)


def test_a_disk_that_refuses_is_counted(tmp_path: Path) -> None:
    disk = KeptAudio(tmp_path / "kept", 7)
    disk.folder.rmdir()
    disk.folder.touch()
    service = service_of(ScriptedEngine(), kept=disk)

    async def main() -> None:
        assert (await service.transcribe(request(clip(1)))).result.text
        assert metric(service, NOT_KEPT) == 1

    # What purges finds no folder either, and says so in the log.
    run(service, main)


def test_the_service_ends_while_the_disk_hangs_and_who_was_heard_is_answered(disk: SlowDisk) -> None:
    service = service_of(ScriptedEngine(), kept=disk)

    async def main() -> None:
        await service.start()
        asked = asyncio.create_task(service.transcribe(request(clip(1))))
        assert await asyncio.to_thread(disk.entered.acquire, timeout=WAIT)
        begun = time.monotonic()
        await service.drain(0.2)
        assert time.monotonic() - begun < keeping.KEEP_SECONDS / 2
        assert (await asked).result.text
        with pytest.raises(ServiceError):
            await service.transcribe(request(clip(2)))

    asyncio.run(main())


def test_who_waits_for_a_change_that_there_is_no_room_for_is_told(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    service = service_of(ScriptedEngine(), tmp_path / "adapters")
    never = threading.Event()

    async def main() -> None:
        for _i in range(threads.WRITERS + threads.WAITING):
            service._threads.write(never.wait)
        with pytest.raises(ServiceError) as caught:
            await service.delete_adapter("anna")
        assert caught.value.code == "adapter_store_unreachable"

    try:
        run(service, main)
    finally:
        never.set()
