"""Uploads decoded in processes of their own: what a file is made to do, it does to a process that can be killed.

A decoder reads formats made by strangers, in C. Its process is spawned, not forked from the one that holds the model,
sees neither its memory nor its environment, may not write files, and has limits of memory, processor time and clock time
beside those on samples. One that breaks a limit is killed and replaced, and so is one whose client has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from resonance.config_serve import ServeConfig
from resonance.messages import _
from resonance.serve.decoder_child import FRAME, PIECE_BYTES, UPLOAD
from resonance.serve.faults import ServiceError, deadline_passed, draining
from resonance.serve.speech import Decoded, Upload
from resonance.serve.uploads import upload_too_large
from resonance.units import MEBIBYTE, SAMPLE_RATE

CRASHES = {-getattr(signal, name, 0) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")} - {0}
WRITE_BYTES = 1 << 18
START_SECONDS = 60.0  # of a decoder process; it takes 0.3 s on an idle machine
UPLOADS_PER_PROCESS = 500  # then a fresh one: what libraries leak never counts against an upload
WORKING_MEMORY = 256 * MEBIBYTE  # beside the upload itself; decoding takes 20 MB
# What a decoder gets to see of the environment: no passwords, no tokens.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "RESONANCE_LANG", "LANG", "LC_ALL", "LC_MESSAGES", "LC_CTYPE")


def audio_decoder(config: ServeConfig) -> AudioDecoder:
    """The decoder that the settings describe."""
    upload_bytes = round(config.max_upload_mb * 1e6)
    return AudioDecoder(
        workers=config.decode_workers,
        max_seconds=config.max_audio_seconds,
        max_upload_bytes=upload_bytes,
        decode_seconds=config.decode_seconds,
        memory_bytes=2 * upload_bytes + WORKING_MEMORY,
    )


class AudioDecoder:
    """A pool of decoder processes, used from one event loop. A recording of 3 s takes 1 ms longer than decoding it here.

    memory_bytes: what one process may allocate beyond what it has when it starts; max_waiting: uploads that may wait for a
    process; max_waiting_bytes: of all of them together.
    """

    def __init__(
        self,
        *,
        workers: int,
        max_seconds: float,
        max_upload_bytes: int,
        decode_seconds: float,
        memory_bytes: int,
        max_waiting: int = 256,
        max_waiting_bytes: int = 1 << 30,
    ) -> None:
        self._max_samples = round(max_seconds * SAMPLE_RATE) + 1
        self._max_upload_bytes = max_upload_bytes
        self._decode_seconds = decode_seconds
        self._max_waiting, self._max_waiting_bytes = max_waiting, max(max_waiting_bytes, max_upload_bytes)
        self._arguments = [str(max_seconds), str(decode_seconds), str(memory_bytes)]
        self._idle: list[_Decoder | None] = [None] * workers  # None: a place whose process is not started
        self._line: deque[asyncio.Future[_Decoder | None]] = deque()
        self._busy: set[_Decoder] = set()
        self._waiting_bytes = 0
        self._chores: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Start the processes now rather than for the first uploads. Raises ServiceError 503 when they do not start."""
        places, self._idle = self._idle, []
        await asyncio.gather(*(self._fill(place) for place in places))
        if None in self._idle:
            raise _unavailable()

    async def close(self) -> None:
        """End all processes. Uploads that are being decoded are refused."""
        self._closed = True
        for decoder in [*self._idle, *self._busy]:
            if decoder:
                self._later(decoder.end())
        self._idle = []
        for waiting in self._line:
            if not waiting.done():
                waiting.set_result(None)
        while self._chores:
            await asyncio.gather(*self._chores, return_exceptions=True)

    async def decode(self, upload: Upload, deadline: float) -> Decoded:
        """The sound of an upload. `deadline` is on the clock of time.monotonic().

        Raises ServiceError: 400 audio_empty, audio_unreadable or audio_too_demanding, 413 upload_too_large or
        audio_too_long, 503 too_many_uploads, 504 deadline_passed.
        """
        if not upload.data:
            raise _empty(_("{path}: the file is empty (0 bytes).").format(path=upload.name))
        if len(upload.data) > self._max_upload_bytes:
            raise upload_too_large(upload.name, self._max_upload_bytes)
        if time.monotonic() >= deadline:
            raise deadline_passed()
        decoder = await self._place(len(upload.data), deadline)
        whole = False
        try:
            if decoder is None or not decoder.alive:
                decoder = await self._started()
            self._busy.add(decoder)
            allowed = min(self._decode_seconds, deadline - time.monotonic())
            try:
                samples, outcome, message = await asyncio.wait_for(decoder.decode(upload, self._max_samples), allowed)
            except TimeoutError:
                raise (_demanding(upload) if allowed == self._decode_seconds else deadline_passed()) from None
            except (OSError, EOFError, ValueError):
                await decoder.end()
                if self._closed:
                    raise draining() from None
                crashed = decoder.process.returncode in CRASHES
                raise (_unreadable(_damaged(upload)) if crashed else _demanding(upload)) from None
            whole = True
        finally:
            if decoder:
                self._busy.discard(decoder)
            self._give_back(decoder, whole)
        return self._answer(upload, samples, outcome, message)

    def _answer(self, upload: Upload, samples: np.ndarray, outcome: str, message: str) -> Decoded:
        match outcome:
            case "whole" | "cut":
                return Decoded(samples, message or None)
            case "long":
                raise ServiceError(
                    413, "audio_too_long", message, _("Cut the recording and send its parts."), param="file"
                )
            case "empty":
                raise _empty(message)
            case "demanding":
                raise _demanding(upload)
        raise _unreadable(message)

    async def _place(self, size: int, deadline: float) -> _Decoder | None:
        """A process nobody else uses, or None: the right to start one. First come, first served."""
        if self._closed:
            raise draining()
        if self._idle:
            return self._idle.pop()
        if len(self._line) >= self._max_waiting or self._waiting_bytes + size > self._max_waiting_bytes:
            raise ServiceError(
                503,
                "too_many_uploads",
                _("More recordings are waiting to be decoded than the service takes."),
                _("Send it again after the seconds that Retry-After gives."),
                retry_after=2,
            )
        waiting: asyncio.Future[_Decoder | None] = asyncio.get_running_loop().create_future()
        self._line.append(waiting)
        self._waiting_bytes += size
        try:
            # wait() and not wait_for(): a place that is handed over while the time runs out is not lost.
            await asyncio.wait([waiting], timeout=max(0.0, deadline - time.monotonic()))
            if not waiting.done():
                raise deadline_passed()
            if self._closed:
                raise draining()
            return waiting.result()
        except BaseException:
            if waiting.done() and not waiting.cancelled():
                self._hand_on(waiting.result())
            raise
        finally:
            self._waiting_bytes -= size
            with contextlib.suppress(ValueError):
                self._line.remove(waiting)

    def _give_back(self, decoder: _Decoder | None, whole: bool) -> None:
        if decoder and (not whole or self._closed or decoder.uploads >= UPLOADS_PER_PROCESS):
            self._later(decoder.end())
            self._later(self._fill(None))
        else:
            self._hand_on(decoder)

    def _hand_on(self, decoder: _Decoder | None) -> None:
        if self._closed:
            if decoder:
                self._later(decoder.end())
            return
        while self._line:
            waiting = self._line.popleft()
            if not waiting.done():
                waiting.set_result(decoder)
                return
        self._idle.append(decoder)

    async def _fill(self, place: _Decoder | None) -> None:
        """Start a process in an empty place, before somebody needs it. If that fails, who needs it is told."""
        if place is None and not self._closed:
            with contextlib.suppress(ServiceError):
                place = await self._started()
        self._hand_on(place)

    async def _started(self) -> _Decoder:
        try:
            return await asyncio.wait_for(_Decoder.start(self._arguments), START_SECONDS)
        except (TimeoutError, OSError, EOFError, ValueError):
            raise _unavailable() from None

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)


class _Decoder:
    """One process, and its two pipes."""

    def __init__(self, process: Process) -> None:
        assert process.stdin and process.stdout
        self.process, self._to, self._from = process, process.stdin, process.stdout
        self.uploads = 0

    @classmethod
    async def start(cls, arguments: list[str]) -> _Decoder:
        """Raises OSError or EOFError when it does not become ready; the reason is on stderr then."""
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(folder).resolve()) for folder in sys.path if folder)
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "resonance.serve.decoder_child",
            *arguments,
            stdin=PIPE,
            stdout=PIPE,
            env=environment,
            cwd=os.path.abspath(os.sep),  # noqa: PTH100 - the root, also on Windows
            limit=PIECE_BYTES,
            start_new_session=True,
        )
        decoder = cls(process)
        try:
            await decoder._frame()
        except BaseException:
            await asyncio.shield(decoder.end())
            raise
        return decoder

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def decode(self, upload: Upload, max_samples: int) -> tuple[np.ndarray, str, str]:
        """Samples float32 [samples], the outcome and what there is to say about it."""
        self.uploads += 1
        name = upload.name.encode(errors="replace")
        self._to.write(UPLOAD.pack(len(name), len(upload.data)) + name)
        for start in range(0, len(upload.data), WRITE_BYTES):
            self._to.write(upload.data[start : start + WRITE_BYTES])
            await self._to.drain()
        # The process has decoded strangers' data: what it sends is checked too.
        content = bytearray()
        while True:
            kind, piece = await self._frame()
            if kind == b"s" and len(content) + len(piece) <= 4 * max_samples:
                content += piece
            elif kind == b"e":
                end = json.loads(piece)
                return np.frombuffer(content, "<f4"), str(end["outcome"]), str(end["message"])
            else:
                raise ValueError

    async def _frame(self) -> tuple[bytes, bytes]:
        kind, size = FRAME.unpack(await self._from.readexactly(FRAME.size))
        if size > PIECE_BYTES:
            raise ValueError
        return kind, await self._from.readexactly(size)

    async def end(self) -> None:
        """Kill it and wait for its end, once it has been asked to do that or several times."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        with contextlib.suppress(OSError):
            await self.process.communicate()  # reads what is left: only then does asyncio let go of the pipe


def _empty(message: str) -> ServiceError:
    return ServiceError(400, "audio_empty", message, _("Record it again and send the file that results."), param="file")


def _unreadable(message: str) -> ServiceError:
    return ServiceError(
        400,
        "audio_unreadable",
        message,
        _("Send a sound or video file that a media player plays: WAV, FLAC, MP3, M4A, OGG, WebM, MP4."),
        param="file",
    )


def _damaged(upload: Upload) -> str:
    return _("{path}: the file is damaged. Copy or record it again.").format(path=upload.name)


def _demanding(upload: Upload) -> ServiceError:
    return ServiceError(
        400,
        "audio_too_demanding",
        _("{path}: decoding it takes more time or memory than a recording does.").format(path=upload.name),
        _("Save it as WAV with one channel and 16,000 samples per second, and send that."),
        param="file",
    )


def _unavailable() -> ServiceError:
    return ServiceError(
        503,
        "decoder_unavailable",
        _("The program that decodes recordings does not start."),
        _("The operator finds the reason in the output of the service."),
        retry_after=10,
    )
