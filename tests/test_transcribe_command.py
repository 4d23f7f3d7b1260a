"""`resonance transcribe` as its user sees it: what goes to the screen, to the file and into the exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forked import Forked
from resonance.cli import run

pytestmark = pytest.mark.usefixtures("short_answers")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def audio(finished_run: Path) -> list[Path]:
    return sorted((finished_run.parent / "recordings" / "audio").iterdir())


def transcribe(model: Path, *flags: object) -> int:
    """Tones are no speech: what the model makes of them is kept unless a test says otherwise."""
    return run(["transcribe", "--model_path", str(model), "--skip_nonspeech=False", *map(str, flags)])


def test_one_recording_prints_its_text_alone_and_several_with_their_names(
    finished_run: Path, audio: list[Path], capsys: Capture
) -> None:
    assert transcribe(finished_run, "--audio_path", audio[0]) == 0
    alone = capsys.readouterr()
    assert alone.err == "" and alone.out.endswith("\n")
    assert transcribe(finished_run / "adapter", "--audio_path", audio[0].parent, "--batch_size", 5) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("\t")[0] for row in rows] == [str(path) for path in audio]
    assert rows[0] == f"{audio[0]}\t{alone.out.rstrip(chr(10))}"


def test_the_output_file_has_every_recording_in_the_order_of_the_list(
    finished_run: Path, audio: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    wanted = [str(audio[i]) for i in (3, 0, 2)]
    (tmp_path / "list.json").write_text(json.dumps(wanted))
    out = tmp_path / "new" / "我的 texts.json"
    flags = ("--audio_list", tmp_path / "list.json", "--output_file", out, "--return_timestamps")
    assert transcribe(finished_run, *flags) == 0
    assert str(out) in capsys.readouterr().out
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [row["audio_path"] for row in rows] == wanted
    assert all(set(row) >= {"audio_path", "text", "language", "duration", "segments"} for row in rows)
    assert all(0 <= s["start"] <= s["end"] <= row["duration"] + 0.01 for row in rows for s in row["segments"])
    # Beside it only the record of model and settings, which the next run looks at.
    assert {path.name for path in out.parent.iterdir()} == {out.name, f".{out.name}.settings.json"}


def test_texts_of_another_model_are_not_taken_for_this_one_s(
    finished_run: Path, tiny_model: Path, audio: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    flags = ("--audio_path", audio[0], "--language", "en", "--output_file", tmp_path / "x.json")
    assert transcribe(finished_run, *flags) == 0
    tuned = (tmp_path / "x.json").read_text()
    assert transcribe(finished_run / "adapter", *flags, "--batch_size", 1) == 0  # the same by another name
    assert transcribe(tiny_model, *flags) == 1
    said = capsys.readouterr().err
    assert "model_path was" in said and str(tiny_model) in said and "--overwrite" in said
    assert (tmp_path / "x.json").read_text() == tuned
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", ".x.json.settings.json"}
    assert transcribe(tiny_model, *flags, "--overwrite") == 0
    capsys.readouterr()
    assert transcribe(tiny_model, *flags) == 0 and "has all 1 texts" in capsys.readouterr().out
    assert transcribe(finished_run, *flags) == 1


def test_subtitles_are_laid_out_anew_without_transcribing_again(
    finished_run: Path, audio: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    shutil.copy(audio[0], tmp_path / "talk.wav")
    flags = ("--audio_path", tmp_path / "talk.wav", "--output_file", tmp_path / "talk.srt", "--max_line_length")
    assert transcribe(finished_run, *flags, 42) == 0
    first = (tmp_path / "talk.srt").read_text(encoding="utf-8")
    (tmp_path / "talk.wav").write_bytes(b"gone")
    assert transcribe(finished_run, *flags, 8) == 0
    assert (tmp_path / "talk.srt").read_text(encoding="utf-8") != first
    assert transcribe(finished_run, *flags, 42) == 0
    assert (tmp_path / "talk.srt").read_text(encoding="utf-8") == first


def test_each_recording_has_a_file_in_each_format(
    finished_run: Path, audio: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    for folder in ("mon", "tue"):
        (tmp_path / "calls" / folder).mkdir(parents=True)
        shutil.copy(audio[0], tmp_path / "calls" / folder / "call.wav")
    flags = ("--audio_path", tmp_path / "calls" / "**" / "*.wav", "--output_dir", tmp_path / "out")
    assert transcribe(finished_run, *flags, "--output_format", "txt,srt,vtt,tsv,json,jsonl") == 0
    assert f"2 texts written to {tmp_path / 'out'}" in capsys.readouterr().out
    made = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*") if path.name[0] != "."
    }
    assert made == {
        f"{day}/call.{form}" for day in ("mon", "tue") for form in ("txt", "srt", "vtt", "tsv", "json", "jsonl")
    }
    row = json.loads((tmp_path / "out" / "mon" / "call.json").read_text(encoding="utf-8"))
    assert row == json.loads((tmp_path / "out" / "mon" / "call.jsonl").read_text(encoding="utf-8"))
    assert row["audio_path"] == str(tmp_path / "calls" / "mon" / "call.wav") and row["segments"]
    assert (tmp_path / "out" / "mon" / "call.vtt").read_text(encoding="utf-8").startswith("WEBVTT\n\n00:00:0")


def test_text_beside_subtitles_is_one_line_unless_times_are_asked_for(
    finished_run: Path, audio: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    flags = ("--audio_path", audio[0], "--output_format", "txt,srt")
    for place in (("--output_dir", tmp_path / "folder"), ("--output_file", tmp_path / "x.txt")):
        assert transcribe(finished_run, *flags, *place) == 0
    one = tmp_path / "folder" / f"{audio[0].stem}.txt"
    assert one.read_text(encoding="utf-8").count("\n") == 1
    assert (tmp_path / "x.txt").read_text(encoding="utf-8") == one.read_text(encoding="utf-8")
    # A folder keeps texts, not rows: it cannot be written in lines without its recordings.
    assert transcribe(finished_run, *flags, "--output_dir", tmp_path / "folder", "--return_timestamps") == 1
    assert "return_timestamps was none, now segment" in capsys.readouterr().err
    assert transcribe(finished_run, *flags, "--output_file", tmp_path / "x.txt", "--return_timestamps") == 0


@pytest.mark.parametrize("form", ["txt", "tsv", "json", "jsonl"])
def test_a_format_without_a_file_is_printed(
    form: str, finished_run: Path, audio: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    assert transcribe(finished_run, "--audio_path", audio[0].parent, "--output_format", form) == 0
    printed = capsys.readouterr().out
    out = tmp_path / f"x.{form}"
    assert transcribe(finished_run, "--audio_path", audio[0].parent, "--output_file", out) == 0
    assert printed == out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--output_file", "x.doc"), "txt, srt, vtt, tsv, json, jsonl"),
        (("--output_file", "x.srt"), "--output_dir"),
        (("--output_format", "vtt"), "--output_dir"),
        (("--output_format", "txt,json"), "Several formats"),
        (("--output_format", "pdf"), "one or several of txt, srt"),
        (("--output_file", "x.txt", "--output_dir", "out"), "either output_file"),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(
    flags: tuple[str, ...],
    words: str,
    audio: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert transcribe(Path("never loaded"), "--audio_path", audio[0].parent, *flags) == 2
    assert words in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_missing_recording_ends_with_1_and_the_other_s_text(
    finished_run: Path, audio: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "list.txt").write_text(f"gone.wav\n{audio[0]}\n")
    assert transcribe(finished_run, "--audio_list", tmp_path / "list.txt") == 1
    said = capsys.readouterr()
    assert said.out.startswith(str(audio[0])) and said.out.count("\n") == 1
    assert said.err.count("\n") == 1 and "gone.wav" in said.err and "no such file" in said.err


def test_an_unfinished_run_and_a_model_without_a_network_are_explained(
    finished_run: Path, audio: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    unfinished = tmp_path / "run"
    shutil.copytree(finished_run, unfinished, ignore=shutil.ignore_patterns("adapter"))
    assert transcribe(unfinished, "--audio_path", audio[0]) == 1
    assert "--resume" in capsys.readouterr().err
    assert transcribe(Path("openai/whisper-small"), "--audio_path", audio[0]) == 1
    said = capsys.readouterr().err
    assert "https://" in said and "--local-dir" in said and "Traceback" not in said


def test_nothing_is_printed_but_texts_when_libraries_are_loaded_afresh(finished_run: Path, audio: list[Path]) -> None:
    command = ["transcribe", "--model_path", str(finished_run), "--audio_path", str(audio[0])]
    done = subprocess.run(
        [sys.executable, "-m", "resonance", *command], capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("flags", [(), ("--output_format", "json")], ids=["plain", "json"])
def test_a_name_that_the_screen_cannot_write_is_escaped(
    flags: tuple[str, ...], finished_run: Path, audio: list[Path], tmp_path: Path
) -> None:
    for name in ("我.wav", "é.wav"):
        shutil.copy(audio[0], tmp_path / name)
    command = ["transcribe", "--model_path", str(finished_run), "--audio_path", str(tmp_path), *flags]
    out, errors = tmp_path / "out", tmp_path / "errors"
    screen = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = Forked(["-m", "resonance", *command], out=out, errors=errors, environment=screen)
    assert (done.wait(timeout=120), errors.read_text()) == (0, "")
    shown = out.read_text(encoding="cp1252")
    if flags:
        assert {Path(row["audio_path"]).name for row in json.loads(shown)} == {"我.wav", "é.wav"}
    else:
        assert "\\u6211.wav\t" in shown and "é.wav\t" in shown


def test_long_recordings_of_real_speech_are_read_to_their_end(
    shared: Path, real_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The same word three times with pauses between, 66 s: each window must bring its part."""
    import numpy as np
    import soundfile

    word, rate = soundfile.read(shared / "data" / "torgo" / "audio" / "M03_Session2_0009.flac")
    silence = np.zeros(20 * rate)
    soundfile.write(tmp_path / "long.flac", np.concatenate([word, silence, word, silence, silence, word]), rate)
    assert (
        transcribe(
            real_model,
            "--audio_path",
            tmp_path / "long.flac",
            "--language",
            "en",
            "--skip_nonspeech",
            "--max_window_seconds",
            15,
        )
        == 0
    )
    assert capsys.readouterr().out.lower().split().count("ship") == 3
