"""A process that decodes what strangers sent, one upload after the other, inside limits that the kernel enforces.

It is started by `decode_pool` and talks through its standard input and output. An upload comes as `UPLOAD`, its name and
its bytes. Back go frames, each a `FRAME` and its content: samples (`s`, float32 at 16 kHz, at most `PIECE_BYTES`) as they
are decoded, then the outcome (`e`, JSON). The first frame (`r`) says that the process is ready. It loads no torch:
it takes 52 MB and starts in 0.15 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import BinaryIO

import av  # noqa: F401 - here, not when the first upload needs it: afterwards memory is limited

from resonance.data.audio import iter_blocks
from resonance.errors import AudioError, NoSoundError, TooLongError
from resonance.messages import _

UPLOAD = struct.Struct("!IQ")  # bytes of the name, bytes of the file
FRAME = struct.Struct("!cI")  # kind, bytes
PIECE_BYTES = 1 << 20
GRACE_SECONDS = 5  # after the parent should have ended this process: the parent is gone


def main(max_seconds: float, decode_seconds: float, memory_bytes: int) -> None:
    """Decode until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group, while the parent finishes its requests
        signal.signal(number, signal.SIG_IGN)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _confine(memory_bytes)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # libraries print about damaged files
        os.dup2(nowhere, descriptor)
    _send(answers, b"r", b"")
    while len(head := requests.read(UPLOAD.size)) == UPLOAD.size:
        name_bytes, data_bytes = UPLOAD.unpack(head)
        name, data = requests.read(name_bytes).decode(), requests.read(data_bytes)
        _limit_time(decode_seconds)
        outcome, message = _decode(name, data, max_seconds, answers)
        _wait_without_limit()
        _send(answers, b"e", json.dumps({"outcome": outcome, "message": message}).encode())


def _decode(name: str, data: bytes, max_seconds: float, answers: BinaryIO) -> tuple[str, str]:
    """The outcome, in one word, and what there is to say about it."""
    produced = 0
    try:
        for block in iter_blocks(name, max_seconds=max_seconds, data=data):
            content = block.astype("<f4", copy=False).tobytes()
            for start in range(0, len(content), PIECE_BYTES):
                _send(answers, b"s", content[start : start + PIECE_BYTES])
            produced += len(block)
    except TooLongError as error:
        return "long", str(error)
    except NoSoundError as error:
        return "empty", str(error)
    except AudioError as error:
        return ("cut" if produced else "unreadable"), str(error)
    except MemoryError:
        return "demanding", ""
    except BrokenPipeError:  # the parent has gone
        raise
    except Exception:  # of a decoder's binding, on data made to break it
        text = _("{path}: the file is damaged. Copy or record it again.").format(path=name)
        return ("cut" if produced else "unreadable"), text
    if not produced:  # shorter than a sample at 16 kHz
        return "empty", _("{path}: holds no sound (0 seconds). Record it again.").format(path=name)
    return "whole", ""


def _send(answers: BinaryIO, kind: bytes, content: bytes) -> None:
    answers.write(FRAME.pack(kind, len(content)))
    answers.write(content)
    answers.flush()


def _confine(memory_bytes: int) -> None:
    """Memory beyond what is in use now, files, core dumps: limited for good."""
    status = Path("/proc/self/statm")
    if status.exists():  # Linux; macOS does not heed the limit
        used = int(status.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _limit("RLIMIT_AS", used + memory_bytes, for_good=True)
        # When the machine's memory ends, this process ends and not the one that holds the model.
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    _limit("RLIMIT_FSIZE", 0, for_good=True)
    _limit("RLIMIT_CORE", 0, for_good=True)


def _limit_time(seconds: float) -> None:
    """Processor time for the next upload; and the clock's, after which nobody can be waiting for it."""
    _limit("RLIMIT_CPU", int(time.process_time() + seconds) + 1)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)


def _limit(kind: str, value: int, *, for_good: bool = False) -> None:
    """At most what the system allows already. Windows has no such limits: time and samples are limited all the same."""
    try:
        import resource
    except ImportError:
        return
    number = getattr(resource, kind)
    hard = resource.getrlimit(number)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(number, (value, value if for_good else hard))


def _wait_without_limit() -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
