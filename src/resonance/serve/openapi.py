"""The OpenAPI document: forms with their fields and examples, and security only where it is on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from resonance import __version__
from resonance.config_serve import ServeConfig
from resonance.languages import LANGUAGES

Schema = dict[str, Any]
NOT_SENT = "HTTPValidationError"

TEXT = """Speech to text, each request answered by the model of the person who speaks.

Every answer says which adapter made it, by name, version and fingerprint. Where the adapter that was asked for is not there or
cannot be used, the request is refused: the base model answers in its place only with `fallback=base`."""

FILE: Schema = {
    "type": "string",
    "format": "binary",
    "description": "Recording: WAV, FLAC, MP3, M4A, Ogg, WebM and whatever FFmpeg reads.",
}
ID: Schema = {
    "minLength": 1,
    "maxLength": 64,
    "pattern": "^[A-Za-z0-9_-]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9_-])?$",
    "examples": ["anna"],
}
PATIENT: Schema = ID | {
    "type": "string",
    "description": "Whose adapter answers. Left out, the token's own, else the base model.",
}
LANGUAGE: Schema = {
    "type": "string",
    "enum": sorted(LANGUAGES),
    "description": "Language spoken. Left out, the one of the adapter, else it is found out. English names are taken too.",
    "examples": ["en"],
}
PROMPT: Schema = {
    "type": "string",
    "maxLength": 2000,
    "description": "What was said before, or names as they are spelt. Its last 223 tokens count.",
    "examples": ["Anna, Ørjan"],
}
FALLBACK: Schema = {
    "type": "string",
    "enum": ["none", "base"],
    "default": "none",
    "description": "base: the base model answers where this person has no adapter. Otherwise that is an error.",
}


def form(fields: Mapping[str, Schema], *required: str) -> dict[str, Any]:
    """`openapi_extra` of a route that takes this form."""
    schema = {"type": "object", "properties": fields, "required": [*required], "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def describe(app: FastAPI, config: ServeConfig) -> None:
    """Let `app.openapi()` give the document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = copy.deepcopy(
                get_openapi(title="Resonance", version=__version__, description=TEXT, routes=app.routes)
            )
            parts = found["components"]
            for path in found["paths"].values():
                for operation in path.values():
                    if config.auth == "off":
                        operation.pop("security", None)
                    _limit(operation, config)
                    # FastAPI's own refusals never are sent: all have the one shape.
                    if NOT_SENT in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]
            for name in (NOT_SENT, "ValidationError"):
                parts["schemas"].pop(name, None)
            if config.auth == "off":
                parts.pop("securitySchemes", None)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _limit(operation: dict[str, Any], config: ServeConfig) -> None:
    """Name the limits that the settings give."""
    content = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data", {})
    properties = content.get("schema", {}).get("properties", {})
    if "num_beams" in properties:
        properties["num_beams"]["maximum"] = config.max_beams
