"""The front of several copies of the model: it has what `Service` has, and lets a copy answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

from resonance.config_serve import ServeConfig
from resonance.messages import _
from resonance.model.load import load_tokenizer
from resonance.serve.faults import RETRY_SECONDS, ServiceError
from resonance.serve.front_metrics import FrontMetrics
from resonance.serve.replica import About, Mistake, Refusal, mark, packed
from resonance.serve.speech import Answer, SpeechRequest
from resonance.serve.state import State
from resonance.serve.store import AdapterStore, VersionInfo
from resonance.serve.threads import Threads
from resonance.serve.until import stored
from resonance.transcribe.recognizer import TimedText

log = logging.getLogger(__name__)
Made = TypeVar("Made")
ASK_SECONDS = 5.0  # between two questions to the copies, whether they are there
CHANGE_SECONDS = 120.0  # for an adapter to be checked and stored
GRACE_SECONDS = 5.0  # after a deadline, for the copy to say so itself
ATTEMPTS = (
    2  # copies that are asked, where one dies over the request: a recording that kills them must not have them all
)


class RemoteService:
    """As `Service`, for the routes. Belongs to one event loop.

    copies: Ray's handle on the deployment of `Replica`; store: the adapters that the copies read; key: that of `mark`.
    """

    def __init__(self, config: ServeConfig, copies: Any, store: AdapterStore | None, key: bytes) -> None:
        self.config, self.store, self.metrics = config, store, FrontMetrics()
        self.base_name, self.base_fingerprint = config.model, ""
        self._copies, self._key = copies, key
        self._threads = Threads()
        self._tokenizer: Any = None
        self._asking: asyncio.Task[None] | None = None
        self._loaded = False
        self._silent = False
        self._draining = False

    @property
    def state(self) -> State:
        if self._draining:
            return State("draining")
        if not self._loaded:
            return State("loading")
        if self._silent:
            return State("broken", _("No copy of the model answers."))
        return State("ready")

    async def start(self) -> None:
        tokenizer, _multilingual = await asyncio.to_thread(load_tokenizer, self.config.model)
        self._tokenizer = tokenizer
        self._asking = asyncio.create_task(self._ask_again())

    async def drain(self, seconds: float) -> None:
        """No more is taken. Ray waits for what is under way."""
        self._draining = True
        if self._asking:
            self._asking.cancel()
        self._threads.close()

    async def _ask_again(self) -> None:
        while True:
            try:
                told = [one for one in await self._all("about", self.config.ready_seconds) if isinstance(one, About)]
            except Exception as error:  # of Ray's
                if self._loaded:  # before, they are not there yet
                    log.warning("asking the copies of the model: %s", type(error).__name__)
                told = []
            self._silent = not told
            if told:
                self._loaded = True
                self.base_name, self.base_fingerprint = told[0].base_name, told[0].base_fingerprint
                self.metrics.copies = {one.copy: one.figures for one in told}
            await asyncio.sleep(ASK_SECONDS)

    async def _all(self, name: str, seconds: float, *given: Any) -> list[Any]:
        """What each copy says, or the exception in its place. Does not wait behind recordings."""
        response = self._copies.broadcast(name, *given)
        found: list[Any] = await response.results_async(timeout_s=seconds, return_exceptions=True)
        return found

    async def transcribe(self, request: SpeechRequest) -> Answer:
        """Raises ServiceError."""
        self._refuse_unless_ready()
        answer: Answer = await self._call(
            "transcribe", request.patient, request.deadline, lambda: (request, _left(request.deadline))
        )
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
                if begun or attempt + 1 == ATTEMPTS or not _ended(error):  # what was sent cannot be taken back
                    raise _lost_copy() from error
            except _full() as error:
                raise _too_much() from error
            finally:
                pieces.cancel()

    async def check(self) -> None:
        """Raises ServiceError where no copy answers a tiny question in time."""
        self._refuse_unless_ready()
        told = await self._all("check", self.config.ready_seconds + GRACE_SECONDS)
        if None not in told:
            raise next((one.error() for one in told if isinstance(one, Refusal)), _lost_copy())

    async def put_adapter(self, patient: str, folder: Path) -> VersionInfo:
        """Checked by a copy, which puts it into the store. All copies answer with it from now on."""
        data = await asyncio.to_thread(packed, folder)
        stored: VersionInfo = await self._change("put_adapter", patient, data)
        return stored

    async def roll_back(self, patient: str, version: str | None = None) -> VersionInfo:
        """Let an earlier version answer; without `version`, the one before."""
        found: VersionInfo = await self._change("roll_back", patient, version)
        return found

    async def delete_adapter(self, patient: str) -> None:
        """Delete all versions."""
        await self._change("delete_adapter", patient)

    def tokens(self, text: str) -> list[int]:
        """The model's tokens of a text, as OpenAI's segments list them."""
        assert self._tokenizer is not None  # `start` has read it
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    async def read(self, function: Callable[[], Made]) -> Made:
        """As `Service.read`."""
        return await stored(self._threads, function, self.config.store_seconds)

    async def _change(self, name: str, patient: str, *given: Any) -> Any:
        self._refuse_unless_ready()
        # Once: back twice would be too far.
        until = time.monotonic() + CHANGE_SECONDS
        found = await self._call(name, patient, until, lambda: (patient, *given), attempts=1)
        with contextlib.suppress(Exception):  # a copy that does not hear of it looks by itself
            await self._all("changed", ASK_SECONDS, patient)
        return found

    async def _call(
        self,
        name: str,
        patient: str | None,
        until: float,
        given: Callable[[], tuple[Any, ...]],
        attempts: int = ATTEMPTS,
    ) -> Any:
        """The answer of a copy, preferably of one that has the patient's adapter. Another is asked where one dies over it,
        and only then: one that is slow, or out of reach, may be at work on it.

        given: makes what the copy is given, at the time that it is asked.
        """
        for attempt in range(attempts):
            response = self._method(name, patient).remote(*given())
            try:
                answer = await asyncio.wait_for(_answer(response), _left(until) + GRACE_SECONDS)
            except _lost() as error:
                if attempt + 1 == attempts or not _ended(error):
                    raise _lost_copy() from error
            except _full() as error:
                raise _too_much() from error
            except TimeoutError:
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
        model = "" if patient is None else mark(patient, self._key)
        return self._copies.options(method_name=name, multiplexed_model_id=model, stream=stream)

    def _refuse_unless_ready(self) -> None:
        if (state := self.state).status != "ready":
            raise state.refusal


async def _answer(response: Any) -> Any:
    return await response


def _left(until: float) -> float:
    return max(0.0, until - time.monotonic())


def _lost() -> tuple[type[Exception], ...]:
    """What Ray says when a copy has died, or there is none."""
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

    return RayActorError, DeploymentUnavailableError, ReplicaUnavailableError


def _ended(error: Exception) -> bool:
    """Whether nothing is at work on the request any more: its copy has died, or never had it."""
    from ray.exceptions import ActorUnavailableError

    return not isinstance(error, ActorUnavailableError)


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
        429,
        "too_busy",
        _("More recordings are waiting than the service takes."),
        _("Ask again in a moment."),
        retry_after=RETRY_SECONDS,
    )
