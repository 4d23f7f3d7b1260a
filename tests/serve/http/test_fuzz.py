"""Uploads and values that nobody thought of: never a 5xx, never another shape, and the service goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resonance.serve.routes_openai import ALSO, TRANSCRIPTION
from resonance.serve.routes_transcribe import FIELDS

FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Not the file, and not what would make a text of every example: decoding is not what is tried here.
NAMES = sorted({*FIELDS, *TRANSCRIPTION, *ALSO} - {"file"})
VALUES = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "true", "0", "-1", "1e999", "nan", "٣", "[", '["a"]', "{}", "null", "anna", "..", "en", "\0"]
    ),
    st.integers().map(str),
    st.floats().map(str),
)


@pytest.fixture(scope="module")
def asking(running: Any) -> Iterator[httpx2.Client]:
    with running.client() as client:
        yield client


def decent(answer: httpx2.Response) -> None:
    """Answered, or refused in the one shape; and no fault of the service."""
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code", "hint"}
        assert error["message"] and error["hint"] and len(json.dumps(error)) < 3000


@FEW
@given(form=st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=4), openai=st.booleans())
def test_no_values_of_a_form_are_a_fault_of_the_service(
    asking: httpx2.Client, form: list[tuple[str, str]], openai: bool
) -> None:
    values: dict[str, Any] = {"model": ["whisper-1"]} if openai else {}
    for name, value in form:
        values.setdefault(name, []).append(value)
    path = "/v1/audio/transcriptions" if openai else "/transcribe"
    decent(asking.post(path, files={"file": ("a.wav", b"no audio")}, data=values))


@FEW
@given(
    head=st.sampled_from([b"", b"RIFF", b"OggS", b"fLaC", b"ID3", b"\x1aE\xdf\xa3", b"\0\0\0\x20ftypM4A ", b"#!AMR\n"]),
    data=st.binary(max_size=2000),
    name=st.text(max_size=30),
)
def test_no_bytes_in_place_of_a_recording_are_a_fault_of_the_service(
    asking: httpx2.Client, head: bytes, data: bytes, name: str
) -> None:
    decent(asking.post("/transcribe", files={"file": (name or "x", head + data)}))


@FEW
@given(data=st.data())
def test_no_damage_to_a_recording_is_a_fault_of_the_service(
    asking: httpx2.Client, data: st.DataObject, recording: bytes, speech: bytes
) -> None:
    whole = bytearray(data.draw(st.sampled_from([recording[:20_000], speech])))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=8)):
        whole[place] = value
    decent(asking.post("/transcribe", files={"file": ("a.wav", bytes(whole[: data.draw(st.integers(0, len(whole)))]))}))


@FEW
@given(
    body=st.binary(max_size=400),
    kind=st.sampled_from(["multipart/form-data; boundary=x", "multipart/form-data", "application/zip", "text/plain", ""]),
    around=st.booleans(),
    route=st.sampled_from(["POST /transcribe", "POST /v1/audio/translations", "PUT /patients/guest/adapter", "POST /patients/anna/adapter/rollback"]),
)  # fmt: skip
def test_no_body_is_a_fault_of_the_service(
    asking: httpx2.Client, body: bytes, kind: str, around: bool, route: str
) -> None:
    method, path = route.split()
    content = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + body + b"\r\n--x--" if around else body
    decent(asking.request(method, path, content=content, headers={"Content-Type": kind} if kind else {}))


def test_after_all_that_the_service_answers(asking: httpx2.Client, recording: bytes) -> None:
    answer = asking.post("/transcribe", files={"file": recording}, data={"patient_id": "anna"})
    assert answer.status_code == 200 and answer.json()["text"]
    assert asking.get("/ready").json() == {"status": "ok"}
