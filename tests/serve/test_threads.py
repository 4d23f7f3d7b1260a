"""Threads for what may hang: the system may refuse one for a moment, calls are given up, and the end comes at any time."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from resonance.serve.threads import BusyError, Daemons

WAIT = 30.0


@pytest.fixture
def never() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def refused(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_after_threads_that_could_not_be_started_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    few = Daemons(2, "resonance-test", 3)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        for _i in range(5):
            with pytest.raises(BusyError):
                few.submit(lambda: 1)
    assert [few.submit(lambda: 1).result(WAIT) for _i in range(5)] == [1] * 5
    few.close()


def test_what_gets_no_thread_of_its_own_waits_for_one_that_is_there(
    monkeypatch: pytest.MonkeyPatch, never: threading.Event
) -> None:
    few = Daemons(2, "resonance-test", 3)
    first = few.submit(lambda: never.wait(WAIT))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        second = few.submit(lambda: 2)
    assert not second.done()
    never.set()
    assert first.result(WAIT) and second.result(WAIT) == 2
    few.close()


def test_what_was_cancelled_holds_no_room_and_nothing_it_was_to_work_on(never: threading.Event) -> None:
    few = Daemons(1, "resonance-test", 2)
    few.submit(never.wait)
    samples = np.zeros(16_000, np.float32)
    gone = weakref.ref(samples)
    for _i in range(5):
        waiting = [few.submit(samples.sum) for _i in range(2)]
        assert all(one.cancel() for one in waiting)
    del samples, waiting
    assert gone() is None
    last = few.submit(lambda: 3)
    never.set()
    assert last.result(WAIT) == 3
    few.close()


@pytest.mark.parametrize("moment", range(1, 10))
def test_the_end_never_waits_for_a_call_that_a_thread_takes_first(moment: int) -> None:
    one = Daemons(1, "resonance-test")
    one.submit(int).result(WAIT)
    time.sleep(0.05)  # the thread waits for the next
    lines = 0

    def line(_frame: object, event: str, _given: object) -> Any:
        """Just before a line of `close` the thread comes to run, and takes the call."""
        nonlocal lines
        lines += event == "line"
        if lines == moment:
            time.sleep(0.05)
        return line

    def ends() -> None:
        one.submit(int)
        sys.settrace(lambda frame, *_given: line if frame.f_code is Daemons.close.__code__ else None)
        one.close()

    usual = sys.getswitchinterval()
    sys.setswitchinterval(5)  # before that, the thread does not
    try:
        ending = threading.Thread(target=ends, daemon=True)
        ending.start()
        ending.join(10)
    finally:
        sys.setswitchinterval(usual)
    assert not ending.is_alive()


def test_what_waits_at_the_end_is_cancelled_and_what_is_under_way_goes_on(never: threading.Event) -> None:
    few = Daemons(1, "resonance-test")
    begun = threading.Event()
    first = few.submit(lambda: (begun.set(), never.wait(WAIT)))
    second = few.submit(int)
    assert begun.wait(WAIT)
    few.close()
    assert second.cancelled() and not first.done()
    never.set()
    assert first.result(WAIT)
    with pytest.raises(RuntimeError):
        few.submit(int)
