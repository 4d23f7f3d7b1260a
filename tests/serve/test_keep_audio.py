"""Recordings are kept only where that was asked for, below a folder for each day and person, until their days are over."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resonance.config_serve import ServeConfig
from resonance.data.audio import read_audio
from resonance.data.formats import load_manifest
from resonance.errors import ConfigError, DataError
from resonance.serve import keep_audio
from resonance.serve.keep_audio import KeptAudio
from resonance.serve.speech import Answer, Voice
from resonance.transcribe.recognizer import TimedText
from resonance.transcribe.result import FileResult

SAMPLES = (0.2 * np.sin(np.arange(8_000) / 20)).astype(np.float32)
RESULT = FileResult("visit.wav", "开门", "zh", 0.5, (TimedText(0, 0.5, "开门"),), None)
ANSWER = Answer(RESULT, Voice("anna", "v3", "ab12"), "cd34")


def config_of(**changes: Any) -> ServeConfig:
    return ServeConfig(model="m", **changes)


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86_400
    os.utime(path, (then, then))


def test_a_recording_is_kept_with_what_was_understood(tmp_path: Path) -> None:
    kept = KeptAudio(tmp_path / "kept", 7)
    path = kept.keep(SAMPLES, ANSWER, account="phone", patient="anna")
    assert path
    day, person, name = path.relative_to(tmp_path / "kept").parts
    assert person == "anna" and len(day) == 10 and len(name) == 36
    np.testing.assert_allclose(read_audio(path), SAMPLES, atol=1 / 32768)
    row = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert (row["text"], row["account"], row["adapter"], row["fingerprint"]) == ("开门", "phone", "v3", "ab12")
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_what_is_kept_can_be_trained_on(tmp_path: Path) -> None:
    path = KeptAudio(tmp_path, 7).keep(SAMPLES, ANSWER, account="phone", patient="anna")
    assert path
    [row] = load_manifest(path.with_suffix(".json")).utterances
    assert (row.audio, row.text, row.language, row.speaker) == (str(path), "开门", "zh", "anna")


def test_the_base_models_recordings_lie_apart_from_every_patients(tmp_path: Path) -> None:
    kept = KeptAudio(tmp_path, 7)
    paths = [kept.keep(SAMPLES, Answer(RESULT, None, "cd34"), account="x", patient=who) for who in (None, "base")]
    assert [path.parent.name for path in paths if path] == ["(base)", "base"]


def test_two_recordings_never_share_a_name(tmp_path: Path) -> None:
    kept = KeptAudio(tmp_path, 7)
    assert len({kept.keep(SAMPLES, ANSWER, account="x", patient="anna") for _ in range(20)}) == 20


@pytest.mark.parametrize("patient", ["../x", "a/b", "", ".", "/etc"])
def test_no_id_leads_out_of_the_folder(tmp_path: Path, patient: str) -> None:
    kept = KeptAudio(tmp_path / "kept", 7)
    with pytest.raises(ValueError):
        kept.keep(SAMPLES, ANSWER, account="x", patient=patient)
    assert list((tmp_path / "kept").iterdir()) == []


def test_what_is_older_than_its_days_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    kept = KeptAudio(tmp_path, 7)
    old, young = (kept.keep(SAMPLES, ANSWER, account="x", patient=who) for who in ("anna", "ben"))
    assert old and young
    mine = old.parent / "notes.txt"
    mine.write_text("of the operator")
    other = tmp_path / "other" / "anna" / old.name
    other.parent.mkdir(parents=True)
    other.touch()
    half_written = old.parent / ".0123456789ab.part"
    half_written.touch()
    for path in (old, old.with_suffix(".json"), mine, other, half_written):
        age(path, 7.01)
    age(young, 6.9)
    assert kept.purge() == 3
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {young, young.with_suffix(".json"), mine, other}
    for path in (young, young.with_suffix(".json")):
        age(path, 8)
    mine.unlink()
    assert kept.purge() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_links_are_not_followed_when_old_recordings_are_deleted(tmp_path: Path) -> None:
    kept = KeptAudio(tmp_path / "kept", 7)
    outside = tmp_path / "outside" / "anna"
    outside.mkdir(parents=True)
    (outside / "00.wav").touch()
    age(outside / "00.wav", 9)
    (tmp_path / "kept" / "2020-01-01").symlink_to(tmp_path / "outside")
    (tmp_path / "kept" / "2020-01-02").mkdir()
    (tmp_path / "kept" / "2020-01-02" / "anna").symlink_to(outside)
    assert kept.purge() == 0
    assert (outside / "00.wav").exists()


def test_old_recordings_go_when_the_service_starts(tmp_path: Path) -> None:
    kept = KeptAudio(tmp_path, 7)
    old = kept.keep(SAMPLES, ANSWER, account="x", patient="anna")
    assert old
    age(old, 8)
    kept.start()
    until = time.monotonic() + 5
    while old.exists() and time.monotonic() < until:
        time.sleep(0.01)
    kept.close()
    assert not old.exists()


def test_an_answer_goes_out_when_the_disk_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = KeptAudio(tmp_path / "kept", 7)
    (tmp_path / "kept").rmdir()
    (tmp_path / "kept").touch()
    assert kept.keep(SAMPLES, ANSWER, account="x", patient="anna") is None
    assert "could not be kept" in caplog.text
    assert "开门" not in caplog.text


def test_where_the_transcript_cannot_be_written_no_recording_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_given: object, **_more: object) -> None:
        raise DataError("no space left")

    monkeypatch.setattr(keep_audio, "write_text_atomic", full)
    assert KeptAudio(tmp_path, 7).keep(SAMPLES, ANSWER, account="x", patient="anna") is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_nothing_is_kept_unless_a_folder_and_days_are_given(tmp_path: Path) -> None:
    assert KeptAudio.from_config(config_of()) is None
    with pytest.raises(ConfigError, match="--keep_audio_days"):
        KeptAudio.from_config(config_of(keep_audio=tmp_path))
    with pytest.raises(ConfigError, match="--keep_audio"):
        KeptAudio.from_config(config_of(keep_audio_days=3))
    assert KeptAudio.from_config(config_of(keep_audio=tmp_path / "kept", keep_audio_days=3))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        KeptAudio.from_config(config_of(keep_audio=tmp_path / "file", keep_audio_days=3))
