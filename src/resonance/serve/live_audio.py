"""Sound while it is being made: blocks of PCM or of an Opus stream, as samples at 16 kHz, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import soxr

from resonance.messages import _
from resonance.serve.faults import ServiceError
from resonance.units import SAMPLE_RATE

Samples = npt.NDArray[np.float32]

NOTHING = np.zeros(0, np.float32)
STARTS = {b"OggS": "ogg", b"\x1aE\xdf\xa3": "matroska"}  # of what a browser's MediaRecorder sends
FEWEST_RATE, MOST_RATE = 8_000, 96_000  # samples per second
READ_BYTES = 4096
ENDING_SECONDS = 10.0  # for the decoder to finish what it was given


class LiveAudio(Protocol):
    """A stream of sound."""

    def add(self, data: bytes) -> None:
        """Take what came. Raises ServiceError where it cannot be sound."""

    async def take(self, *, last: bool = False) -> Samples:
        """What can be heard of it and was not taken yet; with `last`, all of it. Raises ServiceError 400."""

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
        found, self.ready = np.concatenate([NOTHING, *self.ready]), []
        return found

    def close(self) -> None:
        self.ready = []


class Opus:
    """Opus in Ogg or WebM, decoded by FFmpeg in a thread as it comes. Nothing but these two containers and this one codec
    is opened, and no more than `max_seconds` of sound is decoded."""

    def __init__(self, max_seconds: float) -> None:
        self.max_samples = int(max_seconds * SAMPLE_RATE)
        self.incoming: queue.Queue[bytes] = queue.Queue()  # b"" is the end
        self.lock = threading.Lock()
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
            self.thread = threading.Thread(target=self._decode, args=(form,), name="opus", daemon=True)
            self.thread.start()
        if self.fault:
            raise self.fault
        if data:
            self.incoming.put(data)

    async def take(self, *, last: bool = False) -> Samples:
        if last:
            self.incoming.put(b"")
            if self.thread:
                await asyncio.to_thread(self.thread.join, ENDING_SECONDS)
            elif self.begun:
                raise not_opus()
        with self.lock:
            found, self.ready = np.concatenate([NOTHING, *self.ready]), []
        if self.fault:
            raise self.fault
        return found

    def close(self) -> None:
        self.closed = True
        self.incoming.put(b"")
        self.ready = []

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
            if self.closed:
                return
            with self.lock:
                self.ready += blocks
            if count > self.max_samples:
                return  # who listens counts too, and refuses


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
