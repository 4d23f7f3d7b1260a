"""Adapters over HTTP: put in place when they are good, answering at once, rolled back, deleted."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from resonance.errors import DataError, UnreachableError


def packed(folder: Path, inside: str = "", **instead: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.writestr(inside + path.name, instead.get(path.stem, path.read_bytes()))
    return out.getvalue()


@pytest.fixture
def patient(client: httpx2.Client, request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"guest-{abs(hash(request.node.name)) % 10**8}"
    yield name
    client.delete(f"/patients/{name}/adapter")


@pytest.fixture
def made(make_adapter: Callable[..., Path], openai_shaped: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(seed: int, **more: Any) -> Path:
        return make_adapter(tmp_path / str(seed), base=openai_shaped, seed=seed, **more)

    return make


def put(client: httpx2.Client, patient: str, content: bytes, kind: str = "application/zip") -> httpx2.Response:
    return client.put(f"/patients/{patient}/adapter", content=content, headers={"Content-Type": kind})


def answered_by(client: httpx2.Client, patient: str, recording: bytes) -> str:
    answer = client.post(f"/patients/{patient}/transcribe", files={"file": recording})
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["adapter"]["version"]
    return found


def test_an_adapter_answers_from_the_moment_it_is_there_and_an_earlier_one_after_a_rollback(
    client: httpx2.Client, patient: str, made: Callable[..., Path], recording: bytes
) -> None:
    first = put(client, patient, packed(made(21)))
    assert first.status_code == 201, first.text
    assert first.json()["current"] is True and first.json()["bytes"] > 0
    assert answered_by(client, patient, recording) == first.json()["version"]
    form = client.put(f"/patients/{patient}/adapter", files={"file": ("a.zip", packed(made(22), inside="adapter/"))})
    second = form.json()["version"]
    assert form.status_code == 201 and answered_by(client, patient, recording) == second != first.json()["version"]
    listed = client.get(f"/patients/{patient}/adapter").json()
    assert listed["current"] == second and [v["version"] for v in listed["versions"]] == [
        second,
        first.json()["version"],
    ]
    back = client.post(f"/patients/{patient}/adapter/rollback")
    assert back.status_code == 200 and back.json()["version"] == first.json()["version"]
    assert answered_by(client, patient, recording) == first.json()["version"]
    named = client.post(f"/patients/{patient}/adapter/rollback", json={"version": second})
    assert named.json()["version"] == second and answered_by(client, patient, recording) == second


def test_a_deleted_adapter_is_gone_everywhere(
    client: httpx2.Client, patient: str, made: Callable[..., Path], recording: bytes
) -> None:
    assert put(client, patient, packed(made(23))).status_code == 201
    assert patient in client.get("/patients").json()["patients"]
    assert client.delete(f"/patients/{patient}/adapter").json() == {"patient_id": patient, "deleted": True}
    assert client.get(f"/patients/{patient}/adapter").status_code == 404
    assert client.get(f"/v1/models/{patient}").status_code == 404
    assert client.post(f"/patients/{patient}/transcribe", files={"file": recording}).status_code == 404
    assert patient not in client.get("/patients").json()["patients"]


def test_what_cannot_answer_is_refused_and_the_one_before_goes_on(
    client: httpx2.Client,
    patient: str,
    made: Callable[..., Path],
    recording: bytes,
    tiny_model: Path,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    good = made(24)
    version = put(client, patient, packed(good)).json()["version"]
    escape = io.BytesIO()
    with zipfile.ZipFile(escape, "w") as archive:
        archive.writestr("../evil.json", b"{}")
    other_base = make_adapter(tmp_path / "other", base=tiny_model)
    cases = {
        "no zip": (b"PK no zip at all", 400, "archive_unreadable"),
        "empty": (b"", 400, "body_empty"),
        "a way out": (escape.getvalue(), 422, "archive_refused"),
        "another base": (packed(other_base), 422, "adapter_unusable"),
        "no weights": (packed(good, adapter_model=b"\0" * 100), 422, "adapter_unusable"),
        "no settings": (packed(good, adapter_config=b"[]"), 422, "adapter_unusable"),
    }
    for name, (content, status, code) in cases.items():
        answer = put(client, patient, content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), (name, answer.text)
        assert answer.json()["error"]["message"] and answer.json()["error"]["hint"]
    assert put(client, patient, b"x", kind="text/plain").json()["error"]["code"] == "not_an_archive"
    assert answered_by(client, patient, recording) == version


def test_a_name_of_the_base_model_is_nobodys(client: httpx2.Client) -> None:
    answer = put(client, "whisper-1", b"")
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "reserved_name"


def test_patients_come_in_pages(client: httpx2.Client) -> None:
    page = client.get("/patients", params={"limit": 1}).json()
    assert page == {"patients": ["anna"], "has_more": True, "after": "anna"}
    page = client.get("/patients", params={"limit": 1, "after": "anna"}).json()
    assert page["patients"] == ["bob"]
    models = client.get("/v1/models", params={"limit": 1}).json()
    assert [model["id"] for model in models["data"]][-1] == "anna" and models["has_more"]
    assert [m["id"] for m in client.get("/v1/models", params={"after": "anna", "limit": 1}).json()["data"]] == ["bob"]


def test_an_adapter_that_is_damaged_hides_no_other_from_the_list_of_models(running: Any, client: httpx2.Client) -> None:
    folder = running.config.adapters
    cases = {"no-date": "{}", "bad-date": '{"created": "yesterday"}', "number": '{"created": 5}'}
    for name, info in cases.items():
        (folder / name).mkdir()
        (folder / name / "resonance.json").write_text(info)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "current").write_text("../x")
    (folder / "loop").symlink_to("loop")
    try:
        found = {model["id"]: model["created"] for model in client.get("/v1/models").json()["data"]}
        assert {"anna", "bob"} <= found.keys() and [found[name] for name in cases] == [0, 0, 0]
        assert "damaged" not in found and client.get("/v1/models/damaged").status_code == 404
        answer = client.get("/patients/damaged/adapter")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "adapter_unusable")
        assert {"anna", "bob", "damaged"} <= {*client.get("/patients").json()["patients"]}
    finally:
        (folder / "loop").unlink()
        for name in (*cases, "damaged"):
            shutil.rmtree(folder / name)


def test_a_fault_of_the_store_is_ours_and_tells_no_path(
    running: Any, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cases = [
        (UnreachableError("s3://voices/x: refused"), 503, "adapter_store_unreachable"),
        (DataError("/srv/voices/x: cannot be written"), 500, "storage_failed"),
        (PermissionError(13, "denied", "/srv/voices/x"), 500, "storage_failed"),
    ]
    for error, status, code in cases:

        def fail(*_given: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(running.service.store, "patients", fail)
        answer = client.get("/patients")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        assert "voices" not in answer.text and "voices" in caplog.text
        assert (answer.headers.get("Retry-After") is not None) == (status == 503)
        caplog.clear()


def test_only_an_admin_changes_adapters(running: Any, made: Callable[..., Path]) -> None:
    for token in ("anna", "all", "base"):
        with running.client(token) as caller:
            assert put(caller, "anna", packed(made(25))).status_code == 403
            assert caller.delete("/patients/anna/adapter").status_code == 403
            assert caller.post("/patients/anna/adapter/rollback").status_code == 403


def test_the_openapi_document_has_an_example_or_a_description_for_every_route(client: httpx2.Client) -> None:
    document = client.get("/openapi.json").json()
    assert "HTTPValidationError" not in json.dumps(document)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (method, path)
            assert all(answer["description"] for answer in operation["responses"].values())
            wrong = operation["responses"]["500"]["content"]["application/json"]["schema"]
            assert wrong == {"$ref": "#/components/schemas/FaultBody"}, (method, path)


def test_the_page_of_the_routes_works_without_the_internet(client: httpx2.Client) -> None:
    page = client.get("/docs")
    addresses = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", page.text)
    assert len(addresses) >= 4 and "/openapi.json" in addresses
    for address in addresses:
        assert address.startswith("/") and client.get(address).status_code == 200, address
    assert "http" not in page.headers["content-security-policy"]
