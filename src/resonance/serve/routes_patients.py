"""Who has an adapter; adapters put in place, rolled back and deleted."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from resonance.messages import _
from resonance.serve import fields, shapes
from resonance.serve.archives import unpack
from resonance.serve.asking import MEGABYTE, PatientId, Who, config_of, deadline, limits_of, patient_of, service_of
from resonance.serve.faults import ServiceError
from resonance.serve.patients import check_patient_id
from resonance.serve.routes_health import refuse_unless_ready
from resonance.serve.routes_openai import base_names
from resonance.serve.shapes import AdapterShape, Deleted, Page, PatientList, Responses, VersionShape, refusals
from resonance.serve.store import AdapterStore, VersionInfo, not_found
from resonance.serve.uploads import read_body, read_form

router = APIRouter(tags=["patients"])
COMMON = (400, 401, 403, 404, 409, 429, 500, 503)
ZIP_TYPES = ("application/zip", "application/x-zip-compressed", "application/octet-stream")
PACKED = {"type": "string", "format": "binary", "description": "The adapter folder as a zip file."}
MAX_ROLLBACK_BYTES = 4096
UPLOAD = {"requestBody": {"required": True, "content": {"application/zip": {"schema": PACKED}}}}


def _responses(status: int, text: str, *more: int) -> Responses:
    return shapes.answered(text, status) | refusals(*COMMON, *more)


class Rollback(BaseModel):
    """Which version answers from now on."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"version": shapes.VERSION}, {}]})
    version: str | None = None


# Not a parameter of the route: FastAPI reads those before it asks who is there, whatever their size.
ROLLBACK = {
    "requestBody": {"required": False, "content": {"application/json": {"schema": Rollback.model_json_schema()}}}
}


@router.get(
    "/patients",
    summary="Who has an adapter",
    response_model=PatientList,
    responses=_responses(200, "Ids in their order, a page at a time."),
)
async def patients(request: Request, caller: Who, page: Annotated[Page, Query()]) -> JSONResponse:
    caller.allow_manage()
    after = None if page.after is None else check_patient_id(page.after)
    store = store_of(request)
    found = await service_of(request).read(lambda: store.patients(after, page.limit + 1))
    some, more = found[: page.limit], len(found) > page.limit
    return JSONResponse({"patients": some, "has_more": more, "after": some[-1] if more else None})


@router.get(
    "/patients/{patient_id}/adapter",
    summary="The versions of a person's adapter",
    response_model=AdapterShape,
    responses=_responses(200, "All versions, and which answers."),
)
async def adapter(request: Request, patient_id: PatientId, caller: Who) -> JSONResponse:
    patient = patient_of(request, patient_id)
    caller.allow(patient)
    store = store_of(request)
    versions = await service_of(request).read(lambda: store.versions(patient))
    if not versions:
        raise not_found(patient)
    current = next((version.name for version in versions if version.current), None)
    return JSONResponse({"patient_id": patient, "current": current, "versions": [shape(v) for v in versions]})


@router.put(
    "/patients/{patient_id}/adapter",
    summary="Put an adapter in place",
    status_code=201,
    response_model=VersionShape,
    responses=_responses(201, "Checked, kept, and answering from now on.", 408, 413, 415, 422, 504),
    openapi_extra=UPLOAD,
)
async def put_adapter(request: Request, patient_id: PatientId, caller: Who) -> JSONResponse:
    """The folder `adapter` of a training as a zip file. It is loaded and checked first: one that was made for another base
    model, or is damaged, is refused, and what answered before goes on to answer. Versions before are kept. It may come as
    the field `file` of a form too."""
    patient = patient_of(request, patient_id)
    caller.allow_manage()
    store_of(request)
    config, service = config_of(request), service_of(request)
    if patient in base_names(request):
        raise ServiceError(
            409,
            "reserved_name",
            _("{name} is a name of the base model.").format(name=patient),
            _("Choose another patient id."),
            param="patient_id",
        )
    most = int(config.max_adapter_mb * MEGABYTE)
    packed = await _packed(request, most)
    with tempfile.TemporaryDirectory(prefix="resonance-adapter-") as place:
        await asyncio.to_thread(unpack, packed, Path(place), most)
        stored = await service.put_adapter(patient, Path(place))
    return JSONResponse(shape(stored), status_code=201)


@router.post(
    "/patients/{patient_id}/adapter/rollback",
    summary="Let an earlier version answer",
    response_model=VersionShape,
    responses=_responses(200, "The version that answers now.", 408, 413, 422, 504),
    openapi_extra=ROLLBACK,
)
async def roll_back(request: Request, patient_id: PatientId, caller: Who) -> JSONResponse:
    """Without a version, the one before."""
    patient = patient_of(request, patient_id)
    caller.allow_manage()
    store_of(request)
    wanted = await _wanted(request)
    return JSONResponse(shape(await service_of(request).roll_back(patient, wanted.version)))


@router.delete(
    "/patients/{patient_id}/adapter",
    summary="Delete a person's adapter, all versions",
    response_model=Deleted,
    responses=_responses(200, "Nothing of it is left.", 504),
)
async def delete_adapter(request: Request, patient_id: PatientId, caller: Who) -> JSONResponse:
    patient = patient_of(request, patient_id)
    caller.allow_manage()
    store_of(request)
    await service_of(request).delete_adapter(patient)
    return JSONResponse({"patient_id": patient, "deleted": True})


def store_of(request: Request) -> AdapterStore:
    """Raises ServiceError 503 while the model is loading, 409 where there is none."""
    refuse_unless_ready(request)
    store = service_of(request).store
    if store is None:
        raise ServiceError(
            409,
            "no_adapters",
            _("This service runs without adapters: only the base model answers."),
            _("Start it with --adapters and a folder."),
        )
    return store


def shape(version: VersionInfo) -> dict[str, Any]:
    return {
        "version": version.name,
        "fingerprint": version.fingerprint,
        "created": version.created,
        "bytes": version.bytes,
        "current": version.current,
    }


async def _wanted(request: Request) -> Rollback:
    limits = limits_of(request, deadline(config_of(request)))
    try:
        body = await read_body(request, max_bytes=MAX_ROLLBACK_BYTES, **limits)
    except ServiceError as error:
        if error.code != "body_empty":
            raise
        return Rollback()
    try:
        return Rollback.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError([one | {"loc": ("body", *one["loc"])} for one in error.errors()]) from None


async def _packed(request: Request, most: int) -> bytes:
    """The zip file: the body itself, or the file of a form."""
    limits = limits_of(request, deadline(config_of(request)))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        form = await read_form(request, max_file_bytes=most, **limits)
        fields.only_known(form.fields, ["file"])
        assert form.file is not None  # read_form has refused it otherwise
        return form.file.data
    if kind not in ZIP_TYPES:
        raise ServiceError(
            415,
            "not_an_archive",
            _("The body is no zip file: its Content-Type is {found}.").format(found=fields.shown(kind or "-")),
            _("Send the adapter folder as a zip file, as application/zip."),
        )
    return await read_body(request, max_bytes=most, **limits)
