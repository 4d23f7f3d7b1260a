"""The front of several copies of the model: it has what `Service` has, and lets a copy answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from resonance.config_serve import ServeConfig
from resonance.messages import _
from resonance.serve.faults import ServiceError
from resonance.serve.metrics import Metrics
from resonance.serve.replica import About, Mistake, Refusal, packed
from resonance.serve.service import State
from resonance.serve.speech import Answer, SpeechRequest
from resonance.serve.store import AdapterStore, VersionInfo
from resonance.transcribe.recognizer import TimedText

ASK_SECONDS = 2.0  # between two questions to the copies, whether they are there
RETRY_SECONDS = 5
PUT_SECONDS = 120.0
GRACE_SECONDS = 5.0  # after a deadline, for the copy to say so itself
ATTEMPTS = 3  # copies that are asked, where one dies over the request


class RemoteService:
    """As `Service`, for the routes. Belongs to one event loop.

    copies: Ray's handle on the deployment of `Replica`; store: the adapters that the copies read.
    """

    def __init__(self, config: ServeConfig, copies: Any, store: AdapterStore | None) -> None:
        self.config, self.store, self.metrics = config, store, Metrics()
        self.base_name, self.base_fingerprint = config.model, ""
        self._copies = copies
        self._asking: asyncio.Task[None] | None = None
        self._about: About | None = None
        self._silent = False
        self._draining = False

    @property
    def state(self) -> State:
        if self._draining:
            return State("draining", _("The service is about to stop."))
        if self._about is None:
            return State("loading", _("The model is being loaded."))
        if self._silent:
            return State("broken", _("No copy of the model answers."))
        return State("ready", "")

    async def start(self) -> None:
        self._asking = asyncio.create_task(self._ask_again())

    async def drain(self, seconds: float) -> None:
        """No more is taken. Ray waits for what is under way."""
        self._draining = True
        if self._asking:
            self._asking.cancel()

    async def _ask_again(self) -> None:
        while True:
            try:
                found = await self._call("about", None, time.monotonic() + self.config.ready_seconds)
                self._about, self._silent = found, False
                self.base_name, self.base_fingerprint = found.base_name, found.base_fingerprint
            except ServiceError:
                self._silent = True
            await asyncio.sleep(ASK_SECONDS)

    async def transcribe(self, request: SpeechRequest) -> Answer:
        """Raises ServiceError."""
        self._refuse_unless_ready()
        answer: Answer = await self._call("transcribe", request.patient, request.deadline, request)
        return answer

    async def stream(self, request: SpeechRequest) -> AsyncIterator[TimedText | Answer]:
        """Pieces as they are understood, the Answer last. Raises ServiceError."""
        self._refuse_unless_ready()
        for attempt in range(ATTEMPTS):
            pieces = self._method("stream", request.patient, stream=True).remote(request, _left(request.deadline))
            begun = False
            try:
                async for piece in pieces:
                    begun = True
                    if isinstance(piece, Refusal | Mistake):
                        raise piece.error()
                    yield piece
                return
            except _lost() as error:
                if begun or attempt + 1 == ATTEMPTS:  # what was sent cannot be taken back
                    raise _lost_copy() from error
            except _full() as error:
                raise _too_much() from error
            finally:
                pieces.cancel()

    async def check(self) -> None:
        """Raises ServiceError where no copy answers a tiny question in time."""
        self._refuse_unless_ready()
        await self._call("check", None, time.monotonic() + self.config.ready_seconds, with_time=False)

    async def put_adapter(self, patient: str, folder: Path) -> VersionInfo:
        """Checked by a copy, which puts it into the store. The other copies see it within `refresh_seconds`."""
        self._refuse_unless_ready()
        data = await asyncio.to_thread(packed, folder)
        until = time.monotonic() + PUT_SECONDS
        stored: VersionInfo = await self._call("put_adapter", patient, until, patient, data, with_time=False)
        return stored

    async def _call(self, name: str, patient: str | None, until: float, *given: Any, with_time: bool = True) -> Any:
        """The answer of a copy, preferably of one that has the patient's adapter. Another is asked where one dies over it."""
        for attempt in range(ATTEMPTS):
            left = _left(until)
            timed = (left,) if with_time and given else ()
            response = self._method(name, patient).remote(*given, *timed)
            try:
                answer = await asyncio.wait_for(_await(response), left + GRACE_SECONDS)
            except _lost() as error:
                if attempt + 1 == ATTEMPTS:
                    raise _lost_copy() from error
            except _full() as error:
                raise _too_much() from error
            except asyncio.TimeoutError:
                response.cancel()
                raise ServiceError(
                    504,
                    "deadline_passed",
                    _("The request took longer than the service allows."),
                    _("Ask again, with a shorter recording if need be."),
                ) from None
            except asyncio.CancelledError:
                response.cancel()
                raise
            else:
                if isinstance(answer, Refusal | Mistake):
                    raise answer.error()
                return answer
        raise AssertionError("unreachable")

    def _method(self, name: str, patient: str | None, *, stream: bool = False) -> Any:
        return self._copies.options(method_name=name, multiplexed_model_id=patient or "", stream=stream)

    def _refuse_unless_ready(self) -> None:
        state = self.state
        if state.status != "ready":
            raise ServiceError(
                503, state.status, state.reason, _("Ask again in a moment."), retry_after=RETRY_SECONDS
            )


async def _await(response: Any) -> Any:
    return await response


def _left(until: float) -> float:
    return max(0.0, until - time.monotonic())


def _lost() -> tuple[type[Exception], ...]:
    """What Ray says when a copy has died, or there is none."""
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

    return RayActorError, DeploymentUnavailableError, ReplicaUnavailableError


def _full() -> type[Exception]:
    from ray.serve.exceptions import BackPressureError

    found: type[Exception] = BackPressureError
    return found


def _lost_copy() -> ServiceError:
    return ServiceError(
        503,
        "copy_lost",
        _("The copy of the model that had the request has ended."),
        _("Ask again: another takes its place."),
        retry_after=RETRY_SECONDS,
    )


def _too_much() -> ServiceError:
    return ServiceError(
        429, "too_busy", _("More recordings are waiting than the service takes."), _("Ask again in a moment."), retry_after=RETRY_SECONDS
    )
