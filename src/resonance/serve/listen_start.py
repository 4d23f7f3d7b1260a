"""The first message of /listen: who speaks, and how it is to be heard."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resonance.messages import _
from resonance.serve import fields
from resonance.serve.faults import ServiceError
from resonance.units import SAMPLE_RATE


class Start(BaseModel):
    """The first message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: str = Field(pattern="^start$")
    token: str | None = Field(None, max_length=500)
    patient_id: str | None = None
    fallback: str | None = None
    language: str | None = None
    task: str | None = None
    prompt: str | None = None
    phrases: list[str] = []
    phrases_only: bool = False
    skip_nonspeech: bool = True
    format: str = "pcm16"
    sample_rate: int = SAMPLE_RATE


def start_of(text: str) -> Start:
    """Raises ServiceError 400 invalid_start."""
    try:
        return Start.model_validate_json(text)
    except ValidationError as error:
        found = error.errors()[0]
        name = ".".join(str(part) for part in found["loc"]) or "message"
        raise ServiceError(
            400,
            "invalid_start",
            _("{name} is not as it must be: {reason}.").format(name=fields.shown(name), reason=found["msg"]),
            _("Send the JSON message of type start first."),
            param=name[:100],
        ) from None
