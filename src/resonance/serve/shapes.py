"""What the service answers, as schemas: the OpenAPI document is made of them, and the tests hold the answers against it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from resonance.serve.openapi import ID


class Shape(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class Fault(Shape):
    message: str
    """What is wrong, for people."""
    type: str
    """invalid_request_error, authentication_error, permission_error, rate_limit_error or server_error."""
    param: str | None
    """The field that is at fault."""
    code: str
    """What is wrong, for programs."""
    hint: str
    """What can be done."""


class FaultBody(Shape):
    """Every refusal has this shape, whatever the route: OpenAI's, and a hint."""

    error: Fault


class Status(Shape):
    status: Literal["ok"]


class VoiceShape(Shape):
    """The adapter that answered."""

    patient_id: str
    version: str
    fingerprint: str
    """SHA-256 of its weights file, in hexadecimal."""


class WordShape(Shape):
    start: float
    end: float
    word: str
    """With the space before it: words join to the text."""
    confidence: float | None = None


class SegmentShape(Shape):
    start: float
    """Seconds from the start of the recording."""
    end: float
    text: str
    confidence: float | None = None
    """0-1: geometric mean of the tokens' probabilities."""
    words: list[WordShape] | None = None
    repetition: bool | None = None


class LeftOut(Shape):
    start: float
    end: float
    text: str


class Transcript(Shape):
    """What was understood, and the proof of who answered."""

    text: str
    language: str | None
    """Whisper's code; null where nothing was said and none was given."""
    duration: float
    """Seconds of audio."""
    adapter: VoiceShape | None
    """Which adapter answered; null: the base model."""
    base_fingerprint: str
    """Of the base model's weights."""
    confidence: float | None = None
    """0-1, where asked for."""
    segments: list[SegmentShape] | None = None
    """Where timestamps were asked for."""
    phrase: str | None = None
    """The phrase of the list that it is, if it is one."""
    phrase_score: float | None = None
    repetition: bool | None = None
    """The text repeats itself: probably it is not what was said."""
    left_out: list[LeftOut] | None = None
    """What the model wrote for silence, noise or music, and is not in `text`."""
    warning: str | None = None
    """The recording was cut off or damaged in the middle: the text is of the part before."""


VERSION = "20260114T101500250000-3f2a9c01"
"""As the store names them: when it was stored, UTC, and the first digits of the fingerprint."""


class VersionShape(Shape):
    version: str = Field(examples=[VERSION])
    fingerprint: str
    created: str = Field(examples=["2026-01-14T10:15:00+00:00"])
    """UTC, ISO 8601."""
    bytes: int
    current: bool
    """Whether this is the one that answers."""


class AdapterShape(Shape):
    patient_id: str
    current: str | None
    """The version that answers."""
    versions: list[VersionShape]


class PatientList(Shape):
    patients: list[str]
    has_more: bool
    after: str | None
    """What to give as `after` for the next page."""


class Deleted(Shape):
    patient_id: str
    deleted: Literal[True]


class ModelShape(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelShape]
    has_more: bool


class Duration(Shape):
    type: Literal["duration"]
    seconds: float


class Logprob(Shape):
    token: str
    bytes: list[int]
    logprob: float


class OpenaiText(Shape):
    """`json`, as OpenAI gives it."""

    text: str
    usage: Duration | None = None
    logprobs: list[Logprob] | None = None
    """One for each word: the mean over its tokens."""
    resonance: dict[str, Any] | None = None
    """adapter and base_fingerprint: who answered."""


class OpenaiWord(Shape):
    word: str
    start: float
    end: float


class OpenaiSegment(Shape):
    id: int
    seek: int
    """Hundredths of a second at which it starts."""
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class OpenaiVerbose(Shape):
    """`verbose_json`, as OpenAI gives it."""

    task: Literal["transcribe", "translate"]
    language: str
    """English name of the language."""
    duration: float
    text: str
    segments: list[OpenaiSegment] | None = None
    words: list[OpenaiWord] | None = None
    usage: Duration | None = None
    resonance: dict[str, Any] | None = None
    """adapter and base_fingerprint: who answered."""


FAULTS = {
    400: "A field, the file or the patient id is wrong: the message says which, the hint what to do.",
    401: "No token, or one that is not known.",
    403: "The token does not open this.",
    404: "There is no such adapter, version or model.",
    408: "The request was not sent in time.",
    409: "This cannot be done in the present state.",
    413: "The upload, or the recording in it, is larger than allowed.",
    415: "The body is of another content type.",
    422: "The adapter cannot be used; the message says why.",
    429: "Too many requests or too much audio waiting: ask again after Retry-After seconds.",
    500: "A fault of the service; the log has it under X-Request-Id.",
    503: "The model is loading, out of order or about to stop: ask again after Retry-After seconds.",
    504: "There was no answer in time.",
}
_EXAMPLES = {
    400: ("audio_unreadable", "recording.wav: this is no audio file."),
    401: ("token_missing", "A token is needed."),
    403: ("not_yours", "This token does not open this model."),
    404: ("adapter_not_found", "There is no adapter of anna."),
    413: ("upload_too_large", "The upload is larger than 100 MB."),
    429: ("too_busy", "Too much audio is waiting."),
    503: ("loading", "The model is being loaded."),
}
Responses = dict[int | str, dict[str, Any]]
_WAIT = {"description": "Whole seconds to wait.", "schema": {"type": "integer", "minimum": 0}}
_ID = {"description": "Name of this request, for the log.", "schema": {"type": "string"}}
IDS = {"X-Request-Id": _ID}


def answered(description: str, status: int = 200, **more: Any) -> Responses:
    """What a route answers, for the OpenAPI document."""
    return {status: {"headers": IDS, "description": description, **more}}


def refusals(*statuses: int) -> Responses:
    """These refusals for the OpenAPI document, with an example each."""
    return {status: _refusal(status) for status in statuses}


def _refusal(status: int) -> dict[str, Any]:
    from resonance.serve.faults import ServiceError

    found: dict[str, Any] = {"model": FaultBody, "description": FAULTS[status], "headers": dict(IDS)}
    if status in (429, 503):
        found["headers"]["Retry-After"] = _WAIT
    if status in _EXAMPLES:
        code, message = _EXAMPLES[status]
        example = ServiceError(status, code, message, "…").body
        found["content"] = {"application/json": {"example": example}}
    return found


class Page(Shape):
    """How many to list, and after which."""

    after: str | None = Field(None, json_schema_extra={"pattern": ID["pattern"], "maxLength": ID["maxLength"]})
    limit: int = Field(100, ge=1, le=1000)
