"""The service without HTTP: who is let in, who answers, what happens to those who wait."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from resonance.errors import ModelError
from resonance.serve.events import events, first_of
from resonance.serve.faults import ServiceError
from resonance.serve.metrics import Metrics
from resonance.serve.replica import Refusal, Replica
from resonance.serve.service import Service, create_service
from resonance.serve.speech import Answer, Upload, Voice
from resonance.transcribe.mixed_engine import MixedRecognizer, load_mixed
from resonance.transcribe.recognizer import TimedText
from resonance.units import SAMPLE_RATE

sys.path.insert(0, str(Path(__file__).parent))
from scripted import WAIT, ScriptedEngine, clip
from serving import metric, request, running, service_of, settings_for

Scripted = Callable[..., ScriptedEngine]


@pytest.fixture(scope="session")
def base(tiny_model: Path) -> MixedRecognizer:
    return load_mixed(str(tiny_model), device="cpu")


@pytest.fixture
def scripted(base: MixedRecognizer) -> Scripted:
    """A function that makes a scripted engine which takes adapters made for `tiny_model`."""

    def make(script: Callable[..., object] = lambda rows: None) -> ScriptedEngine:
        engine = ScriptedEngine(script)
        for name in ("name", "fingerprint", "linear_shapes", "dtype", "device"):
            setattr(engine, name, getattr(base, name))
        return engine

    return make


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, make_adapter: Callable[..., Path]) -> Path:
    """ann's is English, bo's says no language. For reading only."""
    root = tmp_path_factory.mktemp("adapters")
    make_adapter(root / "ann", seed=1)
    make_adapter(root / "bo", seed=2, language=None)
    return root


@contextlib.contextmanager
def refused(status: int, code: str) -> Any:
    with pytest.raises(ServiceError) as caught:
        yield caught
    assert (caught.value.status, caught.value.code) == (status, code), caught.value
    assert caught.value.message and caught.value.hint
    assert caught.value.retry_after is None or (
        isinstance(caught.value.retry_after, int) and caught.value.retry_after > 0
    )


async def at(event: threading.Event | threading.Semaphore) -> None:
    """Until a thread says so."""
    wait = event.wait if isinstance(event, threading.Event) else event.acquire
    assert await asyncio.to_thread(wait, timeout=WAIT)


async def until(condition: Callable[[], bool]) -> None:
    """Until it holds. For what only threads do and nobody tells."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def held(service: Service) -> int:
    assert service.pool
    return service.pool.stats().pinned


async def busy(service: Service, engine: ScriptedEngine, **given: Any) -> asyncio.Task[Answer]:
    """The model has something to do until `engine.go` is set."""
    engine.go.clear()
    engine.entered = threading.Semaphore(0)
    task = asyncio.create_task(service.transcribe(request(clip(900), **{"account": "somebody else"} | given)))
    await at(engine.entered)
    return task


# --- answers ---


def test_the_answer_is_the_person_s_adapter_s_and_says_so(scripted: Scripted, adapters: Path) -> None:
    async def main() -> None:
        async with running(service_of(scripted(), adapters)) as service:
            answer = await service.transcribe(request(clip(7), "ann"))
            assert answer.result.text == "ann 7 of 16000 None" and answer.result.duration == 1.0
            assert answer.voice and answer.voice.patient == "ann" and len(answer.voice.fingerprint) == 64
            assert answer.base_fingerprint == service.base_fingerprint != ""
            base = await service.transcribe(request(clip(8)))
            assert base.voice is None and base.result.text.startswith("base 8 ")
            assert held(service) == 0
            assert metric(service, "resonance_audio_seconds_total") == 2.0
            assert metric(service, "resonance_queued_audio_seconds") == 0.0

    asyncio.run(main())


def test_pieces_come_as_soon_as_they_are_heard_and_the_answer_with_all_of_them_last(
    scripted: Scripted, adapters: Path
) -> None:
    async def main() -> None:
        second = threading.Event()

        def script(rows: Any) -> None:
            if len(engine.batches) > 2:  # the first was the question whether it answers
                assert second.wait(WAIT)

        engine = scripted(script)
        audio = np.concatenate([clip(i, 1.0) for i in range(1, 13)])
        async with running(service_of(engine, adapters, batch_size=1)) as service:
            pieces: list[TimedText | Answer] = []
            async for piece in service.stream(request(audio, "ann", times="segment")):
                if not pieces:
                    assert not second.is_set()  # the rest of it is still to be heard
                    second.set()
                pieces.append(piece)
            *parts, answer = pieces
            assert isinstance(answer, Answer) and len(parts) >= 3
            assert tuple(parts) == answer.result.segments
            assert answer.result.text.split() == " ".join(part.text for part in parts).split() != []
            starts = [part.start for part in parts]
            assert starts == sorted(starts) and answer.result.duration == 12.0
            assert held(service) == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("asked", "patient", "configured", "expected"),
    [
        ("de", "ann", "zh", "de"),
        (None, "ann", "zh", None),  # the adapter's, which the engine knows
        (None, "bo", "zh", "zh"),
        (None, None, "zh", "zh"),
        (None, "bo", None, None),  # found out with bo's adapter
    ],
)
def test_the_language_is_the_request_s_else_the_adapter_s_else_the_service_s(
    asked: str | None,
    patient: str | None,
    configured: str | None,
    expected: str | None,
    scripted: Scripted,
    adapters: Path,
) -> None:
    async def main() -> None:
        async with running(service_of(scripted(), adapters, language=configured)) as service:
            answer = await service.transcribe(request(clip(1), patient, language=asked))
            assert answer.result.text.split()[-1] == str(expected)

    asyncio.run(main())


def test_silence_is_not_decoded_unless_it_is_asked_for(scripted: Scripted) -> None:
    pytest.importorskip("faster_whisper", exc_type=ImportError)

    async def main() -> None:
        engine = scripted()
        async with running(service_of(engine)) as service:
            engine.batches.clear()
            silence = np.zeros(SAMPLE_RATE, np.float32)
            answer = await service.transcribe(request(silence, skip_nonspeech=True))
            assert answer.result.text == "" and len(answer.result.left_out) == 1 and not engine.batches
            answer = await service.transcribe(request(silence))
            assert answer.result.text == "base 0 of 16000 None" and engine.batches == [[0]]

    asyncio.run(main())


def test_an_upload_is_decoded_and_what_is_damaged_at_its_end_is_said(scripted: Scripted) -> None:
    async def main() -> None:
        file = io.BytesIO()
        soundfile.write(file, clip(3, 4.0), SAMPLE_RATE, format="FLAC", subtype="PCM_24")
        async with running(service_of(scripted(), uploads=True, decode_workers=1)) as service:
            upload = Upload(file.getvalue(), "whole.flac")
            whole = await service.transcribe(request(upload))
            assert not upload.data  # not in memory until it is answered
            assert whole.result.audio_path == "whole.flac"
            assert (whole.result.text, whole.result.error) == ("base 3 of 64000 None", None)
            cut = await service.transcribe(request(Upload(file.getvalue()[:-20_000], "cut.flac")))
            assert cut.result.text and cut.result.error and cut.result.duration < 4.0
            with refused(400, "audio_unreadable"):
                await service.transcribe(request(Upload(b"no sound" * 100, "x.wav")))
            assert metric(service, "resonance_refused_total", code="audio_unreadable") == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("audio", "status", "code"),
    [
        (np.zeros(11 * SAMPLE_RATE, np.float32), 413, "audio_too_long"),
        (np.array([0.0, np.nan], np.float32), 400, "audio_unreadable"),
        (np.array([0.0, -1e30], np.float32), 400, "audio_unreadable"),
    ],
)
def test_samples_that_cannot_be_heard_are_refused(
    audio: np.ndarray, status: int, code: str, scripted: Scripted
) -> None:
    async def main() -> None:
        async with running(service_of(scripted(), max_audio_seconds=10.0)) as service:
            with refused(status, code):
                await service.transcribe(request(audio))

    asyncio.run(main())


def test_what_has_been_heard_of_a_long_recording_is_let_go(scripted: Scripted) -> None:
    async def main() -> None:
        windows: list[weakref.ref[np.ndarray]] = []
        go_on = threading.Event()

        def script(rows: Any) -> None:
            windows.extend(weakref.ref(row.audio) for row in rows)
            if len(windows) == 4:  # the first was the question whether it answers
                assert go_on.wait(WAIT)

        engine = scripted(script)
        async with running(service_of(engine, batch_size=1)) as service:
            long = np.concatenate([clip(i, 5.0) for i in range(1, 7)])
            task = asyncio.create_task(service.transcribe(request(long)))
            await until(lambda: len(windows) == 4 and metric(service, "resonance_windows_total") == 2)
            await until(lambda: [ref() is None for ref in windows] == [False, True, True, False])
            go_on.set()
            assert (await task).result.text

    asyncio.run(main())


# --- adapters ---


def test_the_base_answers_only_where_there_is_no_adapter_and_it_is_wished(scripted: Scripted, adapters: Path) -> None:
    async def main() -> None:
        root = adapters.parent / "with-a-broken-one"
        shutil.copytree(adapters, root)
        (root / "ann" / "adapter_model.safetensors").write_bytes(b"broken")
        async with running(service_of(scripted(), root)) as service:
            with refused(404, "adapter_not_found"):
                await service.transcribe(request(clip(1), "nobody"))
            answer = await service.transcribe(request(clip(1), "nobody", base_if_missing=True))
            assert answer.voice is None and answer.result.text.startswith("base 1 ")
            for wished in (False, True):
                with refused(422, "adapter_unusable"):
                    await service.transcribe(request(clip(1), "ann", base_if_missing=wished))
        async with running(service_of(scripted())) as service:
            with refused(404, "adapter_not_found"):
                await service.transcribe(request(clip(1), "ann"))

    asyncio.run(main())


def test_an_adapter_answers_from_when_it_is_put_until_it_is_deleted(
    scripted: Scripted, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    async def main() -> None:
        (tmp_path / "adapters").mkdir()
        async with running(service_of(scripted(), tmp_path / "adapters", refresh_seconds=1e6)) as service:

            async def who() -> Voice | None:
                return (await service.transcribe(request(clip(1), "ann", base_if_missing=True))).voice

            assert await who() is None
            versions = []
            for seed in (1, 2):
                put = await service.put_adapter("ann", make_adapter(tmp_path / f"new{seed}", seed=seed))
                voice = await who()
                assert voice and (voice.version, voice.fingerprint) == (put.name, put.fingerprint)
                versions.append(voice)
            assert versions[0].fingerprint != versions[1].fingerprint
            bad = make_adapter(tmp_path / "bad")
            (bad / "adapter_model.safetensors").write_bytes(b"")
            with refused(422, "adapter_unusable"):
                await service.put_adapter("ann", bad)
            assert await who() == versions[1]
            await service.roll_back("ann")
            assert await who() == versions[0]
            await service.delete_adapter("ann")
            assert await who() is None

    asyncio.run(main())


def test_an_adapter_that_comes_when_nobody_waits_any_more_is_given_back(
    scripted: Scripted, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with running(service_of(scripted(), adapters)) as service:
            assert service.pool
            asked, slow, read = threading.Event(), threading.Event(), service.pool.store.read

            def slowly(*given: Any) -> Any:
                asked.set()
                assert slow.wait(WAIT)
                return read(*given)

            monkeypatch.setattr(service.pool.store, "read", slowly)
            task = asyncio.create_task(service.transcribe(request(clip(1), "ann")))
            await at(asked)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            slow.set()
            await until(lambda: service.pool is not None and service.pool.stats().loads == 1 and held(service) == 0)
            assert (await service.transcribe(request(clip(1), "ann"))).voice

    asyncio.run(main())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_storage_that_hangs_stops_neither_others_nor_the_end(
    scripted: Scripted, adapters: Path, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    """Reading the version of these people waits for a writer who never comes."""
    root = tmp_path / "adapters"
    shutil.copytree(adapters, root)
    pipes = []
    for number in range(12):
        (root / f"hung{number}").mkdir()
        pipes.append(root / f"hung{number}" / "current")
        os.mkfifo(pipes[-1])

    async def main() -> None:
        service = service_of(scripted(), root)
        async with running(service):
            assert service.pool
            waiting = [
                asyncio.create_task(service.transcribe(request(clip(1), f"hung{number}", account=str(number))))
                for number in range(12)
            ]
            await until(lambda: sum(name.startswith("resonance-read") for name in threads()) >= 12)
            soon = time.monotonic() + WAIT
            assert (await service.transcribe(request(clip(2), deadline=soon))).voice is None
            assert (await service.transcribe(request(clip(3), "ann", deadline=soon))).voice
            put = service.put_adapter("new", make_adapter(tmp_path / "new", seed=3))
            assert await asyncio.wait_for(put, WAIT)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        hung = [thread for thread in threading.enumerate() if thread.name.startswith("resonance-read")]
        assert hung and all(thread.daemon for thread in hung)  # the process can end

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    try:
        asyncio.run(main())
    finally:
        for pipe in pipes:
            with contextlib.suppress(OSError):  # nobody reads
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


# --- going away, being late ---


def test_a_client_who_goes_away_is_out_of_the_queue_and_his_adapter_is_free(scripted: Scripted, adapters: Path) -> None:
    async def main() -> None:
        engine = scripted()
        async with running(service_of(engine, adapters, batch_size=2)) as service:
            other = await busy(service, engine)
            long = np.concatenate([clip(i, 5.0) for i in range(1, 7)])
            task = asyncio.create_task(service.transcribe(request(long, "ann")))
            await until(lambda: metric(service, "resonance_queued_audio_seconds") == 31.0 and held(service) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert held(service) == 0
            assert metric(service, "resonance_queued_audio_seconds") == 1.0
            engine.go.set()
            assert (await other).result.text
            assert engine.batches[1:] == [[900]]

    asyncio.run(main())


def test_the_adapter_of_a_window_under_way_is_kept_until_it_is_done(scripted: Scripted, adapters: Path) -> None:
    async def main() -> None:
        engine = scripted()
        async with running(service_of(engine, adapters)) as service:
            task = await busy(service, engine, patient="ann")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert held(service) == 1
            engine.go.set()
            await until(lambda: held(service) == 0)

    asyncio.run(main())


def test_a_stream_that_is_left_leaves_the_queue(scripted: Scripted, adapters: Path) -> None:
    async def main() -> None:
        engine = scripted()
        async with running(service_of(engine, adapters, batch_size=1)) as service:
            long = np.concatenate([clip(i, 5.0) for i in range(1, 9)])
            async with contextlib.aclosing(service.stream(request(long, "ann"))) as pieces:
                async for _piece in pieces:
                    break
            assert metric(service, "resonance_queued_audio_seconds") == 0.0
            await until(lambda: held(service) == 0)

    asyncio.run(main())


def test_who_reads_a_stream_slowly_holds_neither_adapter_nor_queue(scripted: Scripted, adapters: Path) -> None:
    async def main() -> None:
        engine = scripted()
        async with running(service_of(engine, adapters)) as service:
            long = np.concatenate([clip(i, 5.0) for i in range(1, 7)])
            first, rest = await first_of(service.stream(request(long, "ann")))
            sent = events(first, rest, None, logprobs=False, tokens=service.tokens)
            await anext(sent)
            await until(lambda: held(service) == 0 and service._admission.seconds == 0)
            read = [event async for event in sent]
            assert len(read) > 2 and read[-1].startswith("event: transcript.text.done")

            first, rest = await first_of(service.stream(request(long, "ann")))
            sent = events(first, rest, None, logprobs=False, tokens=service.tokens)
            await anext(sent)
            await sent.aclose()  # type: ignore[attr-defined]
            await until(lambda: held(service) == 0 and service._admission.seconds == 0)

    asyncio.run(main())


def test_a_request_past_its_deadline_is_given_up(scripted: Scripted, adapters: Path) -> None:
    async def main() -> None:
        engine = scripted()
        async with running(service_of(engine, adapters)) as service:
            other = await busy(service, engine)
            for deadline in (time.monotonic() - 1, time.monotonic() + 0.2):
                with refused(504, "deadline_passed"):
                    await service.transcribe(request(clip(1), "ann", deadline=deadline))
            engine.go.set()
            await other
            await until(lambda: held(service) == 0)
            assert engine.batches[1:] == [[900]]

    asyncio.run(main())


# --- too much ---


def test_more_audio_than_may_wait_is_refused_until_there_is_room(scripted: Scripted, adapters: Path) -> None:
    async def main() -> None:
        engine = scripted()
        limits = {"max_queued_seconds": 20.0, "max_queued_seconds_per_person": 10.0}
        async with running(service_of(engine, adapters, **limits)) as service:
            tasks = [await busy(service, engine)]
            tasks.append(asyncio.create_task(service.transcribe(request(clip(1, 8.0), "ann"))))
            await until(lambda: metric(service, "resonance_queued_audio_seconds") == 9.0)
            with refused(429, "person_too_busy") as caught:
                await service.transcribe(request(clip(2, 4.0), "ann"))
            # At the pace of a real-time model, which is all that is known; two people share it.
            assert caught.value.retry_after == 4
            tasks.append(asyncio.create_task(service.transcribe(request(clip(3, 9.0), "bo"))))
            await until(lambda: metric(service, "resonance_queued_audio_seconds") == 18.0)
            with refused(429, "too_busy") as caught:
                await service.transcribe(request(clip(4, 5.0)))
            assert caught.value.retry_after == 3
            assert metric(service, "resonance_refused_total", code="too_busy") == 1
            engine.go.set()
            assert all(answer.result.text for answer in await asyncio.gather(*tasks))
            assert (await service.transcribe(request(clip(2, 4.0), "ann"))).result.text
            # Longer than the limit, but nobody else waits.
            assert (await service.transcribe(request(clip(5, 25.0), "ann"))).result.text

    asyncio.run(main())


def test_a_copy_reads_no_adapter_for_who_is_not_admitted(scripted: Scripted, adapters: Path) -> None:
    async def main() -> None:
        engine = scripted()
        async with running(service_of(engine, adapters, max_queued_seconds=1.5)) as service:
            copy = Replica.__new__(Replica)
            copy.service, copy.held, copy.key = service, set(), b"key"
            task = await busy(service, engine)
            refusal = await copy.transcribe(request(clip(1), "ann"), 60.0)
            assert isinstance(refusal, Refusal) and refusal.code == "too_busy"
            assert service.pool and service.pool.stats().loads == 0 and not copy.held
            engine.go.set()
            await task
            assert isinstance(await copy.transcribe(request(clip(1), "ann"), 60.0), Answer)
            pieces = [piece async for piece in copy.stream(request(clip(1), "bo"), 60.0)]
            assert isinstance(pieces[-1], Answer) and copy.held == {"ann", "bo"}

    asyncio.run(main())


def test_an_upload_that_turns_out_longer_than_there_is_room_for_is_refused(scripted: Scripted) -> None:
    async def main() -> None:
        engine = scripted()
        file = io.BytesIO()
        soundfile.write(file, np.zeros(60 * SAMPLE_RATE, np.float32), SAMPLE_RATE, format="FLAC")
        assert len(file.getvalue()) < 64_000  # a second or two of WAV
        service = service_of(engine, uploads=True, decode_workers=1, max_queued_seconds=10.0)
        async with running(service):
            other = await busy(service, engine)
            with refused(429, "too_busy"):
                await service.transcribe(request(Upload(file.getvalue(), "silence.flac")))
            assert metric(service, "resonance_queued_audio_seconds") == 1.0
            engine.go.set()
            await other

    asyncio.run(main())


# --- its life ---


def test_while_the_model_is_loaded_requests_are_refused_and_then_they_are_not(base: MixedRecognizer) -> None:
    async def main() -> None:
        loads = threading.Event()

        def load() -> Any:
            assert loads.wait(WAIT)
            return base, None

        given = service_of(None)
        service = Service(given.config, None, None, given._decoder, Metrics(), load=load)
        async with running(service):
            assert service.state.status == "loading" and service.base_name == "scripted"
            with refused(503, "loading") as caught:
                await service.transcribe(request(clip(1)))
            assert caught.value.retry_after
            with refused(503, "loading"):
                await service.check()
            loads.set()
            assert (await service.loaded()).status == "ready"
            await service.check()
            assert service.base_fingerprint == base.fingerprint

    asyncio.run(main())


@pytest.mark.parametrize("error", [ModelError("there is no model at /models/x"), RuntimeError("no GPU")])
def test_a_model_that_cannot_be_loaded_is_the_reason_given(error: Exception) -> None:
    async def main() -> None:
        def load() -> Any:
            raise error

        given = service_of(None)
        service = Service(given.config, None, None, given._decoder, Metrics(), load=load)
        async with running(service):
            state = await service.loaded()
            assert state.status == "broken" and str(error) in state.reason
            with refused(503, "broken"):
                await service.transcribe(request(clip(1)))

    asyncio.run(main())


def test_a_service_is_stopped_while_its_model_is_loading() -> None:
    async def main() -> None:
        never = threading.Event()
        given = service_of(None)
        service = Service(
            given.config, None, None, given._decoder, Metrics(), load=lambda: never.wait(WAIT) or (None, None)
        )
        await service.start()
        await service.drain(0)
        assert service.state.status == "draining"
        never.set()

    asyncio.run(main())


def test_what_is_under_way_is_finished_before_the_end_and_nothing_new_is_begun(
    scripted: Scripted, adapters: Path
) -> None:
    async def main() -> None:
        engine = scripted()
        service = service_of(engine, adapters, batch_size=1)
        await service.start()
        tasks = [await busy(service, engine)]
        tasks += [asyncio.create_task(service.transcribe(request(clip(i), "ann"))) for i in range(1, 5)]
        await until(lambda: metric(service, "resonance_queued_audio_seconds") == 5.0)
        draining = asyncio.create_task(service.drain(600))
        await until(lambda: service.state.status == "draining")
        with refused(503, "draining") as caught:
            await service.transcribe(request(clip(9)))
        assert caught.value.retry_after
        engine.go.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.result.text.split()[1] for answer in answers] == ["900", "1", "2", "3", "4"]
        await draining
        assert held(service) == 0

    asyncio.run(main())


def test_what_is_not_finished_in_time_is_refused_at_the_end(
    scripted: Scripted, adapters: Path, monkeypatch: Any
) -> None:
    from resonance.serve import service as module

    monkeypatch.setattr(module, "CLOSING_SECONDS", 0.05)

    async def main() -> None:
        engine = scripted()
        service = service_of(engine, adapters)
        await service.start()
        tasks = [await busy(service, engine), asyncio.create_task(service.transcribe(request(clip(1), "ann")))]
        await until(lambda: held(service) == 1)
        await service.drain(0.01)
        for task in tasks:
            with refused(503, "draining"):
                await task
        engine.go.set()
        await until(lambda: held(service) == 0)

    asyncio.run(main())


def test_a_model_that_hangs_is_not_ready(scripted: Scripted) -> None:
    async def main() -> None:
        engine = scripted()
        async with running(service_of(engine, ready_seconds=0.3)) as service:
            await service.check()
            task = await busy(service, engine)
            with refused(503, "not_ready"):
                await service.check()
            engine.go.set()
            await task
            await service.check()

    asyncio.run(main())


def test_a_model_that_has_hung_for_long_is_broken(scripted: Scripted) -> None:
    async def main() -> None:
        engine = scripted()
        async with running(service_of(engine, deadline_seconds=0.01)) as service:
            task = await busy(service, engine)
            await until(lambda: service.state.status == "broken")
            with refused(503, "broken"):
                await service.transcribe(request(clip(1)))
            engine.go.set()
            assert (await task).result.text
            assert service.state.status == "ready"

    asyncio.run(main())


def test_a_service_is_made_from_its_settings(tiny_model: Path, adapters: Path, short_answers: None) -> None:
    async def main() -> None:
        config = settings_for(model=str(tiny_model), adapters=adapters, adapter_memory="100MB", device="cpu")
        service = create_service(config)
        async with running(service):
            assert (await service.loaded()).status == "ready", service.state
            assert service.base_name == str(tiny_model) and service.store is not None
            assert service.tokens("ab")
            answer = await service.transcribe(request(clip(1), "ann", language="de"))
            assert answer.voice and answer.voice.patient == "ann" and answer.result.duration == 1.0
            with refused(400, "invalid_settings"):
                await service.transcribe(request(clip(1), "ann", language="fr"))

    asyncio.run(main())
