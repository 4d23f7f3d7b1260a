"""Sound while it is being made: blocks of PCM or of an Opus stream, as samples at 16 kHz, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import soxr

from resonance.messages import _
from resonance.serve.faults import ServiceError, deadline_passed
from resonance.units import SAMPLE_RATE

Samples = npt.NDArray[np.float32]

NOTHING = np.zeros(0, np.float32)
STARTS = {b"OggS": "ogg", b"\x1aE\xdf\xa3": "matroska"}  # of what a browser's MediaRecorder sends
FEWEST_RATE, MOST_RATE = 8_000, 96_000  # samples per second
READ_BYTES = 4096
WAIT_STEP_SECONDS = 0.01
ENDING_SECONDS = 10.0  # for the decoder to finish what it was given
# Half a megabyte of Opus can be half an hour of silence: decoded at once that took 800 MB, and 5 s of the event loop.
TAKEN_SAMPLES = 5 * SAMPLE_RATE  # given at once
READY_SAMPLES = 10 * SAMPLE_RATE  # decoded ahead of who takes it


class LiveAudio(Protocol):
    """A stream of sound."""

    def add(self, data: bytes) -> None:
        """Take what came. Raises ServiceError where it cannot be sound."""

    async def take(self, *, last: bool = False) -> Samples:
        """What can be heard of it and was not taken yet, [samples] of at most 5 s; none where there is no more now. With
        `last` nothing more comes, and none means that all was taken. Raises ServiceError 400, and 504 where the rest is not
        decoded in time."""

    def close(self) -> None:
        """Let go of everything."""


class Pcm:
    """Samples of 16 bits, little-endian, mono."""

    def __init__(self, sample_rate: int) -> None:
        self.resampler = (
            None if sample_rate == SAMPLE_RATE else soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, quality="HQ")
        )
        self.rest = b""  # half a sample
        self.ready: list[Samples] = []

    def add(self, data: bytes) -> None:
        data = self.rest + data
        whole = len(data) // 2 * 2
        self.rest = data[whole:]
        samples = np.frombuffer(data[:whole], "<i2").astype(np.float32) / 32768.0
        self.ready.append(self.resampler.resample_chunk(samples) if self.resampler else samples)

    async def take(self, *, last: bool = False) -> Samples:
        if last and self.resampler:
            self.ready.append(self.resampler.resample_chunk(NOTHING, last=True))
            self.resampler = None
        found, self.ready = _first(self.ready)
        return found

    def close(self) -> None:
        self.ready = []


class Opus:
    """Opus in Ogg or WebM, decoded by FFmpeg in a thread as it comes. Nothing but these two containers and this one codec
    is opened, no more than `max_seconds` of sound is decoded, and no more than 10 s before it is taken."""

    def __init__(self, max_seconds: float) -> None:
        self.max_samples = int(max_seconds * SAMPLE_RATE)
        self.incoming: queue.Queue[bytes] = queue.Queue()  # b"" is the end
        self.room = threading.Condition()  # guards `ready`; the decoder waits for it to be taken
        self.ready: list[Samples] = []
        self.fault: ServiceError | None = None
        self.begun = b""
        self.thread: threading.Thread | None = None
        self.closed = False

    def add(self, data: bytes) -> None:
        if self.thread is None:
            self.begun += data
            if len(self.begun) < 4:
                return
            form = STARTS.get(self.begun[:4])
            if form is None:
                raise not_opus()
            data, self.begun = self.begun, b""
            thread = threading.Thread(target=self._decode, args=(form,), name="opus", daemon=True)
            thread.start()
            self.thread = thread
        if self.fault:
            raise self.fault
        if data:
            self.incoming.put(data)

    async def take(self, *, last: bool = False) -> Samples:
        if last:
            self.incoming.put(b"")
            if self.thread:
                until = time.monotonic() + ENDING_SECONDS
                while not self._enough() and time.monotonic() < until:
                    await asyncio.sleep(WAIT_STEP_SECONDS)
            elif self.begun:
                raise not_opus()
        with self.room:
            found, self.ready = _first(self.ready)
            self.room.notify()
        if self.fault and not len(found):
            raise self.fault
        if last and not len(found) and self.thread and self.thread.is_alive():
            raise deadline_passed()
        return found

    def close(self) -> None:
        with self.room:
            self.closed = True
            self.ready = []
            self.room.notify()
        self.incoming.put(b"")

    def _enough(self) -> bool:
        """Whether there is as much as is taken at once, or nothing more comes."""
        with self.room:
            return self._held() >= TAKEN_SAMPLES or not (self.thread and self.thread.is_alive())

    def _held(self) -> int:
        return sum(len(block) for block in self.ready)

    def _decode(self, form: str) -> None:
        import av

        try:
            options = {"protocol_whitelist": "none"}
            with av.open(_Pipe(self), format=form, options=options, metadata_errors="ignore") as container:
                stream = container.streams.best("audio")
                if (
                    stream is None
                    or stream.codec_context is None
                    or stream.codec_context.codec.canonical_name != "opus"
                ):
                    raise not_opus()
                self._samples(container, stream)
        except ServiceError as fault:
            self.fault = fault
        except (av.FFmpegError, ValueError, OSError):
            self.fault = not_opus()

    def _samples(self, container: Any, stream: Any) -> None:
        import av

        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        count = 0
        for frame in _frames(container, stream):
            blocks = [part.to_ndarray().reshape(-1) for part in resampler.resample(frame)]
            count += sum(len(block) for block in blocks)
            with self.room:
                self.room.wait_for(lambda: self.closed or self._held() < READY_SAMPLES)
                if self.closed:
                    return
                self.ready += blocks
            if count > self.max_samples:
                return  # who listens counts too, and refuses


def _first(ready: list[Samples]) -> tuple[Samples, list[Samples]]:
    """As much as is taken at once, and what is left."""
    found = np.concatenate([NOTHING, *ready])
    return found[:TAKEN_SAMPLES], [found[TAKEN_SAMPLES:]] if len(found) > TAKEN_SAMPLES else []


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Frames of a stream, then None, which empties the resampler. A packet that is damaged is left out."""
    import av

    for packet in container.demux(stream):
        with contextlib.suppress(av.InvalidDataError):
            yield from packet.decode()
    yield None


class _Pipe:
    """What FFmpeg reads from: waits for what has not come yet."""

    def __init__(self, owner: Opus) -> None:
        self.owner = owner
        self.held = b""
        self.ended = False

    def read(self, size: int = READ_BYTES) -> bytes:
        if not self.held and not self.ended:
            self.held = self.owner.incoming.get()
            self.ended = not self.held or self.owner.closed
        found, self.held = self.held[:size], self.held[size:]
        return b"" if self.owner.closed else found


def not_opus() -> ServiceError:
    return ServiceError(
        400,
        "audio_unreadable",
        _("This is no Opus in Ogg or WebM."),
        _("Send what a browser's MediaRecorder gives, from its first piece on, or pcm16."),
    )
