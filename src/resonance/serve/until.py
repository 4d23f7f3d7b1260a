"""Waiting for something no longer than a request has time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from resonance.serve.decode_pool import deadline_passed
from resonance.serve.faults import ServiceError

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
            if not future.done():
                rest = max(0.0, self.deadline - time.monotonic())
                both: set[asyncio.Future[Any]] = {future, self.ended}
                await asyncio.wait(both, timeout=rest, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            raise self.refusal() if self.ended.done() else deadline_passed()
        finally:
            if not future.done():
                future.cancel()
