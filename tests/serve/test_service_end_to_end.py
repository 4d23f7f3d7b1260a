"""The real model, real adapters, many people at once: everybody is answered as if he were alone."""

from __future__ import annotations

import asyncio
import io
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from resonance.serve.faults import ServiceError
from resonance.serve.speech import Answer, Upload
from resonance.transcribe.mixed_engine import MixedRecognizer, Row, load_mixed
from resonance.units import SAMPLE_RATE

sys.path.insert(0, str(Path(__file__).parent))
from scripted import WAIT
from serving import metric, request, running, service_of

pytestmark = pytest.mark.usefixtures("short_answers")

RANKS = {"ann": 2, "bo": 4, "chen": 8, "dana": 16}


@pytest.fixture(scope="module")
def engine(openai_shaped: Path) -> MixedRecognizer:
    return load_mixed(str(openai_shaped), device="cpu")


@pytest.fixture(scope="module")
def folders(openai_shaped: Path, make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter folder for each person, of different ranks and layers. For reading only."""
    root = tmp_path_factory.mktemp("people")
    for seed, (name, rank) in enumerate(RANKS.items()):
        layers = ["all-linear"] if seed % 2 else ["q_proj", "v_proj"]
        make_adapter(root / name, base=openai_shaped, rank=rank, seed=seed, target_modules=layers)
    return root


@pytest.fixture
def store(folders: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(folders, tmp_path / "people"))


def sound(seed: int, seconds: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tone = 0.3 * np.sin(2 * np.pi * random.uniform(150, 900) * times)
    return (tone + 0.02 * random.standard_normal(len(times))).astype(np.float32)


def texts(answers: Sequence[Answer]) -> list[tuple[str | None, str]]:
    return [(answer.voice.patient if answer.voice else None, answer.result.text) for answer in answers]


def test_people_mixed_in_batches_are_understood_as_each_alone(engine: MixedRecognizer, folders: Path) -> None:
    async def main() -> None:
        requests = [
            request(sound(i), name, language="en", num_beams=beams)
            for i, name in enumerate([*RANKS, None])
            for beams in (1, 3)
        ]
        async with running(service_of(engine, folders, batch_size=1)) as service:
            alone = [await service.transcribe(each) for each in requests]
            assert metric(service, "resonance_batch_windows_sum") == metric(service, "resonance_batch_windows_count")
        async with running(service_of(engine, folders, batch_size=6, gather_ms=1000)) as service:
            together = await asyncio.gather(*(service.transcribe(each) for each in requests))
            assert metric(service, "resonance_batch_windows_count") < len(requests)
        assert texts(together) == texts(alone)
        assert len({text for _name, text in texts(alone)}) > len(RANKS)  # adapters and sounds do matter

    asyncio.run(main())


def test_a_long_recording_mixed_with_phrases_is_the_same_as_alone(engine: MixedRecognizer, folders: Path) -> None:
    async def main() -> None:
        long = np.concatenate([sound(i, 1.5) for i in range(8)])
        async with running(service_of(engine, folders, batch_size=4, gather_ms=50)) as service:
            alone = await service.transcribe(request(long, "ann", times="segment"))
            phrases = [service.transcribe(request(sound(i), name)) for i, name in enumerate(RANKS)]
            mixed, *_others = await asyncio.gather(service.transcribe(request(long, "ann", times="segment")), *phrases)
            assert mixed.result == alone.result and len(mixed.result.segments) >= 3

    asyncio.run(main())


def test_after_an_error_in_the_middle_of_a_batch_the_next_plain_call_is_right(
    engine: MixedRecognizer, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's hooks stayed behind after an exception, and a plain call answered with another person's adapter."""
    from resonance.transcribe import mixed_engine

    async def main() -> None:
        async with running(service_of(engine, folders, gather_ms=1000, batch_size=len(RANKS))) as service:
            plain = (await service.transcribe(request(sound(1), language="en"))).result.text
            right = [(await service.transcribe(request(sound(1), name, language="en"))).result.text for name in RANKS]
            assert plain not in right
            usual, failed = mixed_engine.answers, []

            def fails(*given: Any, **more: Any) -> Any:
                if len(failed) < 3:  # the whole batch, a half, and one window: with the adapters in place
                    failed.append(True)
                    with engine.mixture.speaking([None]):
                        raise RuntimeError("in the middle")
                return usual(*given, **more)

            monkeypatch.setattr(mixed_engine, "answers", fails)
            requests = [service.transcribe(request(sound(1), name, language="en")) for name in RANKS]
            found = await asyncio.gather(*requests, return_exceptions=True)
            errors = [each for each in found if isinstance(each, ServiceError)]
            assert [error.code for error in errors] == ["inference_failed"]
            for each, expected in zip(found, right, strict=True):
                assert each in errors or (isinstance(each, Answer) and each.result.text == expected)
            assert service.state.status == "ready"
            assert (await service.transcribe(request(sound(1), language="en"))).result.text == plain
            assert engine.mixture.rows == ()

    asyncio.run(main())


def test_a_recording_under_way_keeps_its_voice_while_a_new_one_is_put_in_place(
    engine: MixedRecognizer, store: Path, make_adapter: Callable[..., Path], openai_shaped: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        long = np.concatenate([sound(i, 1.5) for i in range(8)])
        new = make_adapter(tmp_path / "new", base=openai_shaped, rank=6, seed=99)
        async with running(service_of(engine, store, batch_size=1, refresh_seconds=1e6)) as service:
            before = await service.transcribe(request(long, "ann"))
            stream = service.stream(request(long, "ann"))
            pieces = [await anext(stream)]
            put = await service.put_adapter("ann", new)
            after = await service.transcribe(request(long, "ann"))
            pieces += [piece async for piece in stream]
            answer = pieces[-1]
            assert isinstance(answer, Answer)
            assert answer.voice == before.voice and answer.result == before.result
            assert after.voice and after.voice.version == put.name and after.voice != before.voice
            assert after.result.text != before.result.text
            assert service.pool and (service.pool.stats().loaded, service.pool.stats().pinned) == (1, 0)

    asyncio.run(main())


def test_more_people_than_memory_has_room_for_are_answered_in_turn(engine: MixedRecognizer, folders: Path) -> None:
    async def main() -> None:
        async with running(service_of(engine, folders)) as service:
            right = {name: await service.transcribe(request(sound(5), name)) for name in RANKS}
            assert service.pool
            largest = max(service.pool.acquire(name).nbytes for name in RANKS)
            everything = service.pool.stats().bytes
        budget = largest + (everything - largest) // 2
        async with running(service_of(engine, folders, budget=budget)) as service:

            async def ask(name: str) -> Answer:
                while True:
                    try:
                        return await service.transcribe(request(sound(5), name))
                    except ServiceError as error:
                        assert error.code == "adapter_memory_full" and error.retry_after
                        await asyncio.sleep(0.01)  # as a client does, if a little sooner

            names = [*RANKS] * 5
            for name, answer in zip(names, await asyncio.gather(*map(ask, names)), strict=True):
                assert (answer.voice, answer.result) == (right[name].voice, right[name].result)
            assert service.pool
            stats = service.pool.stats()
            assert stats.evictions and stats.bytes <= budget and stats.pinned == 0
            assert metric(service, "resonance_adapters_evictions_total") == stats.evictions

    asyncio.run(main())


def test_64_clients_with_bad_audio_and_adapters_that_come_and_go_are_all_answered(
    engine: MixedRecognizer, store: Path, make_adapter: Callable[..., Path], openai_shaped: Path, tmp_path: Path
) -> None:
    clients, each = 64, 3
    sounds = [sound(i, 0.5) for i in range(4)]
    guests = ["guest1", "guest2"]
    guest = [make_adapter(tmp_path / f"g{i}", base=openai_shaped, rank=2 + i, seed=50 + i) for i in range(2)]
    bad = Upload(b"RIFF" + b"\0" * 200, "bad.wav")

    def upload(audio: np.ndarray) -> Upload:
        file = io.BytesIO()
        soundfile.write(file, audio, SAMPLE_RATE, format="WAV")
        return Upload(file.getvalue(), "good.wav")

    async def main() -> None:
        usual = {"batch_size": 16, "refresh_seconds": 0.0, "decode_workers": 1}
        async with running(service_of(engine, store, uploads=True, **usual)) as service:
            expected = {
                (name, i): (await service.transcribe(request(audio, name))).result.text
                for name in (*RANKS, None)
                for i, audio in enumerate(sounds)
            }
            found: list[str] = []
            done = asyncio.Event()

            async def client(number: int) -> None:
                random = np.random.default_rng(number)
                for _turn in range(each):
                    name = [*RANKS, None, *guests][random.integers(len(RANKS) + 3)]
                    i = int(random.integers(len(sounds)))
                    kind = random.random()
                    audio = bad if kind < 0.05 else upload(sounds[i]) if kind < 0.2 else sounds[i]
                    try:
                        answer = await service.transcribe(request(audio, name, account=str(number)))
                    except ServiceError as error:
                        assert error.code == ("audio_unreadable" if audio is bad else "adapter_not_found"), error
                        assert error.code == "audio_unreadable" or name in guests
                        found.append(error.code)
                        continue
                    assert (answer.voice.patient if answer.voice else None) == name
                    if name not in guests and not isinstance(audio, Upload):  # 16 bits are not what was computed
                        assert answer.result.text == expected[name, i]
                    found.append("text")

            async def come_and_go() -> None:
                turn = 0
                while not done.is_set():
                    name = guests[turn % 2]
                    await service.put_adapter(name, guest[turn // 2 % 2])
                    await service.put_adapter("dana", store_copy["dana"])
                    if turn % 4 > 1:
                        await service.delete_adapter(name)
                    turn += 1
                    await asyncio.sleep(0.01)

            store_copy = {"dana": shutil.copytree(store / "dana", tmp_path / "dana")}
            for name in guests:  # on a slow machine, all have asked before the first of them comes
                await service.put_adapter(name, guest[0])
            changing = asyncio.create_task(come_and_go())
            await asyncio.gather(*map(client, range(clients)))
            done.set()
            await changing
            # A twentieth is not audio; a quarter asks for guests, who on a busy machine are hardly ever there.
            assert len(found) == clients * each and found.count("text") > clients * each * 0.6
            assert "audio_unreadable" in found
            assert metric(service, "resonance_failed_windows_total") == 0
            assert metric(service, "resonance_queued_audio_seconds") == 0
            assert service.pool and service.pool.stats().pinned == 0
            assert metric(service, "resonance_batch_windows_sum") / metric(service, "resonance_batch_windows_count") > 2

    asyncio.run(main())


def test_the_model_is_asked_by_one_thread_only(engine: MixedRecognizer, folders: Path, monkeypatch: Any) -> None:
    threads: set[int] = set()
    usual = MixedRecognizer.transcribe

    def watched(self: MixedRecognizer, rows: Sequence[Row]) -> Any:
        threads.add(threading.get_ident())
        return usual(self, rows)

    monkeypatch.setattr(MixedRecognizer, "transcribe", watched)

    async def main() -> None:
        async with running(service_of(engine, folders)) as service:
            asked = [service.transcribe(request(sound(i), name)) for i, name in enumerate(RANKS)]
            await asyncio.wait_for(asyncio.gather(*asked, service.check()), WAIT)

    asyncio.run(main())
    assert len(threads) == 1 and threading.get_ident() not in threads
