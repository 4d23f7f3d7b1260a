"""What all routes begin with: who asks, for whom, until when, and whether he is still there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, TypeVar

from fastapi import Depends, Path, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from resonance.config_serve import ServeConfig
from resonance.messages import _
from resonance.serve import openapi
from resonance.serve.auth import Auth, Caller
from resonance.serve.faults import ServiceError
from resonance.serve.patients import check_patient_id
from resonance.serve.speech import Answer, SpeechRequest
from resonance.serve.uploads import Form, ReadingBudget, read_form

if TYPE_CHECKING:
    from resonance.serve.service import Service

Answered = TypeVar("Answered")
MEGABYTE = 1_000_000
# Documents the header; `Auth` reads it.
_bearer = HTTPBearer(auto_error=False, description="A token of `resonance token create`.")


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def config_of(request: Request) -> ServeConfig:
    config: ServeConfig = request.app.state.config
    return config


def caller_of(
    request: Request, _header: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None
) -> Caller:
    """Who asks. Raises ServiceError 401 or 429, before any of the body is read."""
    auth: Auth = request.app.state.auth
    caller = auth.caller(request.headers.get("authorization"), request.client.host if request.client else "")
    request.state.account = caller.account  # for the audit log
    return caller


def patient_of(request: Request, given: str) -> str:
    """A patient's id as it was sent, checked. Raises ServiceError 400 invalid_patient_id."""
    patient = check_patient_id(given)
    request.state.patient = patient  # for the audit log
    return patient


# Checked by `check_patient_id`, whose refusals have a code of their own.
PatientId = Annotated[str, Path(json_schema_extra=openapi.ID)]
Who = Annotated[Caller, Depends(caller_of)]


async def heard(request: Request, asked: SpeechRequest) -> Answer:
    """The transcript. Raises ServiceError."""
    answer = await unless_gone(request, service_of(request).transcribe(asked))
    request.state.audio_seconds = answer.result.duration
    return answer


def deadline(config: ServeConfig) -> float:
    """On the clock of time.monotonic()."""
    return time.monotonic() + config.deadline_seconds


async def form_of(request: Request, until: float) -> Form:
    """The form of a request, with a recording in it."""
    most = int(config_of(request).max_upload_mb * MEGABYTE)
    return await read_form(request, max_file_bytes=most, **limits_of(request, until))


class Limits(TypedDict):
    """Of reading a body."""

    deadline: float
    idle_seconds: float
    budget: ReadingBudget


def limits_of(request: Request, until: float) -> Limits:
    return {
        "deadline": until,
        "idle_seconds": config_of(request).idle_seconds,
        "budget": request.app.state.budget,
    }


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answered]) -> Answered:
    """What `work` gives. It is cancelled when the client goes away, so that nobody's audio waits for nothing.

    Call it when the body has been read: until then a message of the client may be a piece of the body.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        # Nobody reads this; 499 is what nginx counts it as.
        raise ServiceError(499, "client_gone", _("The client has gone."), "")
    finally:
        await _end(gone)
        await _end(task)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _end(task: Awaitable[Any]) -> None:
    if isinstance(task, asyncio.Future) and not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
