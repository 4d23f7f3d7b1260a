"""POST /transcribe and POST /patients/{patient_id}/transcribe."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from resonance.config_serve import ServeConfig
from resonance.messages import _
from resonance.serve import answers, fields, openapi
from resonance.serve.asking import PatientId, Who, config_of, deadline, form_of, heard, patient_of
from resonance.serve.auth import Caller
from resonance.serve.fields import Fields
from resonance.serve.patients import check_patient_id
from resonance.serve.shapes import IDS, Transcript, refusals
from resonance.serve.speech import SpeechRequest
from resonance.transcribe.recognizer import DecodeSettings, Times

router = APIRouter(tags=["transcribe"])

FIELDS: dict[str, openapi.Schema] = {
    "file": openapi.FILE,
    "patient_id": openapi.PATIENT,
    "fallback": openapi.FALLBACK,
    "language": openapi.LANGUAGE,
    "task": {
        "type": "string",
        "enum": ["transcribe", "translate"],
        "description": "Text in the language spoken, or in English. Left out, what the adapter was trained for.",
    },
    "timestamps": {
        "type": "string",
        "enum": ["false", "segment", "word"],
        "default": "false",
        "description": "Give the times of sentences, or of words too.",
        "examples": ["word"],
    },
    "confidence": {
        "type": "boolean",
        "default": False,
        "description": "Say how sure the model is, of the whole and of each segment.",
    },
    "phrases": {
        "type": "array",
        "items": {"type": "string", "minLength": 1, "maxLength": 40, "pattern": "^[A-Za-z][A-Za-z ]*$"},
        "maxItems": 40,
        "description": "What this person says, given again and again, one a line, or as a JSON list: decoding leans towards it. Up to 10,000 phrases and 64 kB in one field.",
        "examples": [["good morning", "I am thirsty"]],
    },
    "phrases_only": {
        "type": "boolean",
        "default": False,
        "description": "Answer with one of the phrases, or with nothing. Needs phrases.",
    },
    "phrases_weight": {"type": "number", "minimum": 0, "maximum": 100, "default": 1},
    "phrases_threshold": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
    "num_beams": {"type": "integer", "minimum": 1, "maximum": 5, "default": 1},
    "prompt": openapi.PROMPT,
    "skip_nonspeech": {
        "type": "boolean",
        "default": True,
        "description": "Write nothing for what is probably silence, noise or music.",
    },
}
ANSWER = {
    "text": "I am thirsty.",
    "language": "en",
    "duration": 1.84,
    "adapter": {"patient_id": "anna", "version": "20260114-101500-3f2a", "fingerprint": "9f86d081884c7d65…"},
    "base_fingerprint": "2c26b46b68ffc68f…",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"headers": IDS, "content": {"application/json": {"example": ANSWER}}, "description": "What was understood."},
    **refusals(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
}


@router.post(
    "/transcribe",
    summary="Turn a recording into text",
    response_model=Transcript,
    responses=RESPONSES,
    openapi_extra=openapi.form(FIELDS, "file"),
)
async def transcribe(request: Request, caller: Who) -> JSONResponse:
    return await answered(request, caller, None)


@router.post(
    "/patients/{patient_id}/transcribe",
    summary="Turn a recording of this person into text",
    response_model=Transcript,
    responses=RESPONSES,
    openapi_extra=openapi.form({name: schema for name, schema in FIELDS.items() if name != "patient_id"}, "file"),
)
async def transcribe_patient(request: Request, patient_id: PatientId, caller: Who) -> JSONResponse:
    patient = patient_of(request, patient_id)
    caller.allow(patient)
    return await answered(request, caller, patient)


async def answered(request: Request, caller: Who, patient: str | None) -> JSONResponse:
    """Read the form, transcribe, answer. `patient`: of the path."""
    config = config_of(request)
    until = deadline(config)
    form = await form_of(request, until)
    given = form.fields
    fields.only_known(given, [name for name in FIELDS if patient is None or name != "patient_id"])
    if patient is None:
        patient = patient_asked(request, given, caller)
    settings = settings_of(given, config)
    confidence = fields.flag(given, "confidence", False)
    skip = fields.flag(given, "skip_nonspeech", True)
    assert form.file is not None  # read_form has refused it otherwise
    asked = SpeechRequest(
        audio=form.file,
        patient=patient,
        base_if_missing=fallback_of(given, caller),
        settings=settings,
        skip_nonspeech=skip,
        account=caller.account,
        deadline=until,
    )
    answer = await heard(request, asked)
    return JSONResponse(answers.transcript(answer, settings.times, confidence=confidence))


def patient_asked(request: Request, given: Fields, caller: Caller) -> str | None:
    """Whose model is to answer: the one named, else the token's own. Raises ServiceError where the caller may not.

    An empty name is none that was left out: a program that has lost it must not be answered by the base model.
    """
    named = fields.once(given, "patient_id")
    patient = caller.patient if named is None else check_patient_id(named)
    request.state.patient = patient
    caller.allow(patient)
    return patient


def fallback_of(given: Fields, caller: Caller) -> bool:
    """Whether the base model may answer. Raises ServiceError 403 where that is not for the caller."""
    if fields.choice(given, "fallback", ("none", "base"), "none") == "none":
        return False
    caller.allow_base()
    return True


def settings_of(given: Fields, config: ServeConfig) -> DecodeSettings:
    """How to decode, as the form says."""
    task = fields.choice(given, "task", ("transcribe", "translate"), "")
    return DecodeSettings(
        fields.language(given),
        None if not task else "translate" if task == "translate" else "transcribe",
        fields.whole(given, "num_beams", 1, config.max_beams, 1),
        times_of(given),
        scores=True,
        temperatures=temperatures_of(config),
        prompt=fields.text(given, "prompt"),
        phrases=fields.phrase_help(given),
    )


def temperatures_of(config: ServeConfig) -> tuple[float, ...]:
    """At which a text is decoded again, one after the other, as `resonance transcribe` has them."""
    step = config.temperature_increment_on_fallback
    higher = [round(step * i, 6) for i in range(1, int(1 / step + 1e-6) + 1)] if step else []
    return (0.0, *higher)


def times_of(given: Fields) -> Times:
    words: dict[str, Times] = {"false": "none", "none": "none", "true": "segment", "segment": "segment", "word": "word"}
    value = fields.text(given, "timestamps")
    if value is None:
        return "none"
    if value.lower() not in words:
        raise fields.wrong(
            "timestamps", value, _("It must be one of {choices}.").format(choices="false, segment, word")
        )
    return words[value.lower()]
