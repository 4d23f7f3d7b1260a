"""Uploads are decoded in processes of their own: what was sent comes out as sound, and what was made to do harm does none."""

from __future__ import annotations

import asyncio
import functools
import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resonance.config_serve import ServeConfig
from resonance.data.audio import read_audio
from resonance.serve import decode_pool
from resonance.serve.decode_pool import AudioDecoder, audio_decoder
from resonance.serve.faults import ServiceError
from resonance.serve.speech import Decoded, Upload

Given = TypeVar("Given")
MAX_SECONDS = 60.0
MEMORY = 300 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


class Pool:
    """A decoder on an event loop of its own, for tests that are not asynchronous."""

    def __init__(self, decoder: AudioDecoder) -> None:
        self.decoder = decoder
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, Given]) -> Given:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def decode(self, data: bytes, name: str = "sound.wav") -> Decoded:
        return self.run(self.decoder.decode(Upload(data, name), time.monotonic() + 50))

    def refusal(self, data: bytes, name: str = "sound.wav") -> ServiceError:
        with pytest.raises(ServiceError) as caught:
            self.decode(data, name)
        return caught.value

    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self.decoder._idle if worker]

    def close(self) -> None:
        self.run(self.decoder.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def decoder_of(**changes: Any) -> AudioDecoder:
    usual: dict[str, Any] = {
        "workers": 1,
        "max_seconds": MAX_SECONDS,
        "max_upload_bytes": 10_000_000,
        "decode_seconds": 20.0,
        "memory_bytes": MEMORY,
    }
    return AudioDecoder(**{**usual, **changes})


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(decoder_of())
    yield pool
    pool.close()


def tone(seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    moments = np.arange(round(seconds * rate)) / rate
    wave = (0.3 * np.sin(2 * np.pi * 300 * moments)).astype(np.float32)
    return wave if channels == 1 else np.repeat(wave[:, None], channels, axis=1)


def written(audio: np.ndarray, form: str = "WAV", rate: int = 16_000, subtype: str | None = None) -> bytes:
    memory = io.BytesIO()
    soundfile.write(memory, audio, rate, format=form, subtype=subtype)
    return memory.getvalue()


@functools.cache
def silent_flac(seconds: int, channels: int = 1, rate: int = 16_000) -> bytes:
    memory = io.BytesIO()
    block = np.zeros((rate * 10, channels), np.int16)
    with soundfile.SoundFile(memory, "w", rate, channels, format="FLAC", subtype="PCM_16") as file:
        for _ in range(seconds // 10):
            file.write(block)
    return memory.getvalue()


class Unseekable(io.RawIOBase):
    """Where FFmpeg cannot go back to write how long it became."""

    def __init__(self) -> None:
        self.content = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.content += bytes(data)
        return len(data)


def silent_opus(seconds: float) -> bytes:
    """Matroska without a length, 3 bytes of Opus for each 20 ms of silence."""
    target = Unseekable()
    with av.open(target, "w", format="matroska") as output:
        stream = output.add_stream("libopus", rate=48_000, layout="mono")
        stream.codec_context.open()
        for i in range(round(seconds / 0.02)):
            packet = av.Packet(b"\xf8\xff\xfe")
            packet.stream, packet.time_base = stream, stream.codec_context.time_base
            packet.pts = packet.dts = i * 960
            packet.duration = 960
            output.mux(packet)
    return target.content


def status_kib(pid: int, field: str) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


@pytest.mark.parametrize(
    ("form", "rate", "subtype"),
    [("WAV", 16_000, "PCM_16"), ("WAV", 8_000, "ULAW"), ("FLAC", 44_100, "PCM_24"), ("OGG", 48_000, "VORBIS")],
)
def test_an_upload_comes_out_as_reading_the_file_would_give_it(
    pool: Pool, form: str, rate: int, subtype: str, tmp_path: Path
) -> None:
    data = written(tone(3.1, rate), form, rate, subtype)
    (tmp_path / "sound").write_bytes(data)
    decoded = pool.decode(data)
    assert decoded.warning is None
    assert decoded.samples.dtype == np.float32
    np.testing.assert_array_equal(decoded.samples, read_audio(tmp_path / "sound"))


def test_a_long_recording_comes_whole(pool: Pool) -> None:
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000 * 59).astype(np.float32)
    np.testing.assert_array_equal(pool.decode(written(audio, subtype="FLOAT")).samples, audio)


def test_what_can_be_read_of_a_recording_that_is_cut_off_is_given_back_with_a_warning(pool: Pool) -> None:
    decoded = pool.decode(written(tone(4))[: 2 * 16_000 * 2], "visit.wav")
    assert len(decoded.samples) == pytest.approx(2 * 16_000, abs=50)
    assert decoded.warning and decoded.warning.startswith("visit.wav: the file is cut off")


@pytest.mark.parametrize(
    ("data", "status", "code", "words"),
    [
        (b"", 400, "audio_empty", "empty (0 bytes)"),
        (written(tone(0)), 400, "audio_empty", "0 seconds"),
        (b"\x00\x01\x02" * 500, 400, "audio_unreadable", "no sound that can be decoded"),
        (b"Dear Sir, I have no recording", 400, "audio_unreadable", "text file"),
        (written(tone(1))[:30], 400, "audio_unreadable", "sound.wav"),
        (written(tone(61)), 413, "audio_too_long", "longer than the 60 seconds"),
        (bytes(10_000_001), 413, "upload_too_large", "larger than 10 MB"),
    ],
    ids=["no bytes", "no samples", "noise", "text", "header alone", "too long", "too large"],
)
def test_what_cannot_be_used_is_refused_with_its_reason(
    pool: Pool, data: bytes, status: int, code: str, words: str
) -> None:
    refusal = pool.refusal(data)
    assert (refusal.status, refusal.code, refusal.param) == (status, code, "file")
    assert words in refusal.message
    assert refusal.hint
    assert "/" not in refusal.message  # no path of the server


@linux
def test_samples_beyond_any_sound_are_refused_and_those_of_a_loud_recording_are_not(pool: Pool) -> None:
    audio = tone(1.0)
    audio[8000] = 3.0
    assert pool.decode(written(audio, subtype="FLOAT")).samples.max() == 3.0
    audio[8000] = -1e30
    refused = pool.refusal(written(audio, subtype="FLOAT"))
    assert (refused.status, refused.code) == (400, "audio_unreadable") and "1.0e+30" in refused.message


def test_a_wav_that_claims_1_hz_costs_nothing(pool: Pool) -> None:
    data = bytearray(written(tone(0.625)))  # 20 kB, which at 1 Hz would be 10,000 s or 640 MB
    data[24:28] = struct.pack("<I", 1)
    before = status_kib(pool.pids()[0], "VmHWM")
    refusal = pool.refusal(bytes(data))
    assert (refusal.status, refusal.code) == (400, "audio_unreadable")
    assert "claims 1 samples per second" in refusal.message
    assert status_kib(pool.pids()[0], "VmHWM") < before + 5_000


@linux
def test_a_small_file_that_unpacks_to_hours_is_refused_before_it_is_unpacked() -> None:
    flac, opus = silent_flac(3600), silent_opus(600)
    assert len(flac) < 1_000_000 and len(opus) < 500_000  # 230 MB and 38 MB of samples
    pool = Pool(decoder_of())
    try:
        pool.decode(written(tone(1)))
        for data in (flac, opus):
            assert pool.refusal(data).code == "audio_too_long"
        assert status_kib(pool.pids()[0], "VmHWM") < 100_000
    finally:
        pool.close()


@linux
def test_many_channels_at_a_high_rate_are_decoded_in_little_memory() -> None:
    pool = Pool(decoder_of())
    try:
        decoded = pool.decode(silent_flac(50, channels=8, rate=96_000))  # 150 MB of samples
        assert len(decoded.samples) == 50 * 16_000
        assert status_kib(pool.pids()[0], "VmHWM") < 100_000
    finally:
        pool.close()


def test_too_much_memory_ends_the_upload_and_not_the_service() -> None:
    pool = Pool(decoder_of(memory_bytes=6 << 20))
    try:
        refusal = pool.refusal(written(tone(59)) + bytes(6_000_000))
        assert (refusal.status, refusal.code) == (400, "audio_too_demanding")
        assert len(pool.decode(written(tone(1))).samples) == 16_000
    finally:
        pool.close()


def test_too_much_time_ends_the_upload_and_not_the_service() -> None:
    pool = Pool(decoder_of(decode_seconds=0.5))
    try:
        pool.run(pool.decoder.start())
        [stuck] = pool.pids()
        os.kill(stuck, signal.SIGSTOP)
        refusal = pool.refusal(written(tone(1)))
        assert (refusal.status, refusal.code) == (400, "audio_too_demanding")
        assert len(pool.decode(written(tone(1))).samples) == 16_000
        assert stuck not in pool.pids()
    finally:
        pool.close()


LIGHT = Upload(written(tone(1)), "light.wav")


async def stuck_decoder(**changes: Any) -> tuple[AudioDecoder, int]:
    """One that decodes nothing until its process, which is returned too, gets SIGCONT."""
    decoder = decoder_of(**changes)
    await decoder.start()
    [worker] = decoder._idle
    assert worker
    os.kill(worker.process.pid, signal.SIGSTOP)
    return decoder, worker.process.pid


def test_a_request_that_is_cancelled_frees_its_place() -> None:
    async def main() -> None:
        decoder, _pid = await stuck_decoder()
        [worker] = decoder._idle
        assert worker
        task, waiting, gone = (asyncio.create_task(decoder.decode(LIGHT, time.monotonic() + 50)) for _ in range(3))
        await asyncio.sleep(0.05)
        task.cancel()
        gone.cancel()
        assert len((await waiting).samples) == 16_000
        for cancelled in (task, gone):
            with pytest.raises(asyncio.CancelledError):
                await cancelled
        assert worker.process.returncode == -signal.SIGKILL
        assert len((await decoder.decode(LIGHT, time.monotonic() + 50)).samples) == 16_000
        await decoder.close()

    asyncio.run(main())


def test_waiting_ends_at_the_deadline_and_only_so_many_wait() -> None:
    async def main() -> None:
        decoder, pid = await stuck_decoder(max_waiting=1)
        busy = asyncio.create_task(decoder.decode(LIGHT, time.monotonic() + 50))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(decoder.decode(LIGHT, time.monotonic() + 0.1))
        await asyncio.sleep(0)
        with pytest.raises(ServiceError) as refused:
            await decoder.decode(LIGHT, time.monotonic() + 50)
        assert (refused.value.status, refused.value.code) == (503, "too_many_uploads")
        assert isinstance(refused.value.retry_after, int)
        for late in (waiting, asyncio.create_task(decoder.decode(LIGHT, time.monotonic() - 1))):
            with pytest.raises(ServiceError) as caught:
                await late
            assert (caught.value.status, caught.value.code) == (504, "deadline_passed")
        os.kill(pid, signal.SIGCONT)
        assert len((await busy).samples) == 16_000
        await decoder.close()

    asyncio.run(main())


def test_a_service_that_stops_waits_for_no_upload() -> None:
    async def main() -> None:
        decoder, _pid = await stuck_decoder()
        tasks = [asyncio.create_task(decoder.decode(LIGHT, time.monotonic() + 50)) for _ in range(2)]
        await asyncio.sleep(0.05)
        await decoder.close()
        with pytest.raises(ServiceError) as refused:
            await decoder.decode(LIGHT, time.monotonic() + 50)
        for fault in [refused.value, *await asyncio.gather(*tasks, return_exceptions=True)]:
            assert isinstance(fault, ServiceError) and (fault.status, fault.code) == (503, "draining")

    asyncio.run(main())


def test_as_many_as_wait_are_answered_in_turn_each_with_its_own() -> None:
    async def main() -> None:
        decoder = decoder_of(workers=2)
        lengths = [0.5 + 0.1 * i for i in range(24)]
        uploads = [Upload(written(tone(seconds)), f"{seconds}.wav") for seconds in lengths]
        answers = await asyncio.gather(*(decoder.decode(upload, time.monotonic() + 50) for upload in uploads))
        assert [len(answer.samples) for answer in answers] == [round(seconds * 16_000) for seconds in lengths]
        await decoder.close()

    asyncio.run(main())


def test_a_process_that_was_killed_while_it_waited_is_replaced(pool: Pool) -> None:
    pool.decode(written(tone(1)))
    [pid] = pool.pids()
    os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 5
    while any(worker and worker.alive for worker in pool.decoder._idle) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(pool.decode(written(tone(1))).samples) == 16_000
    assert pool.pids() != [pid]


def test_processes_are_renewed_before_leaks_of_libraries_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_pool, "UPLOADS_PER_PROCESS", 3)
    pool = Pool(decoder_of())
    try:
        seen: set[int] = set()
        for _ in range(7):
            assert len(pool.decode(written(tone(0.1))).samples) == 1_600
            seen |= set(pool.pids())
        assert len(seen) == 3
    finally:
        pool.close()


def test_a_decoder_that_cannot_start_is_said_to_be_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    pool = Pool(decoder_of())
    try:
        with pytest.raises(ServiceError) as at_the_start:
            pool.run(pool.decoder.start())
        for refusal in (at_the_start.value, pool.refusal(written(tone(1)))):
            assert (refusal.status, refusal.code) == (503, "decoder_unavailable")
        monkeypatch.undo()
        assert len(pool.decode(written(tone(1))).samples) == 16_000
    finally:
        pool.close()


@linux
def test_a_decoder_sees_no_secret_writes_no_file_and_loads_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pool = Pool(decoder_of())
    try:
        pool.decode(written(tone(1)))
        [pid] = pool.pids()
        process = Path(f"/proc/{pid}")
        assert b"hf_secret" not in (process / "environ").read_bytes()
        assert "torch" not in (process / "maps").read_text()
        limits = {line[:26].strip(): line[26:].split()[:2] for line in (process / "limits").read_text().splitlines()}
        assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
        assert int(limits["Max address space"][0]) < 300_000_000 + MEMORY
        assert limits["Max cpu time"][0].isdigit()  # of the upload before
        assert (process / "oom_score_adj").read_text() == "1000\n"
    finally:
        pool.close()


ORPHANS = """
import asyncio, time
from resonance.serve.decode_pool import AudioDecoder
async def main():
    decoder = AudioDecoder(workers=2, max_seconds=60, max_upload_bytes=1000, decode_seconds=5, memory_bytes=1 << 28)
    await decoder.start()
    print(*(worker.process.pid for worker in decoder._idle), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@linux
def test_decoders_end_with_the_service_however_it_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout
        pids = [int(pid) for pid in service.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGTERM)  # as systemd does to the whole group: a service under way still needs them
        time.sleep(0.1)
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        service.kill()
    until = time.monotonic() + 15
    while time.monotonic() < until and any(_runs(pid) for pid in pids):
        time.sleep(0.02)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


GOOD = {
    form: written(tone(1.5), form, subtype=subtype)
    for form, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"))
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(sorted(GOOD)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=6),
    end=st.floats(0, 1),
)
def test_a_damaged_file_is_read_or_refused_and_breaks_nothing(
    pool: Pool, form: str, changes: list[tuple[float, bytes]], end: float
) -> None:
    data = bytearray(GOOD[form])
    for place, content in changes:
        start = int(place**3 * len(data))  # headers are at the beginning
        data[start : start + len(content)] = content
    _read_or_refused(pool, bytes(data[: max(1, int(end * len(data)))]))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.sampled_from(
        [b"RIFF", b"fLaC", b"OggS", b"\x1aE\xdf\xa3", b"ID3", b"\0\0\0\x18ftypM4A ", b"#EXTM3U\n", b""]
    ),
    rest=st.binary(min_size=1, max_size=300),
)
def test_bytes_that_only_begin_like_sound_are_refused(pool: Pool, start: bytes, rest: bytes) -> None:
    _read_or_refused(pool, start + rest)


def _read_or_refused(pool: Pool, data: bytes) -> None:
    try:
        decoded = pool.decode(data)
    except ServiceError as refusal:
        assert refusal.status in (400, 413)
        assert refusal.code.startswith("audio_")
    else:
        assert 0 < len(decoded.samples) <= MAX_SECONDS * 16_000 + 1
        assert np.isfinite(decoded.samples).all()


def test_all_processes_are_there_after_the_start() -> None:
    pool = Pool(decoder_of(workers=3))
    try:
        pool.run(pool.decoder.start())
        assert len(set(pool.pids())) == 3
    finally:
        pool.close()


def test_settings_become_limits() -> None:
    config = ServeConfig(model="m", max_upload_mb=0.001, max_audio_seconds=2, decode_workers=3)
    decoder = audio_decoder(config)
    assert len(decoder._idle) == 3
    pool = Pool(decoder)
    try:
        assert pool.refusal(bytes(1001)).code == "upload_too_large"
        assert pool.refusal(silent_flac(10)[:1000]).code == "audio_too_long"
    finally:
        pool.close()
