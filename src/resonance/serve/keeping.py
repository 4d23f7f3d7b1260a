"""Recordings on their way to the folder where they are kept. A disk that hangs holds up no transcript."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from resonance.serve.faults import ServiceError
from resonance.serve.keep_audio import KeptAudio
from resonance.serve.speech import Answer
from resonance.serve.threads import Daemons
from resonance.serve.until import Until

KEEPERS = 4  # threads that write recordings, and nothing else
WAITING = 64  # recordings that may wait for one of them; each belongs to a request that is waiting, too
KEEP_SECONDS = 5.0  # that a transcript waits until its recording is kept
log = logging.getLogger("resonance.serve")


class Keeping:
    """Belongs to one event loop. not_kept: called for each recording that is not kept, or not in time."""

    def __init__(self, kept: KeptAudio, not_kept: Callable[[], None]) -> None:
        self._kept, self._not_kept = kept, not_kept
        self._threads = Daemons(KEEPERS, "resonance-keep", WAITING)
        self._writing: dict[object, float] = {}  # since when, on the clock of time.monotonic()

    def start(self) -> None:
        self._kept.start()

    def close(self) -> None:
        """What waits for a thread is not kept; what is under way is not waited for."""
        self._threads.close()
        self._kept.close()

    async def keep(self, samples: np.ndarray, answer: Answer, account: str, patient: str | None, until: Until) -> None:
        """Write a recording, float32 [samples] at 16 kHz, and its transcript. Waits for that no longer than the request has
        time, at most `KEEP_SECONDS`. By then, what has not been begun never is, and what has been goes on by itself, whole."""
        if self._hangs():  # else each would wait for it
            self._say("the disk hangs")
            return
        keep = functools.partial(self._kept.keep, samples, answer, account=account, patient=patient)
        try:
            future = asyncio.wrap_future(self._threads.submit(functools.partial(self._write, keep)))
        except RuntimeError as error:
            self._say(f"no thread ({error})")
            return
        try:
            in_time = await until.done(future, KEEP_SECONDS)
        except ServiceError:  # the request has no more time, or the service ends: the transcript is there all the same
            in_time = False
        finally:
            future.cancel()
        if not in_time:
            self._say("the disk takes too long")
        elif future.result() is None:  # the reason is in the log
            self._not_kept()

    def _write(self, keep: Callable[[], Path | None]) -> Path | None:
        self._writing[keep] = time.monotonic()
        try:
            return keep()
        finally:
            del self._writing[keep]

    def _hangs(self) -> bool:
        """Whether each thread has been writing for longer than anybody waits."""
        since = list(self._writing.values())
        return len(since) >= KEEPERS and time.monotonic() - max(since) > KEEP_SECONDS

    def _say(self, reason: str) -> None:
        log.error("a recording could not be kept: %s", reason)
        self._not_kept()
