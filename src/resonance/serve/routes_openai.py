"""What programs made for OpenAI's speech API ask for, and in its words.

Source of the shapes: OpenAI's published OpenAPI document, as the types of the `openai` package 3.54 have it.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from resonance.errors import ResonanceError, UnreachableError
from resonance.messages import _
from resonance.serve import answers, fields, openapi, shapes
from resonance.serve.asking import Who, config_of, deadline, form_of, heard, patient_of, service_of, unless_gone
from resonance.serve.auth import Caller
from resonance.serve.events import events, first_of
from resonance.serve.faults import ServiceError
from resonance.serve.fields import Fields
from resonance.serve.outer import log
from resonance.serve.patients import check_patient_id
from resonance.serve.routes_transcribe import fallback_of, patient_asked, temperatures_of
from resonance.serve.shapes import IDS, ModelList, ModelShape, OpenaiText, OpenaiVerbose, Page, refusals
from resonance.serve.speech import Answer, SpeechRequest
from resonance.serve.store import AdapterStore
from resonance.transcribe.recognizer import DecodeSettings, Times

router = APIRouter(prefix="/v1", tags=["OpenAI"])
STARTED = int(time.time())
FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
GRANULARITIES = ("word", "segment")

COMMON: dict[str, openapi.Schema] = {
    "file": openapi.FILE,
    "model": {
        "type": "string",
        "minLength": 1,
        "maxLength": 200,
        "description": "whisper-1 or the base model's name; or a patient's id: whose adapter answers.",
        "examples": ["whisper-1", "anna"],
    },
    "prompt": openapi.PROMPT,
    "response_format": {"type": "string", "enum": [*FORMATS], "default": "json"},
    "temperature": {"type": "number", "minimum": 0, "maximum": 1, "default": 0},
    "patient_id": openapi.PATIENT | {"description": "Whose adapter answers, where model names the base model."},
    "fallback": openapi.FALLBACK,
}
TEXTS: openapi.Schema = {"type": "array", "items": {"type": "string", "maxLength": 200}}
TRANSCRIPTION: dict[str, openapi.Schema] = COMMON | {
    "language": openapi.LANGUAGE,
    "languages[]": {
        "type": "array",
        "items": openapi.LANGUAGE,
        "maxItems": 1,
        "description": "One only: which of several was spoken is found out without a list.",
    },
    "keywords[]": TEXTS | {"maxItems": 10, "description": "Words as they are spelt; the same as a prompt of them."},
    "timestamp_granularities[]": {
        "type": "array",
        "items": {"type": "string", "enum": [*GRANULARITIES]},
        "description": "With verbose_json: which times to give.",
    },
    "include[]": {
        "type": "array",
        "items": {"type": "string", "enum": ["logprobs"]},
        "description": "With json: how probable each word was, as the mean over its tokens.",
    },
    "stream": {"type": "boolean", "default": False, "description": "With json or text: server-sent events."},
    "chunking_strategy": {
        "type": "string",
        "enum": ["auto"],
        "description": "Recordings are cut at pauses anyway.",
    },
    "known_speaker_names[]": TEXTS | {"description": "Without effect: speakers are not told apart."},
    "known_speaker_references[]": {"type": "array", "items": {"type": "string"}, "description": "Without effect."},
}
# Further spellings: lists without brackets, and the parts of a chunking strategy.
ALSO = (
    "languages",
    "keywords",
    "timestamp_granularities",
    "include",
    "known_speaker_names",
    "known_speaker_references",
)
CHUNKING = ("type", "prefix_padding_ms", "silence_duration_ms", "threshold")
PLAIN = {"schema": {"type": "string"}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": OpenaiText | OpenaiVerbose,
        "headers": IDS,
        "description": "In the format asked for; with stream, events transcript.text.delta and transcript.text.done.",
        "content": {"text/plain": PLAIN, "text/vtt": PLAIN, "text/event-stream": PLAIN},
    },
    **refusals(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a program wants of a recording."""

    speech: SpeechRequest
    model: str
    form: str
    temperature: float
    granularities: tuple[str, ...]
    logprobs: bool
    stream: bool
    task: Literal["transcribe", "translate"]


@router.post(
    "/audio/transcriptions",
    summary="Turn a recording into text, as OpenAI does",
    response_model=None,
    responses=RESPONSES,
    openapi_extra=openapi.form(TRANSCRIPTION, "file", "model"),
)
async def transcriptions(request: Request, caller: Who) -> Response:
    return await answered(request, caller, "transcribe")


@router.post(
    "/audio/translations",
    summary="Turn a recording into English text, as OpenAI does",
    response_model=None,
    responses=RESPONSES,
    openapi_extra=openapi.form(COMMON, "file", "model"),
)
async def translations(request: Request, caller: Who) -> Response:
    return await answered(request, caller, "translate")


async def answered(request: Request, caller: Caller, task: Literal["transcribe", "translate"]) -> Response:
    asked = await read_asked(request, caller, task)
    service = service_of(request)
    try:
        if asked.stream:
            first, rest = await unless_gone(request, first_of(service.stream(asked.speech)))
            sent = events(first, rest, asked.speech.settings.prompt, logprobs=asked.logprobs, tokens=service.tokens)
            return StreamingResponse(sent, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        answer = await heard(request, asked.speech)
    except ServiceError as error:
        if error.code == "adapter_not_found" and asked.speech.patient == asked.model:
            raise model_not_found(asked.model) from None
        raise
    return rendered(asked, answer, service.tokens)


def rendered(asked: Asked, answer: Answer, tokens: answers.Tokens) -> Response:
    headers = proof(answer)
    if asked.form == "json":
        return JSONResponse(answers.openai_text(answer, logprobs=asked.logprobs), headers=headers)
    if asked.form == "verbose_json":
        verbose = answers.openai_verbose(
            answer, task=asked.task, granularities=asked.granularities, temperature=asked.temperature, tokens=tokens
        )
        return JSONResponse(verbose, headers=headers)
    if asked.form == "text":
        return Response(answer.result.text + "\n", media_type="text/plain; charset=utf-8", headers=headers)
    form: Literal["srt", "vtt"] = "vtt" if asked.form == "vtt" else "srt"
    media_type = "text/vtt" if form == "vtt" else "text/plain"
    return Response(answers.subtitles(answer, form), media_type=f"{media_type}; charset=utf-8", headers=headers)


def proof(answer: Answer) -> dict[str, str]:
    """Which model answered, for the formats that have no place for it."""
    voice = answer.voice
    found = {"X-Resonance-Base": answer.base_fingerprint}
    if voice:
        found["X-Resonance-Adapter"] = f"{voice.patient}; version={voice.version}; fingerprint={voice.fingerprint}"
    return found


async def read_asked(request: Request, caller: Caller, task: Literal["transcribe", "translate"]) -> Asked:
    config = config_of(request)
    until = deadline(config)
    form = await form_of(request, until)
    given = form.fields
    transcribing = task == "transcribe"
    chunking = [f"chunking_strategy[{part}]" for part in CHUNKING]
    fields.only_known(given, [*TRANSCRIPTION, *ALSO, *chunking] if transcribing else [*COMMON])
    name = fields.text(given, "model", longest=200)
    if name is None:
        raise ServiceError(
            400,
            "missing_model",
            _("The field model is missing."),
            _("GET /v1/models lists the models."),
            param="model",
        )
    patient = voice_of(name, given, caller, request)
    if fields.text(given, "response_format") == "diarized_json":
        raise fields.wrong(
            "response_format", "diarized_json", _("Speakers are not told apart here."), code="unsupported_value"
        )
    shape = fields.choice(given, "response_format", FORMATS, "json", code="unsupported_response_format")
    granularities = fields.choices(given, "timestamp_granularities", GRANULARITIES)
    logprobs = bool(fields.choices(given, "include", ("logprobs",)))
    stream = fields.flag(given, "stream", False)
    fields.choice(given, "chunking_strategy", ("auto",), "auto")
    fields.choice(given, "chunking_strategy[type]", ("server_vad",), "server_vad")
    if granularities and shape != "verbose_json" and shape != "json":
        raise fields.wrong("timestamp_granularities", granularities[0], _("It needs response_format verbose_json."))
    if logprobs and shape != "json":
        raise fields.wrong("include", "logprobs", _("It needs response_format json."))
    if stream and shape not in ("json", "text"):
        raise fields.wrong("stream", "true", _("It needs response_format json or text."))
    if shape == "verbose_json" and not granularities:
        granularities = ["segment"]
    temperature = fields.number(given, "temperature", 0, 1, 0.0)
    words = logprobs or "word" in granularities
    times: Times = "word" if words else "segment" if shape in ("srt", "vtt", "verbose_json") else "none"
    settings = DecodeSettings(
        language_of(given),
        task,
        times=times,
        scores=True,
        temperatures=(temperature,) if temperature else temperatures_of(config),
        prompt=prompt_of(given),
    )
    assert form.file is not None  # read_form has refused it otherwise
    speech = SpeechRequest(
        audio=form.file,
        patient=patient,
        base_if_missing=fallback_of(given, caller),
        settings=settings,
        account=caller.account,
        deadline=until,
    )
    return Asked(speech, name, shape, temperature, tuple(granularities), logprobs, stream, task)


def voice_of(name: str, given: Fields, caller: Caller, request: Request) -> str | None:
    """Whose adapter `model` means. The base model's names mean the one that `patient_id` names, else the token's own.

    Raises ServiceError where the caller may not, or no such model can be.
    """
    if name in base_names(request):
        return patient_asked(request, given, caller)
    try:
        patient = patient_of(request, name)
    except ServiceError:
        raise model_not_found(name) from None
    named = fields.once(given, "patient_id")
    if named is not None and named != name:
        raise ServiceError(
            409,
            "two_patients",
            _("model and patient_id name two people."),
            _("Name one of them, or give whisper-1 as model."),
            param="patient_id",
        )
    caller.allow(patient)
    return patient


def language_of(given: Fields) -> str | None:
    """`language`, else the one of `languages`: several are refused, for the model is not told which it may find."""
    several = [fields.code_of(value, "languages") for value in fields.many(given, "languages")]
    if len({*several}) > 1:
        raise fields.wrong(
            "languages", ", ".join(several), _("Give one language, or none: then it is found out."), code="too_many"
        )
    return fields.language(given) or (several[0] if several else None)


def prompt_of(given: Fields) -> str | None:
    """What was said before, behind words as they are spelt."""
    parts = [", ".join(fields.many(given, "keywords")), fields.text(given, "prompt") or ""]
    return " ".join(part for part in parts if part)[-fields.LONGEST_PROMPT :] or None


def base_names(request: Request) -> list[str]:
    """By which the base model may be asked for: its own, of a folder the last part, and those of the settings."""
    own = service_of(request).base_name
    if Path(own).is_dir():
        own = Path(own).resolve().name
    return list(dict.fromkeys((own, *config_of(request).model_names)))


@router.get(
    "/models",
    summary="The models that this token opens",
    response_model=ModelList,
    responses=shapes.answered("The base model by all its names, then adapters.")
    | refusals(400, 401, 403, 429, 500, 503),
)
async def models(request: Request, caller: Who, page: Annotated[Page, Query()]) -> JSONResponse:
    """OpenAI's list has no pages. This one ends after `limit` adapters and goes on `after` one."""
    data = [] if page.after else [_model(name) for name in base_names(request)]
    after = None if page.after is None else check_patient_id(page.after)
    found, more = await service_of(request).read(lambda: _adapters(request, caller, after, page.limit))
    return JSONResponse({"object": "list", "data": [*data, *found], "has_more": more})


def _adapters(request: Request, caller: Caller, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
    store = service_of(request).store
    if store is None:
        return [], False
    if caller.patient is not None:
        names = [caller.patient] if after is None else []
    elif caller.base_only:
        names = []
    else:
        names = store.patients(after, limit + 1)
    bases = base_names(request)
    found = [(name, _created(store, name)) for name in names[:limit] if name not in bases]
    return [_model(name, created) for name, created in found if created is not None], len(names) > limit


def _created(store: AdapterStore, patient: str) -> int | None:
    """When the adapter that answers was stored; None where there is none, or none that can be told."""
    try:
        created = store.created(patient)
    except UnreachableError:
        raise
    except ResonanceError as error:  # one that is damaged hides no other
        log.warning("%s: %s", patient, error)
        return None
    return None if created is None else seconds_of(created)


@router.get(
    "/models/{model:path}",
    summary="One model",
    response_model=ModelShape,
    responses=shapes.answered("It can be asked for.") | refusals(400, 401, 403, 404, 429, 500, 503),
)
async def model(request: Request, model: str, caller: Who) -> JSONResponse:
    if model in base_names(request):
        return JSONResponse(_model(model))
    patient = voice_of(model, {}, caller, request)
    store = service_of(request).store
    created = None
    if store is not None and patient is not None:
        created = await service_of(request).read(functools.partial(_created, store, patient))
    if created is None:
        raise model_not_found(model)
    return JSONResponse(_model(model, created))


def seconds_of(created: str) -> int:
    """Since 1970, of a time in ISO 8601; 0 where it is none, which somebody else may have written."""
    try:
        return max(0, int(datetime.fromisoformat(created).timestamp()))
    except (TypeError, ValueError, OverflowError, OSError):
        return 0


def _model(name: str, created: int = STARTED) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "resonance"}


def model_not_found(name: str) -> ServiceError:
    return ServiceError(
        404,
        "model_not_found",
        _("There is no model {name}.").format(name=fields.shown(name)),
        _("GET /v1/models lists the models."),
        param="model",
    )
