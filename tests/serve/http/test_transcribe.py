"""POST /transcribe on a real socket: the adapter that was asked for is the one that answers, and says so."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest


def said(client: httpx2.Client, recording: bytes, path: str = "/transcribe", **form: Any) -> dict[str, Any]:
    answer = client.post(path, files={"file": ("recording.wav", recording)}, data=form)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def fingerprint(running: Any, patient: str) -> str:
    return hashlib.sha256((running.config.adapters / patient / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_each_person_is_answered_by_their_own_adapter_which_the_answer_names(
    running: Any, client: httpx2.Client, recording: bytes
) -> None:
    texts = {}
    for patient in ("anna", "bob", None):
        found = said(client, recording, language="en", **({"patient_id": patient} if patient else {}))
        texts[patient] = found["text"]
        assert found["base_fingerprint"] == running.service.base_fingerprint
        if patient is None:
            assert found["adapter"] is None
        else:
            assert found["adapter"]["patient_id"] == patient
            assert found["adapter"]["fingerprint"] == fingerprint(running, patient)
    assert len({*texts.values()}) == 3 and all(texts.values())


def test_the_path_names_the_person_as_well_as_the_form(client: httpx2.Client, recording: bytes) -> None:
    by_form = said(client, recording, patient_id="bob", language="en")
    assert said(client, recording, "/patients/bob/transcribe", language="en") == by_form


def test_times_and_confidence_are_there_only_where_they_were_asked_for(client: httpx2.Client, recording: bytes) -> None:
    plain = said(client, recording, language="en")
    assert {"text", "language", "duration", "adapter", "base_fingerprint"} >= plain.keys() - {"repetition"}
    assert plain["language"] == "en" and plain["duration"] == pytest.approx(1.94, abs=0.01)
    timed = said(client, recording, language="en", timestamps="segment", confidence="true")
    assert timed["text"] == plain["text"] and 0 <= timed["confidence"] <= 1
    assert all(part.keys() >= {"start", "end", "text", "confidence"} for part in timed["segments"])
    words = said(client, recording, language="en", timestamps="word")["segments"]
    assert all("confidence" not in word for part in words for word in part["words"])
    assert "".join(word["word"] for part in words for word in part["words"]).strip()


def test_a_phrase_of_the_list_is_answered_however_the_list_is_given(client: httpx2.Client, recording: bytes) -> None:
    phrases = ["close the door", "good morning"]
    wanted = {"phrases_only": "true", "phrases_threshold": "0", "language": "en"}
    ways = (phrases, ["\n".join(phrases)], [json.dumps(phrases)])
    found = [said(client, recording, phrases=given, **wanted) for given in ways]
    assert found[0]["text"] in phrases and found[0]["phrase"] == found[0]["text"]
    assert found[0] == found[1] == found[2]


def test_the_base_model_answers_for_a_stranger_only_where_that_was_said(
    client: httpx2.Client, recording: bytes
) -> None:
    refused = client.post("/transcribe", files={"file": recording}, data={"patient_id": "nobody"})
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "adapter_not_found"
    assert said(client, recording, patient_id="nobody", fallback="base", language="en")["adapter"] is None


def test_a_persons_token_opens_that_persons_model_and_nothing_else(running: Any, recording: bytes) -> None:
    with running.client("anna") as anna:
        assert said(anna, recording)["adapter"]["patient_id"] == "anna"
        for form in ({"patient_id": "bob"}, {"patient_id": "nobody"}, {"patient_id": "anna", "fallback": "base"}):
            refused = anna.post("/transcribe", files={"file": recording}, data=form)
            assert refused.status_code == 403, form
        assert anna.get("/patients/anna/adapter").status_code == 200
        for path in ("/patients", "/patients/bob/adapter", "/metrics"):
            assert anna.get(path).status_code == 403, path


def test_the_audit_log_has_who_asked_for_whom_and_no_word_of_it(running: Any, recording: bytes) -> None:
    with running.client("anna") as anna:
        answer = anna.post(
            "/transcribe", files={"file": ("secret.wav", recording)}, headers={"X-Request-Id": "visit-7"}
        )
    assert answer.headers["X-Request-Id"] == "visit-7"
    lines: list[str] = []
    until = time.monotonic() + 10
    while "visit-7" not in "".join(lines) and time.monotonic() < until:  # written behind the answer
        lines = Path(running.config.audit_log).read_text(encoding="utf-8").splitlines()
    (row,) = [json.loads(line) for line in lines if "visit-7" in line]
    assert {**row, "time": "", "audio_seconds": round(row["audio_seconds"])} == {
        "time": "",
        "request": "visit-7",
        "account": "anna",
        "patient": "anna",
        "action": "POST /transcribe",
        "status": 200,
        "audio_seconds": 2,
    }
    assert "secret" not in "".join(lines)
