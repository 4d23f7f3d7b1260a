"""Threads beside the one that owns the model: storage that hangs stops neither the others nor the end of the process."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Made = TypeVar("Made")

READERS = 32  # threads that wait for adapters to be read
LISTERS = 8  # and for what else is asked of where adapters lie: who has one, which versions there are
WAITING = 256  # calls that may wait for one of them; a place that hangs would collect any number
WRITERS = 4  # and for what is written there, or kept of recordings
CUTTERS = 2  # threads that compute a little: they cut recordings into windows


class BusyError(RuntimeError):
    """All threads have work, and more is waiting than may."""


class Threads:
    """Those that wait for something or compute a little."""

    def __init__(self) -> None:
        self._readers = Daemons(READERS, "resonance-read", WAITING)
        self._listers = Daemons(LISTERS, "resonance-list", WAITING)
        self._writers = Daemons(WRITERS, "resonance-write")
        self._cutters = ThreadPoolExecutor(CUTTERS, "resonance-cut")

    def read(self, function: Callable[[], Made]) -> Future[Made]:
        """An adapter from storage. Raises BusyError."""
        return self._readers.submit(function)

    def list(self, function: Callable[[], Made]) -> Future[Made]:
        """What storage knows of adapters. Raises BusyError."""
        return self._listers.submit(function)

    def write(self, function: Callable[[], Made]) -> Future[Made]:
        """To storage."""
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
    alive. most_waiting: calls that may wait for a thread."""

    def __init__(self, most: int, name: str, most_waiting: float = math.inf) -> None:
        self._most, self._name, self._most_waiting = most, name, most_waiting
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._free = 0  # threads that have no work; below 0: work that has no thread
        self._closed = False

    def submit(self, function: Callable[[], Made]) -> Future[Made]:
        """Raises BusyError where too much is waiting, RuntimeError where it is closed."""
        future: Future[Made] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name} is closed")
            if -self._free >= self._most_waiting:
                raise BusyError(self._name)
            if self._free <= 0 and self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
            else:
                self._free -= 1
            self._waiting.put((future, function))
        return future

    def close(self) -> None:
        with self._lock:
            self._closed = True
            while not self._waiting.empty():
                if (waiting := self._waiting.get()) is not None:
                    waiting[0].cancel()
            for _thread in range(self._threads):
                self._waiting.put(None)

    def _work(self) -> None:
        while (given := self._waiting.get()) is not None:
            future, function = given
            if future.set_running_or_notify_cancel():
                try:
                    made = function()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(made)
                    del made
            del given, future, function
            with self._lock:
                self._free += 1
