"""One thread that owns the model, and the windows of all people that wait for it."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch

from resonance.errors import DataError, ModelError
from resonance.messages import _
from resonance.model.lora_weights import LoadedAdapter
from resonance.model.memory_full import is_memory_full
from resonance.serve.fair_queue import FairQueue, Person, Room, Work
from resonance.serve.faults import (
    ServiceError,
    broken,
    deadline_passed,
    inference_failed,
    invalid_settings,
    not_ready,
    out_of_memory,
)
from resonance.serve.outer import where
from resonance.serve.pace import Pace
from resonance.transcribe.recognizer import DecodeSettings, Transcript

if TYPE_CHECKING:
    from resonance.transcribe.mixed_engine import Row

log = logging.getLogger(__name__)

# Of the longest batch, what the windows of one person may take: so long another's phrase waits for somebody's hour of audio.
ONE_PERSON = 1 / 3
RAISED = 1.02  # how much more may be tried after a batch as large as what fitted last
# Of the time that a batch took, so much the next one waits for those who have just been answered: otherwise people who ask
# again and again fall into groups that take turns: 16 of them made batches of 6 and 10, or 14 and 2, without end.
PAUSE = 0.1
# So many times what it should take, a batch takes when it is decoded again and again at higher temperatures, or with beams.
STUCK_TIMES = 10
EXAMINED_AGAIN = 10.0  # seconds after which a model that failed is asked whether it answers again


class Engine(Protocol):
    """What decodes: `transcribe.mixed_engine.MixedRecognizer`."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    def batch_positions(self, samples: int, adapter: LoadedAdapter | None) -> int: ...
    def best_clip_seconds(self, adapter: LoadedAdapter | None) -> float: ...
    def check(self, settings: DecodeSettings, adapter: LoadedAdapter | None) -> None: ...
    def tokens(self, text: str) -> list[int]: ...
    def transcribe(self, rows: Sequence[Row]) -> list[Transcript]: ...


class Observer(Protocol):
    """Who is told what happens, from the thread: `serve.metrics.Metrics`."""

    def batch(self, windows: int, audio_seconds: float, seconds: float) -> None: ...
    def dropped(self, why: Literal["cancelled", "deadline"]) -> None: ...
    def out_of_memory(self) -> None: ...
    def failed(self) -> None: ...


class Batcher:
    """Gathers windows into batches of one audio context and gives each its transcript.

    gather_seconds: how long a window that comes while the model is idle waits for others; longest_batch: seconds that a batch
    should take at most, so that nobody waits longer for the next one; patient_seconds: a batch that takes longer, and STUCK_TIMES what it should
    by the measured pace, is taken for one that will never end; stuck_seconds: so is one that takes that long, whatever the
    pace; probe: what is decoded to see whether the model works.
    """

    def __init__(
        self,
        engine: Engine,
        probe: Row,
        *,
        batch_size: int,
        gather_seconds: float,
        longest_batch: float,
        patient_seconds: float,
        stuck_seconds: float,
        observer: Observer,
    ) -> None:
        self._engine, self._probe, self._observer = engine, probe, observer
        self._batch_size, self._gather_seconds = batch_size, gather_seconds
        self._longest_batch, self._stuck_seconds = longest_batch, stuck_seconds
        self._patient_seconds = patient_seconds
        self.pace = Pace()
        self._queue = FairQueue()
        self._fitting: dict[int, float] = {}  # windows that fit into memory, by positions, where not all of a batch did
        self._checks: list[Future[None]] = []
        self._running: list[Work] = []
        self._began: float | None = None  # when the model was given what it computes now
        self._patience = stuck_seconds  # how long that may take
        self._worked: float | None = None  # when it last answered
        self._ended = self._took = 0.0  # when the last batch ended, and how long it took
        self._fault: str | None = None  # why it does not answer, where that may pass
        self._closed: Callable[[], ServiceError] | None = None  # what everybody gets from now on
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="resonance-inference", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, row: Row, person: Person, deadline: float) -> Future[Transcript]:
        """The window's transcript. Cancelled before its turn, or after `deadline` on the clock of time.monotonic(), it is
        never decoded. Fails with ServiceError."""
        work = Work(row, person, deadline, self._engine.batch_positions(len(row.audio), row.adapter))
        with self._changed:
            if self._closed:
                raise self._closed()
            self._queue.put(work)
            self._changed.notify()
        # Not the work itself, which has the future: such a circle keeps its audio until the next collection.
        work.future.add_done_callback(functools.partial(self._forget, weakref.ref(work)))
        return work.future

    def check(self, fresh_seconds: float = 0.0) -> Future[None]:
        """Done when the model has answered since, be it a tiny question. Fails with ServiceError where it cannot.

        An idle model that has answered in the last `fresh_seconds` is not asked again.
        """
        asked: Future[None] = Future()
        with self._changed:
            recently = self._worked is not None and time.monotonic() - self._worked < fresh_seconds
            if self._closed:
                asked.set_exception(self._closed())
            elif recently and self._began is None and not self._queue and not self._fault:
                asked.set_result(None)
            else:
                self._checks.append(asked)
                self._changed.notify()
        return asked

    @property
    def fault(self) -> str | None:
        """Why nothing can be decoded now; None: it can."""
        began = self._began
        if began is not None and time.monotonic() - began > self._patience:
            return _("A batch has been computing for {seconds:.0f} s: the model is stuck.").format(
                seconds=time.monotonic() - began
            )
        return self._closed().message if self._closed else self._fault

    def close(self, error: Callable[[], ServiceError]) -> None:
        """Nothing is decoded any more but what is under way. Everybody who waits gets `error`."""
        with self._changed:
            self._closed = self._closed or error
            waiting, checks = self._queue.clear(), self._checks
            self._checks = []
            self._changed.notify()
        _fail_all(waiting, error)
        for check in checks:
            _fail(check, error())

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended, after at most so many seconds."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _forget(self, asked: weakref.ref[Work], future: Future[Transcript]) -> None:
        work = asked()
        if work is None or not future.cancelled():
            return
        with self._changed:
            waited = self._queue.remove(work)
        if waited:
            self._observer.dropped("cancelled")

    def _work(self) -> None:
        try:
            while (batch := self._next()) is not None:
                if batch:
                    self._decode(batch)
                else:
                    self._examine()
                self._running = []
        except BaseException as error:  # whatever it is: nobody would ever be answered
            log.error("the inference thread has ended: %s at %s", type(error).__name__, where(error))
            what = type(error).__name__

            def dead() -> ServiceError:
                return broken(what)

            self._began = None
            self.close(dead)
            _fail_all(self._running, dead)

    def _next(self) -> list[Work] | None:
        """The next batch; empty: nothing but whether the model answers is asked; None: no more."""
        while True:
            with self._changed:
                while not self._closed:
                    if not self._queue:
                        if self._checks or not self._changed.wait(EXAMINED_AGAIN if self._fault else None):
                            return []
                        continue
                    rest = self._gathered_until() - time.monotonic()
                    if rest <= 0 or len(self._queue) >= self._batch_size:
                        break
                    self._changed.wait(rest)
                if self._closed:
                    return None
                taken = self._queue.take(self._room)
                # Before the futures are marked: whatever happens from here on, they are answered.
                self._running = taken
            batch = [work for work in taken if self._is_wanted(work)]
            if batch:
                return batch

    def _gathered_until(self) -> float:
        began = self._queue.waiting_since
        if began > self._ended:  # the model was idle
            return began + self._gather_seconds
        return self._ended + min(self._gather_seconds, PAUSE * self._took)

    def _room(self, positions: int) -> Room:
        rows = self._batch_size
        if positions in self._fitting:
            rows = min(rows, int(self._fitting[positions]))
        each = self.pace.window_seconds(positions)
        if not each:
            return Room(rows, rows)
        return Room(
            max(1, min(rows, int(self._longest_batch / each))),
            max(1, min(rows, int(ONE_PERSON * self._longest_batch / each))),
        )

    def _is_wanted(self, work: Work) -> bool:
        if not work.future.set_running_or_notify_cancel():
            self._observer.dropped("cancelled")
            return False
        if time.monotonic() > work.deadline:
            self._observer.dropped("deadline")
            _fail(work.future, deadline_passed())
            return False
        return True

    def _decode(self, batch: list[Work]) -> None:
        """Answer every one of a batch. Where it fails, halves are tried, until whatever is to blame is alone."""
        if self._fault:
            self._examine()
        parts = [batch]
        while parts:
            part = parts.pop()
            if self._fault:
                _fail_all(part, functools.partial(broken, self._fault))
                continue
            positions = part[0].positions
            came = self._compute([work.row for work in part], positions)
            if isinstance(came, Computed):
                seconds = sum(work.seconds for work in part)
                self._ended, self._took = time.monotonic(), came.seconds
                self.pace.took(came.seconds, positions, len(part), seconds)
                self._observer.batch(len(part), seconds, came.seconds)
                if positions in self._fitting and len(part) >= int(self._fitting[positions]):
                    self._fitting[positions] = min(self._fitting[positions] * RAISED, self._batch_size)
                for work, transcript in zip(part, came.transcripts, strict=True):
                    work.future.set_result(transcript)
                continue
            if came.memory:
                self._observer.out_of_memory()
                self._fitting[positions] = (len(part) + 1) // 2
            if len(part) > 1:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
            elif came.memory:
                _fail_all(part, out_of_memory)
            elif came.refused is not None:
                _fail_all(part, functools.partial(invalid_settings, came.refused))
            else:
                self._observer.failed()
                _fail_all(part, inference_failed)
                self._examine()

    def _examine(self) -> None:
        """Whether the model answers at all, for those who ask and for oneself."""
        came = self._compute([self._probe], self._engine.batch_positions(len(self._probe.audio), self._probe.adapter))
        if isinstance(came, Computed):
            return
        self._fault = None if came.memory else came.what
        with self._changed:
            checks, self._checks = self._checks, []
        for check in checks:
            _fail(check, not_ready(came.what))

    def _compute(self, rows: list[Row], positions: int) -> Computed | Failure:
        each = self.pace.window_seconds(positions)
        self._patience = self._stuck_seconds
        if each is not None:
            expected = max(self._patient_seconds, STUCK_TIMES * each * len(rows))
            self._patience = min(self._stuck_seconds, expected)
        began = self._began = time.monotonic()
        try:
            transcripts = self._engine.transcribe(rows)
            if len(transcripts) != len(rows):
                raise RuntimeError(f"{len(transcripts)} transcripts of {len(rows)} windows")
        except Exception as error:
            # Only words of it are kept: with its traceback it would hold all that was computed in memory.
            came = Failure(
                is_memory_full(error) or isinstance(error, MemoryError),
                _what(error),
                str(error) if isinstance(error, (DataError, ModelError)) else None,
            )
            if came.memory:
                log.warning("memory is full with %d windows of %d positions", len(rows), positions)
            else:
                # Never its message, which may be what somebody wants to say: a phrase that is too long.
                what, lines = type(error).__name__, where(error)
                log.error("%d windows of %d positions: %s at %s", len(rows), positions, what, lines)
        else:
            self._worked = time.monotonic()
            self._began = self._fault = None
            with self._changed:
                checks, self._checks = self._checks, []
            for check in checks:
                if check.set_running_or_notify_cancel():
                    check.set_result(None)
            return Computed(transcripts, self._worked - began)
        self._began = None
        if came.memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return came


class Computed(NamedTuple):
    transcripts: list[Transcript]
    seconds: float  # that it took


class Failure(NamedTuple):
    memory: bool  # there is too little of it
    what: str
    refused: str | None  # what is wrong with the settings, where they are to blame


def _what(error: BaseException) -> str:
    """An exception in a line, without what may be long in it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _fail_all(works: list[Work], error: Callable[[], ServiceError]) -> None:
    for work in works:  # each its own: an exception remembers everywhere it was raised
        _fail(work.future, error())


def _fail(future: Future[Any], error: ServiceError) -> None:
    # Done, or cancelled in this very moment: then nobody waits for it.
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
