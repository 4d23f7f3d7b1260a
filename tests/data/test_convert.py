"""A folder of recordings becomes 16 kHz mono WAV files: resumable, nothing overwritten, failures named."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from resonance.data import convert
from resonance.data.convert import convert_folder, format_summary
from resonance.errors import DataError


def record(path: Path, seconds: float = 0.5, rate: int = 44_100) -> Path:
    """A stereo recording, OGG or FLAC whatever the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = 0.3 * np.sin(np.arange(round(seconds * rate)) / 20)
    soundfile.write(path, np.stack([tone, tone], 1), rate, format="OGG" if path.suffix == ".ogg" else "FLAC")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_keeps_its_names_and_bad_files_stop_no_other(tmp_path: Path, workers: int) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    record(source / "a" / "我想喝水.m4a")
    record(source / "b c" / "it's 😀.ogg")
    (source / "a" / "bad.wav").write_text("no sound")
    (source / "notes.txt").write_text("notes")
    (source / "a" / "._x.m4a").write_text("what macOS adds to archives")
    before = tree(source)

    summary = convert_folder(source, target, workers=workers)
    assert sorted(tree(target)) == ["a/我想喝水.wav", "b c/it's 😀.wav"]
    for path in target.rglob("*.wav"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype, info.frames) == (16_000, 1, "PCM_16", 8000)
    assert (summary.converted, summary.skipped, summary.ignored, len(summary.failed)) == (2, 0, 1, 1)
    assert summary.failed[0][0] == source / "a" / "bad.wav"
    assert str(source / "a" / "bad.wav") + ": this is a text file" in format_summary(summary)
    assert tree(source) == before


def test_a_second_run_does_only_what_is_missing_or_changed(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("kept", "changed", "missing"):
        record(source / f"{name}.flac")
    convert_folder(source, target)
    (target / "missing.wav").unlink()
    record(source / "changed.flac", seconds=1)
    later = time.time() + 10
    os.utime(source / "changed.flac", (later, later))
    kept = (target / "kept.wav").stat()

    summary = convert_folder(source, target)
    assert (summary.converted, summary.skipped) == (2, 1)
    assert (target / "kept.wav").stat().st_mtime_ns == kept.st_mtime_ns
    assert soundfile.info(target / "changed.wav").frames == 16_000
    assert convert_folder(source, target, overwrite=True).converted == 3


def test_recordings_that_differ_only_in_their_ending_are_all_kept(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("x.mp3", "x.M4A", "X.ogg", "x.mp3.flac", "y.ogg"):
        record(source / name)
    assert convert_folder(source, tmp_path / "out").converted == 5
    assert sorted(tree(tmp_path / "out")) == ["X.ogg.wav", "x.M4A.wav", "x.mp3.flac.wav", "x.mp3.wav", "y.wav"]


def test_labels_follow_their_recordings_and_are_never_overwritten_silently(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    record(source / "p1" / "audio" / "001_我想喝水.m4a")
    rows = [
        {"audio": "audio/001_我想喝水.m4a", "text": "我想喝水", "score": 1},
        {"audio": "/elsewhere/b.mp3", "text": "b"},
    ]
    (source / "p1" / "labels.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    (source / "labels.json").write_text('{"p1/audio/001_我想喝水.m4a": "我想喝水"}', encoding="utf-8")
    assert not convert_folder(source, target).failed
    written = json.loads((target / "p1" / "labels.json").read_text(encoding="utf-8"))
    assert written == [{**rows[0], "audio": "audio/001_我想喝水.wav"}, rows[1]]
    assert json.loads((target / "labels.json").read_text(encoding="utf-8")) == {"p1/audio/001_我想喝水.wav": "我想喝水"}

    assert not convert_folder(source, target).failed  # the same content again is no fault
    (target / "p1" / "labels.json").write_text("[]", encoding="utf-8")
    (source / "labels.json").write_text('{"a": 1,\n "b" 2}', encoding="utf-8")
    failed = dict(convert_folder(source, target).failed)
    assert "line 2, column 6" in failed[source / "labels.json"]
    assert "already there with other content" in failed[source / "p1" / "labels.json"]
    assert (target / "p1" / "labels.json").read_text(encoding="utf-8") == "[]"


def test_originals_are_never_replaced(tmp_path: Path) -> None:
    wav = tmp_path / "a" / "x.wav"
    record(wav.with_suffix(".flac")).rename(wav)
    before = tree(tmp_path)
    with pytest.raises(DataError, match="another output folder"):
        convert_folder(tmp_path / "a", tmp_path / "a" / ".." / "a")
    with pytest.raises(DataError, match="another output folder"):
        convert_folder(wav, tmp_path / "a")
    with pytest.raises(DataError, match="another output folder"):
        convert_folder(wav, wav, overwrite=True)
    assert tree(tmp_path) == before


def test_an_output_folder_inside_the_input_is_not_converted_again(tmp_path: Path) -> None:
    record(tmp_path / "x.flac")
    convert_folder(tmp_path, tmp_path / "wav")
    summary = convert_folder(tmp_path, tmp_path / "wav")
    assert (summary.converted, summary.skipped) == (0, 1)
    assert sorted(tree(tmp_path)) == ["wav/x.wav", "x.flac"]


def test_one_file_goes_into_a_folder_or_to_a_name(tmp_path: Path) -> None:
    path = record(tmp_path / "in" / "voice memo")
    convert_folder(path, tmp_path / "out")
    convert_folder(path, tmp_path / "out" / "other.wav")
    assert sorted(tree(tmp_path / "out")) == ["other.wav", "voice memo.wav"]


def test_nothing_to_convert_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        convert_folder(tmp_path / "none", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="no audio or video files"):
        convert_folder(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_output_that_cannot_be_written_stops_with_the_reason(tmp_path: Path, workers: int) -> None:
    for i in range(3):
        record(tmp_path / "in" / f"{i}.flac")
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"\.wav: cannot be written"):
        convert_folder(tmp_path / "in", tmp_path / "out", workers=workers)


def test_a_full_disk_stops_and_leaves_only_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        record(tmp_path / "in" / f"{i}.flac")
    room = iter([True, False])

    def fsync(_: int) -> None:
        if not next(room):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DataError, match=r"1\.wav: cannot be written \(No space left on device\)"):
        convert_folder(tmp_path / "in", tmp_path / "out")
    assert list(tree(tmp_path / "out")) == ["0.wav"]
    monkeypatch.undo()
    summary = convert_folder(tmp_path / "in", tmp_path / "out")
    assert (summary.converted, summary.skipped) == (2, 1)


def test_a_crashing_process_is_reported_for_what_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "in" / "a.flac")
    record(tmp_path / "in" / "b.flac")
    monkeypatch.setattr(convert, "_start_worker", functools.partial(os._exit, 1))
    summary = convert_folder(tmp_path / "in", tmp_path / "out", workers=2)
    assert summary.converted == 0
    assert [reason.split(": ")[1][:8] for _path, reason in summary.failed] == ["not done", "not done"]


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed in another way there")
def test_worker_processes_end_when_the_main_one_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, time, multiprocessing, concurrent.futures\n"
        "from resonance.data.convert import _start_worker\n"
        "if __name__ == '__main__':\n"
        "  pool = concurrent.futures.ProcessPoolExecutor(\n"
        "    1, multiprocessing.get_context('spawn'), initializer=_start_worker)\n"
        "  print(pool.submit(os.getpid).result(), flush=True)\n"
        "  time.sleep(60)\n"
    )
    (tmp_path / "main.py").write_text(program)
    main = subprocess.Popen([sys.executable, tmp_path / "main.py"], stdout=subprocess.PIPE, text=True)
    assert main.stdout is not None
    with main.stdout:
        worker = int(main.stdout.readline())
    main.kill()
    main.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the worker process is still there")
