"""How far a transcription is, how fast and how long it will take: one line on a terminal, one every so often in a log."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from resonance.data.audio import probe
from resonance.errors import AudioError
from resonance.messages import _
from resonance.transcribe.rows import encodable
from resonance.transcribe.subtitles import columns

LOG_SECONDS = 30.0  # between two lines of a log
TERMINAL_SECONDS = 0.2
PROBED = 20  # up to so many recordings their lengths are looked up, so that one of ten hours has a time left too


class TranscribingProgress:
    """Shows `files` of all and the real-time factor (seconds of audio for a second of work) on stderr.

    Nothing is shown by a run that is over before LOG_SECONDS, unless on a terminal.
    """

    def __init__(
        self,
        recordings: Sequence[Path],
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._recordings = recordings
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._shown = shown
        self._clock = clock
        self._begun = self._next = clock()
        if not self._terminal:
            self._next += LOG_SECONDS
        self._files = 0
        self._seconds = 0.0
        self._length: float | None = None  # seconds of all recordings, 0 where it is not known
        self._on_screen = 0

    def advance(self, files: int, seconds: float) -> None:
        """So many more recordings are finished, and so many seconds of audio decoded."""
        self._files += files
        self._seconds += seconds
        now = self._clock()
        if self._shown and now >= self._next:
            self._next = now + (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)
            self._show(self._line(now - self._begun))

    def clear(self) -> None:
        """Take the line away before something else is written to the terminal."""
        if self._on_screen:
            self._stream.write("\r" + " " * self._on_screen + "\r")
            self._stream.flush()
            self._on_screen = 0

    def say(self, text: str) -> None:
        self.clear()
        print(encodable(text, self._stream), file=self._stream, flush=True)

    def _show(self, line: str) -> None:
        line = encodable(line, self._stream)
        if not self._terminal:
            print(line, file=self._stream, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        while columns(line) > width:
            line = line[:-1]
        self.clear()
        self._stream.write(line)
        self._stream.flush()
        self._on_screen = columns(line)

    def _line(self, elapsed: float) -> str:
        speed = self._seconds / elapsed if elapsed > 0 else 0.0
        line = _("{files} of {total} recordings, {length} of audio; {speed:.1f} s of audio in 1 s").format(
            files=self._files, total=len(self._recordings), length=_clock_time(self._seconds), speed=speed
        )
        left = self._left(elapsed, speed)
        return line if left is None else line + _("; {time} left").format(time=_clock_time(left))

    def _left(self, elapsed: float, speed: float) -> float | None:
        """Seconds; None before there is anything to judge by."""
        if self._length is None:
            self._length = _length(self._recordings) if len(self._recordings) <= PROBED else 0.0
        if self._length and speed:
            return max(self._length - self._seconds, 0.0) / speed
        if self._files:
            return elapsed / self._files * (len(self._recordings) - self._files)
        return None


def _length(recordings: Sequence[Path]) -> float:
    total = 0.0
    for path in recordings:
        try:
            total += probe(path).duration
        except AudioError:  # becomes the recording's result
            continue
    return total


def _clock_time(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
