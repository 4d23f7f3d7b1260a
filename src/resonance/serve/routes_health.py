"""Whether the service lives, whether it can answer, and its counts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from resonance.serve import shapes
from resonance.serve.asking import Who, service_of
from resonance.serve.shapes import Status, refusals

router = APIRouter(tags=["health"])
OK: dict[str, Any] = {"status": "ok"}


@router.get(
    "/health",
    summary="Whether the service lives",
    response_model=Status,
    responses=shapes.answered("The model answers.") | refusals(500, 503),
)
async def health(request: Request) -> dict[str, Any]:
    """Answers at once, also under load: 200 while the model answers, 503 with the reason while it is being loaded, does not
    come back from a batch, is broken or is about to stop."""
    refuse_unless_ready(request)
    return OK


@router.get(
    "/ready",
    summary="Whether the model can answer now",
    response_model=Status,
    responses=shapes.answered("The model has just answered.") | refusals(500, 503),
)
async def ready(request: Request) -> dict[str, Any]:
    """Decodes a moment of silence on the way that all requests go, within `ready_seconds`."""
    refuse_unless_ready(request)
    await service_of(request).check()
    return OK


@router.get(
    "/metrics",
    summary="Counts for Prometheus",
    response_class=Response,
    responses=shapes.answered("Prometheus's text format.", content={"text/plain": {"schema": {"type": "string"}}})
    | refusals(401, 403, 429, 500),
)
async def metrics(request: Request, caller: Who) -> Response:
    caller.allow_manage()
    content, media_type = service_of(request).metrics.exposition()
    return Response(content, media_type=media_type)


def refuse_unless_ready(request: Request) -> None:
    """Raises ServiceError 503 with what keeps the model from answering."""
    if (state := service_of(request).state).status != "ready":
        raise state.refusal
