"""Every recording that would spoil a training is found, and nothing else."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from resonance.data import check as check_module
from resonance.data.check import CheckReport, check, probe_durations
from resonance.data.check_report import format_report, write_fixed
from resonance.data.formats import load_manifest
from resonance.data.manifest import Utterance
from resonance.errors import DataError
from resonance.units import SAMPLE_RATE

SHARED = Path(os.environ.get("RESONANCE_SHARED") or Path(__file__).resolve().parents[2] / "../shared")


def record(path: Path, seconds: float = 1.0, level: float = 0.3, seed: int = 0, rate: int = SAMPLE_RATE) -> str:
    """Noise whose loudest sample is `level`, so that no two seeds sound the same."""
    noise = np.random.default_rng(seed).standard_normal(round(seconds * rate))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.clip(noise / np.abs(noise).max() * level, -1, 1), rate)
    return str(path)


def kinds(report: CheckReport) -> set[tuple[int, str, str]]:
    return {(problem.row, problem.kind, problem.severity) for problem in report.problems}


def test_each_fault_is_found_and_good_rows_have_none(tmp_path: Path) -> None:
    good = record(tmp_path / "good 我.wav", 2.0, seed=1)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "words.wav").write_text("not audio " * 50)
    truncated = tmp_path / "cut.wav"
    truncated.write_bytes(Path(record(tmp_path / "whole.wav", 3.0, seed=2)).read_bytes()[:30_000])
    nan = np.full(SAMPLE_RATE, np.nan, np.float32)
    soundfile.write(tmp_path / "nan.wav", nan, SAMPLE_RATE, subtype="FLOAT")
    audio = [
        (good, "hello"),
        (str(tmp_path / "not there.wav"), "x"),
        (str(tmp_path / "empty.wav"), "x"),
        (str(tmp_path / "words.wav"), "x"),
        (str(truncated), "x"),
        (str(tmp_path / "nan.wav"), "x"),
        (record(tmp_path / "long.wav", 31, seed=7), "x"),
        (record(tmp_path / "short.wav", 0.05, seed=8), "x"),
        (record(tmp_path / "silent.wav", level=0.0005, seed=9), "x"),
        (record(tmp_path / "soft.wav", level=0.005, seed=10), "x"),
        (record(tmp_path / "loud.wav", level=4.0, seed=11), "x"),
        (record(tmp_path / "normalised.wav", level=1.0, seed=12), "x"),
        (record(tmp_path / "noise.wav", seed=13), ""),
        (record(tmp_path / "quiet room.wav", level=0.0, seed=14), ""),
        (record(tmp_path / "8k.flac", seed=15, rate=8000), "字" * 10_000),
    ]
    rows = [Utterance(path, text, number) for number, (path, text) in enumerate(audio, 1)]
    rows.append(Utterance(good, "y", 16, start=2.5))
    rows.append(Utterance(good, "y", 17, start=1.0, end=4.0))
    ticks: list[int] = []
    report = check(rows, workers=2, progress=ticks.append, count_tokens=len)
    assert kinds(report) == {
        (2, "missing", "lost"),
        (3, "unreadable", "lost"),
        (4, "unreadable", "lost"),
        (5, "unreadable", "lost"),
        (6, "unreadable", "lost"),
        (7, "too_long", "lost"),
        (8, "too_short", "lost"),
        (9, "silent", "lost"),
        (11, "clipped", "warning"),
        (13, "empty_text", "warning"),
        (14, "empty_text", "warning"),
        (15, "label_too_long", "lost"),
        (16, "past_end", "lost"),
        (17, "past_end", "lost"),
    }
    assert [row.row for row in report.utterances] == [1, 10, 11, 12, 13, 14]
    assert report.utterances[0].duration == 2.0
    assert report.loses_rows and sum(ticks) == len(rows)


def test_a_long_text_is_only_suspected_without_a_tokenizer(tmp_path: Path) -> None:
    rows = [Utterance(record(tmp_path / "a.wav"), "字" * 147, 1)]
    assert kinds(check(rows)) == {(1, "label_too_long", "warning")}
    assert kinds(check(rows, count_tokens=lambda text: 448)) == set()
    assert kinds(check(rows, count_tokens=lambda text: 449)) == {(1, "label_too_long", "lost")}
    assert kinds(check([dataclasses.replace(rows[0], text="字" * 146)])) == set()


def test_duplicates_are_told_apart_from_spans_and_from_contradictions(tmp_path: Path) -> None:
    audio = record(tmp_path / "a.wav", 4)
    copy = tmp_path / "b.flac"
    soundfile.write(copy, *soundfile.read(audio, dtype="int16"))
    rows = [
        Utterance(audio, "one", 1),
        Utterance(audio, "One!", 2),
        Utterance(audio, "two", 3),
        Utterance(str(copy), "one", 4),
        Utterance(audio, "half", 5, end=2.0),
        Utterance(audio, "other half", 6, start=2.0),
    ]
    report = check(rows)
    assert kinds(report) == {
        (2, "duplicate_row", "warning"),
        (3, "duplicate_row", "warning"),
        (4, "duplicate_audio", "warning"),
    }
    assert "another text: “one”, here “two”" in report.problems[1].message
    assert not report.loses_rows


def test_a_recording_in_validation_too_is_lost_and_a_sentence_is_a_warning(tmp_path: Path) -> None:
    audio = [record(tmp_path / f"{n}.wav", seed=n) for n in range(4)]
    renamed = tmp_path / "renamed.wav"
    renamed.write_bytes(Path(audio[1]).read_bytes())
    train = [
        Utterance(path, text, n) for n, (path, text) in enumerate(zip(audio, ["a", "b", "Same.", "d"], strict=True), 1)
    ]
    other = [Utterance(audio[0], "a", 1), Utterance(str(renamed), "z", 2), Utterance("gone.wav", "same", 3)]
    report = check(train, other=other)
    assert kinds(report) == {
        (1, "audio_in_validation", "lost"),
        (2, "audio_in_validation", "lost"),
        (3, "sentence_in_validation", "warning"),
    }


def test_the_fixed_list_has_the_usable_rows_and_the_other_says_why(tmp_path: Path) -> None:
    record(tmp_path / "data" / "a.wav")
    labels = tmp_path / "data" / "labels.json"
    labels.write_text('[{"audio": "a.wav", "text": "我"}, {"audio": "b.wav", "text": "想"}]', encoding="utf-8")
    before = labels.read_bytes()
    report = check(load_manifest(labels).utterances)
    manifest, left_out = write_fixed(report, tmp_path / "clean")
    assert [(row.text, row.duration) for row in load_manifest(manifest).utterances] == [("我", 1.0)]
    with left_out.open(encoding="utf-8-sig", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["row"], row["text"]) == ("2", "想") and "no such file" in row["why"]
    assert labels.read_bytes() == before
    assert load_manifest(tmp_path / "clean").path == manifest
    with pytest.raises(DataError, match="not overwritten"):
        write_fixed(report, tmp_path / "clean")
    with pytest.raises(DataError, match="not overwritten"):
        write_fixed(report, labels)


def test_the_table_names_first_rows_of_each_kind_and_survives_brackets_in_names(tmp_path: Path) -> None:
    rows = [Utterance(str(tmp_path / f"[red]{n}[b].wav"), "x", n) for n in range(1, 30)]
    rows.append(Utterance(record(tmp_path / "a.wav", 5), "x", 30, speaker="[p1]", language="zh"))
    screen = io.StringIO()
    Console(width=100, file=screen).print(format_report(check(rows)))
    text = screen.getvalue()
    assert "file not there × 29" in text and "[red]1[b].wav" in text and "26 more" in text
    assert "1 of 30 rows can be used" in text and "[p1] 1" in text and "29 of 30 rows would be lost" in text


def test_durations_come_from_headers_and_all_bad_files_are_listed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_decoding(*_args: object, **_options: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(check_module, "read_audio", no_decoding)
    audio = record(tmp_path / "a.flac", 3.0)
    rows = [Utterance(audio, "x", 1), Utterance(audio, "x", 2, start=1.0, end=2.5), Utterance(audio, "x", 3, start=2.0)]
    assert [row.duration for row in probe_durations(rows)] == [3.0, 1.5, 1.0]
    gone = [Utterance(f"/nowhere/{n}.wav", "x", n) for n in range(30)]
    with pytest.raises(DataError) as caught:
        probe_durations([*rows, Utterance(audio, "x", 99, start=9.0), *gone])
    message = str(caught.value)
    assert "31 of 34" in message and "row 99: " in message and "row 18: /nowhere/18.wav" in message
    assert message.endswith("11 more") and message.count("\n") == 21


def test_no_more_clips_than_threads_are_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most = 0
    lock = threading.Lock()

    def read(path: str, *_args: object, **_options: object) -> np.ndarray:  # type: ignore[type-arg]
        nonlocal most
        samples = np.full(1600, 0.1, np.float32)
        with lock:
            number = len(numbers)
            numbers.append(number)
            alive.add(number)
            most = max(most, len(alive))
        weakref.finalize(samples, alive.discard, number)
        return samples

    numbers: list[int] = []
    monkeypatch.setattr(check_module, "read_audio", read)
    audio = record(tmp_path / "a.wav")
    check([Utterance(audio, "x", n) for n in range(200)], workers=3)
    assert len(numbers) == 200 and not alive and 1 <= most <= 4


@pytest.mark.parametrize("folder", ["torgo", "fsdd", "mandarin_hsk"])
def test_real_speech_is_not_lost_however_soft_or_dysarthric(folder: str) -> None:
    if not (SHARED / "data" / folder).is_dir():
        pytest.skip("the recordings for trying things out are not beside this checkout")
    rows = load_manifest(SHARED / "data" / folder).utterances[:100]
    assert [problem.message for problem in check(rows).problems if problem.severity == "lost"] == []
