"""Waiting for something no longer than a request has time."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from resonance.serve.faults import ServiceError, deadline_passed, store_unreachable
from resonance.serve.threads import BusyError, Threads

Got = TypeVar("Got")


@dataclass(frozen=True, slots=True)
class Until:
    """The end of a request's patience: its deadline, or that of the whole service."""

    deadline: float  # on the clock of time.monotonic()
    ended: asyncio.Future[None]  # done when the service answers nobody any more
    refusal: Callable[[], ServiceError]  # what everybody gets then

    async def get(self, awaitable: Awaitable[Got]) -> Got:
        """What it gives. Cancelled where it takes too long: then ServiceError 504 or `refusal` is raised."""
        future: asyncio.Future[Got] = asyncio.ensure_future(awaitable)
        try:
            await self.done(future)
            return future.result()
        finally:
            if not future.done():
                future.cancel()

    async def done(self, future: asyncio.Future[Any], seconds: float = math.inf) -> bool:
        """Whether it is, after at most so many seconds. Raises as `get`, without cancelling it."""
        if not future.done():
            rest = max(0.0, self.deadline - time.monotonic())
            both = {future, self.ended}
            await asyncio.wait(both, timeout=min(rest, seconds), return_when=asyncio.FIRST_COMPLETED)
            if not future.done() and (self.ended.done() or seconds >= rest):
                raise self.refusal() if self.ended.done() else deadline_passed()
        return future.done()


async def stored(threads: Threads, function: Callable[[], Got], seconds: float) -> Got:
    """What `function` finds where the adapters are. Raises ServiceError 503 where that takes too long, or is asked too often."""
    try:
        coming = threads.list(function)
    except BusyError:
        raise store_unreachable() from None
    return await in_time(coming, seconds, store_unreachable)


async def in_time(coming: Future[Got], seconds: float, late: Callable[[], ServiceError]) -> Got:
    """What a thread gives. After so many seconds, `late` is raised, and what has not begun never does."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(coming), seconds)
    except TimeoutError:
        raise late() from None
