"""What is wrong with a request is told in one shape: a status, a code for programs, a message and a hint for people."""

from __future__ import annotations

import io
import json
import struct
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
import pytest

from resonance.serve.outer import Outer

SHAPE = {"message", "type", "param", "code", "hint"}
AUDIO = "(audio)"  # stands for the recording


def refusal(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer, which must be this one."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"} and body["error"].keys() == SHAPE
    assert body["error"]["code"] == code, body
    assert body["error"]["message"] and body["error"]["hint"] and body["error"]["type"]
    assert answer.headers["X-Request-Id"] and answer.headers["Content-Type"] == "application/json"
    found: dict[str, Any] = body["error"]
    return found


@dataclass(frozen=True)
class Wrong:
    """A request that is refused."""

    status: int
    code: str
    form: dict[str, Any] = field(default_factory=dict)
    path: str = "/transcribe"
    name: str = "file"  # of the field with the recording
    data: Any = AUDIO
    said: str = ""  # is in the message or the hint


def two_hours() -> bytes:
    """A small WAV whose header is right: two hours at 1,000 Hz would be 14 MB, so at the lowest rate and 8 bits, cut off."""
    return (
        b"RIFF"
        + struct.pack("<I", 36 + 2**20)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, 1, 1, 1, 8)
        + b"data"
        + struct.pack("<I", 2**20)
        + bytes(2**20)
    )


def silence(seconds: float, rate: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 1, rate, 0, "NONE", ""))
        file.writeframes(b"\x80" * int(seconds * rate))
    return out.getvalue()


V1 = "/v1/audio/transcriptions"
BASE = {"model": "whisper-1"}
CASES = {
    "not audio": Wrong(400, "audio_unreadable", data=b"This is a letter, and no recording. " * 9),
    "random bytes": Wrong(400, "audio_unreadable", data=bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8))),
    "empty file": Wrong(400, "file_empty", data=b""),
    "a forged rate": Wrong(400, "audio_unreadable", data=two_hours()),
    "longer than allowed": Wrong(413, "audio_too_long", data=silence(61, 8000)),
    "larger than allowed": Wrong(413, "upload_too_large", data=bytes(2_000_001)),
    "wrong field name": Wrong(400, "missing_file", name="audio", said="audio"),
    "unknown field": Wrong(400, "unknown_field", {"langage": "en"}, said="language"),
    "half a character": Wrong(400, "invalid_value", {"phrases": '["abc\\ud800"]'}),
    "unknown patient": Wrong(404, "adapter_not_found", {"patient_id": "nobody"}),
    "path as id": Wrong(400, "invalid_patient_id", {"patient_id": "../x"}),
    "empty id": Wrong(400, "invalid_patient_id", {"patient_id": ""}),
    "long id": Wrong(400, "invalid_patient_id", {"patient_id": "x" * 10_000}),
    "emoji as id": Wrong(400, "invalid_patient_id", {"patient_id": "🙂"}),
    "null in id": Wrong(400, "invalid_patient_id", {"patient_id": "a\x00b"}),
    "emoji in path": Wrong(400, "invalid_patient_id", path="/patients/%F0%9F%99%82/transcribe"),
    "path in path": Wrong(404, "route_not_found", path="/patients/..%2Fx/transcribe"),
    "id twice": Wrong(400, "duplicate_field", {"patient_id": ["anna", "bob"]}),
    "language": Wrong(400, "unsupported_language", {"language": "klingon"}),
    "near language": Wrong(400, "unsupported_language", {"language": "germn"}, said="german"),
    "language of the model": Wrong(400, "invalid_settings", {"language": "yue"}),
    "task": Wrong(400, "invalid_value", {"task": "sing"}, said="translate"),
    "timestamps": Wrong(400, "invalid_value", {"timestamps": "maybe"}, said="segment"),
    "beams as text": Wrong(400, "invalid_value", {"num_beams": "many"}),
    "beams as fraction": Wrong(400, "invalid_value", {"num_beams": "1.5"}),
    "too many beams": Wrong(400, "invalid_value", {"num_beams": "6"}, said="5"),
    "beams in other digits": Wrong(400, "invalid_value", {"num_beams": "٣"}),
    "flag": Wrong(400, "invalid_value", {"skip_nonspeech": "perhaps"}),
    "long prompt": Wrong(400, "value_too_long", {"prompt": "word " * 500}),
    "phrases that are no list": Wrong(400, "invalid_value", {"phrases": '["a", 3]'}),
    "phrases nested deeply": Wrong(400, "invalid_value", {"phrases": "[" * 20_000}),
    "phrase too long": Wrong(400, "value_too_long", {"phrases": "x" * 201}),
    "phrases of marks": Wrong(400, "invalid_value", {"phrases": "!!!"}),
    "phrases only without phrases": Wrong(400, "invalid_value", {"phrases_only": "true"}),
    "weight not a number": Wrong(400, "invalid_value", {"phrases": "a", "phrases_weight": "nan"}),
    "fallback": Wrong(400, "invalid_value", {"fallback": "yes"}),
    "field too large": Wrong(413, "field_too_large", {"prompt": "x" * 70_000}),
    "no model": Wrong(400, "missing_model", path=V1),
    "unknown model": Wrong(404, "model_not_found", {"model": "gpt-9"}, path=V1),
    "impossible model": Wrong(404, "model_not_found", {"model": "../x"}, path=V1),
    "response_format": Wrong(400, "unsupported_response_format", BASE | {"response_format": "xml"}, path=V1, said="srt"),
    "speakers": Wrong(400, "unsupported_value", BASE | {"response_format": "diarized_json"}, path=V1),
    "temperature": Wrong(400, "invalid_value", BASE | {"temperature": "2"}, path=V1),
    "temperature as text": Wrong(400, "invalid_value", BASE | {"temperature": "hot"}, path=V1),
    "granularity": Wrong(400, "invalid_value", BASE | {"timestamp_granularities[]": "letter"}, path=V1),
    "granularity without times": Wrong(400, "invalid_value", BASE | {"timestamp_granularities[]": "word", "response_format": "srt"}, path=V1),
    "stream of subtitles": Wrong(400, "invalid_value", BASE | {"stream": "true", "response_format": "srt"}, path=V1),
    "logprobs of a text": Wrong(400, "invalid_value", BASE | {"include[]": "logprobs", "response_format": "text"}, path=V1),
    "several languages": Wrong(400, "too_many", BASE | {"languages[]": ["en", "de"]}, path=V1),
    "two people": Wrong(409, "two_patients", {"model": "anna", "patient_id": "bob"}, path=V1),
    "language of a translation": Wrong(400, "unknown_field", BASE | {"language": "de"}, path="/v1/audio/translations"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", CASES.values(), ids=CASES)
def test_bad_input_is_refused_with_its_status_and_code(client: httpx2.Client, recording: bytes, wrong: Wrong) -> None:
    data = recording if wrong.data == AUDIO else wrong.data
    answer = client.post(wrong.path, files={wrong.name: ("recording.wav", data)}, data=wrong.form)
    error = refusal(answer, wrong.status, wrong.code)
    assert wrong.said in error["message"] + error["hint"]
    assert len(answer.content) < 1500  # what was sent is not sent back


def test_the_8_bits_of_a_telephone_are_audio(
    client: httpx2.Client, spoken: np.ndarray, make_wav: Callable[..., bytes]
) -> None:
    answer = client.post("/transcribe", files={"file": make_wav(spoken[::2], "ULAW", 8000)})
    assert answer.status_code == 200 and answer.json()["duration"] == pytest.approx(1.94, abs=0.02)


@pytest.mark.parametrize("path", ["/transcribe", "/patients/anna/transcribe", V1, "/v1/audio/translations"])
def test_a_body_that_is_no_form_or_none_is_refused(client: httpx2.Client, path: str) -> None:
    refusal(client.post(path), 415, "not_a_form")
    refusal(client.post(path, json={"file": "x"}), 415, "not_a_form")
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    refusal(client.post(path, content=b"--x\r\nnothing", headers=kind), 400, "bad_form")
    refusal(client.post(path, content=b"", headers={"Content-Type": "multipart/form-data"}), 400, "bad_form")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "route_not_found"),
        ("GET", "/nothing/here", 404, "route_not_found"),
        ("GET", "/transcribe/", 404, "route_not_found"),
        ("GET", "/transcribe", 405, "method_not_allowed"),
        ("DELETE", "/patients", 405, "method_not_allowed"),
        ("TRACE", "/patients/anna/adapter", 405, "method_not_allowed"),
        ("GET", "/patients?limit=0", 400, "invalid_value"),
        ("GET", "/patients?limit=many", 400, "invalid_value"),
        ("GET", "/patients?after=../x", 400, "invalid_patient_id"),
        ("GET", "/patients/%2e%2e/adapter", 400, "invalid_patient_id"),
        ("GET", "/patients/nobody/adapter", 404, "adapter_not_found"),
        ("DELETE", "/patients/nobody/adapter", 404, "adapter_not_found"),
        ("POST", "/patients/nobody/adapter/rollback", 404, "adapter_not_found"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
        ("GET", "/v1/models/a/b", 404, "model_not_found"),
    ],
)
def test_routes_and_values_that_are_not_there_are_refused_in_the_one_shape(
    client: httpx2.Client, method: str, path: str, status: int, code: str
) -> None:
    refusal(client.request(method, path), status, code)


def test_a_wrong_method_is_told_all_that_are_right(client: httpx2.Client) -> None:
    assert client.post("/patients/anna/adapter").headers["Allow"] == "DELETE, GET, PUT"


def test_a_rollback_that_is_no_json_is_refused(client: httpx2.Client) -> None:
    path = "/patients/anna/adapter/rollback"
    refusal(client.post(path, content=b"{", headers={"Content-Type": "application/json"}), 400, "invalid_value")
    refusal(client.post(path, json={"verion": "x"}), 400, "invalid_value")
    refusal(client.post(path, json={"version": "../x"}), 404, "version_not_found")
    refusal(client.post(path, content=b" " * 4097), 413, "upload_too_large")


def test_the_body_of_a_rollback_is_not_read_before_it_is_known_who_asks(running: Any) -> None:
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1 << 16
            yield b" " * (1 << 16)

    for content in (b"{", pieces()):
        for token, status, code in ((None, 401, "token_missing"), ("anna", 403, "not_yours")):
            with running.client(token) as caller:
                try:
                    answer = caller.post("/patients/anna/adapter/rollback", content=content)
                except httpx2.TransportError:  # the connection is closed while it is still sending
                    assert content != b"{" and sent < 60_000_000
                else:
                    refusal(answer, status, code)
            if content != b"{":
                break


@pytest.mark.parametrize("path", ["/transcribe", "/patients", "/v1/models", "/metrics", V1])
def test_without_a_token_nothing_is_opened_and_the_body_is_not_read(running: Any, recording: bytes, path: str) -> None:
    method = "POST" if path in ("/transcribe", V1) else "GET"
    for token, code in ((None, "token_missing"), ("wrong", "token_invalid")):
        with running.client(token) as stranger:
            answer = stranger.request(method, path, files={"file": recording} if method == "POST" else None)
            refusal(answer, 401, code)
            assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_health_needs_no_token(running: Any) -> None:
    with running.client(None) as stranger:
        assert stranger.get("/health").json() == {"status": "ok"}
        assert stranger.get("/ready").json() == {"status": "ok"}


def test_an_unexpected_exception_is_a_500_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    import asyncio

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("what Anna said")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"x-request-id", b"a b\r\n")]}
    asyncio.run(Outer(broken)(scope, None, send))  # type: ignore[arg-type]
    start, body = sent
    assert start["status"] == 500 and json.loads(body["body"])["error"]["code"] == "internal_error"
    assert len(dict(start["headers"])[b"x-request-id"]) == 32  # not the client's, which has a line break
    assert "Anna" not in str(sent) + caplog.text
    assert "RuntimeError" in caplog.text and "test_bad_requests.py" in caplog.text
