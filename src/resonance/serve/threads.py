"""Threads beside the one that owns the model: storage that hangs stops neither the others nor the end of the process."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Made = TypeVar("Made")
_log = logging.getLogger(__name__)

READERS = 32  # threads that wait for adapters to be read
LISTERS = 8  # and for what else is asked of where adapters lie: who has one, which versions there are
WAITING = 256  # calls that may wait for one of them; a place that hangs would collect any number
WRITERS = 4  # and for what is written there
CUTTERS = 2  # threads that compute a little: they cut recordings into windows


class BusyError(RuntimeError):
    """All threads have work, and more is waiting than may; or there is none, and the system gives none."""


class Threads:
    """Those that wait for something or compute a little."""

    def __init__(self) -> None:
        self._readers = Daemons(READERS, "resonance-read", WAITING)
        self._listers = Daemons(LISTERS, "resonance-list", WAITING)
        self._writers = Daemons(WRITERS, "resonance-write", WAITING)
        self._cutters = ThreadPoolExecutor(CUTTERS, "resonance-cut")

    def read(self, function: Callable[[], Made]) -> Future[Made]:
        """An adapter from storage. Raises BusyError."""
        return self._readers.submit(function)

    def list(self, function: Callable[[], Made]) -> Future[Made]:
        """What storage knows of adapters. Raises BusyError."""
        return self._listers.submit(function)

    def write(self, function: Callable[[], Made]) -> Future[Made]:
        """To storage. Raises BusyError."""
        return self._writers.submit(function)

    def cut(self, function: Callable[[], Made]) -> Future[Made]:
        """What ends by itself, soon."""
        return self._cutters.submit(function)

    def close(self) -> None:
        """What waits for a thread is cancelled, what is under way goes on."""
        self._readers.close()
        self._listers.close()
        self._writers.close()
        self._cutters.shutdown(wait=False, cancel_futures=True)


class Daemons:
    """As many threads as there is work, up to `most`. Unlike those of a ThreadPoolExecutor they do not keep the process
    alive. most_waiting: calls that may wait for a thread; one that is cancelled waits no more."""

    def __init__(self, most: int, name: str, most_waiting: float = math.inf) -> None:
        self._most, self._name, self._most_waiting = most, name, most_waiting
        self._waiting: dict[Future[Any], Callable[[], Any]] = {}  # in the order in which they came
        self._changed = threading.Condition()
        self._threads = 0
        self._free = 0  # threads that have no work, or have not yet taken what they were started for
        self._closed = False

    def submit(self, function: Callable[[], Made]) -> Future[Made]:
        """Raises BusyError where too much is waiting or no thread can be started, RuntimeError where it is closed."""
        future: Future[Made] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError(f"{self._name} is closed")
            if len(self._waiting) - self._free >= self._most_waiting:
                raise BusyError(self._name)
            if self._free <= len(self._waiting) and self._threads < self._most:
                self._start()
            self._waiting[future] = function
            self._changed.notify()
        future.add_done_callback(self._forget)
        return future

    def close(self) -> None:
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for future in waiting:
            future.cancel()

    def _start(self) -> None:
        """One more thread. Raises BusyError where the system gives none, and there is no other."""
        thread = threading.Thread(target=self._work, name=f"{self._name}-{self._threads + 1}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # as many processes as this user may have; that may pass
            _log.error("%s: %s", thread.name, error)
            if not self._threads:
                raise BusyError(self._name) from None
        else:
            self._threads += 1
            self._free += 1

    def _forget(self, future: Future[Any]) -> None:
        """What was cancelled holds neither room nor what it was to work on."""
        with self._changed:
            self._waiting.pop(future, None)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                future = next(iter(self._waiting))
                function = self._waiting.pop(future)
                self._free -= 1
            if future.set_running_or_notify_cancel():
                try:
                    made = function()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(made)
                    del made
            del future, function
            with self._changed:
                self._free += 1
