"""What goes wrong with recordings, lists and disks: where, what and what to do, an exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from resonance.cli import run
from resonance.model.runs import RunFolder

pytestmark = pytest.mark.usefixtures("short_answers")
Train = Callable[..., int]
Capture = pytest.CaptureFixture[str]

STRANGE_NAMES = ("with space.wav", 'quote\'s "two".wav', "smile 😀 [b].wav", "001_我想喝水.wav", "-rf.wav")
# File name to a part of what must be said about it.
BAD_FILES = {
    "missing.wav": "no such file",
    "empty.wav": "empty",
    "cut off.wav": "cut off",
    "text.wav": "not",
    "nan.wav": "NaN",
}
FOUND_BY_DECODING = {"nan.wav"}


def tone(seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * 300 * np.arange(int(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recordings that are right but unusual, and below `bad/` of ones that cannot be used."""
    folder = tmp_path_factory.mktemp("odd")
    for name in STRANGE_NAMES:
        soundfile.write(folder / name, tone(0.5), 16_000)
    soundfile.write(folder / "eight channels.wav", tone(0.5, channels=8), 16_000)
    soundfile.write(folder / "192 kHz.wav", tone(0.5, rate=192_000), 192_000)
    bad = folder / "bad"
    bad.mkdir()
    (bad / "empty.wav").touch()
    (bad / "text.wav").write_text("this is no sound\n" * 100)
    soundfile.write(bad / "whole.wav", tone(1.0), 16_000)
    (bad / "cut off.wav").write_bytes((bad / "whole.wav").read_bytes()[:9_000])
    (bad / "whole.wav").unlink()
    nan = tone(0.5)
    nan[4_000] = np.nan
    soundfile.write(bad / "nan.wav", nan, 16_000, subtype="FLOAT")
    return folder


def manifest(path: Path, audio: list[Path]) -> Path:
    rows = [{"audio": str(file), "text": f"phrase {i}"} for i, file in enumerate(audio)]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def good_files(odd: Path) -> list[Path]:
    return sorted(path for path in odd.iterdir() if path.is_file())


def said_about(text: str, names: Iterator[str] | list[str] | set[str]) -> None:
    for name in names:
        lines = [line for line in text.splitlines() if name in line]
        assert any(BAD_FILES[name].lower() in line.lower() for line in lines), (name, text)
    assert "Traceback" not in text


def test_training_names_every_file_that_cannot_be_used_and_leaves_no_run(
    odd: Path, tmp_path: Path, train: Train, capsys: Capture
) -> None:
    names = [name for name in BAD_FILES if name not in FOUND_BY_DECODING]
    labels = manifest(tmp_path / "labels.json", [*good_files(odd), *(odd / "bad" / name for name in names)])
    assert train(labels, tmp_path / "run") == 1
    said_about(capsys.readouterr().err, names)
    assert train(manifest(labels, good_files(odd)), tmp_path / "run", "--max_steps=1", "--eval_steps=1") == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_deep_inside_a_recording_stops_training_with_its_name(
    workers: int, odd: Path, tmp_path: Path, train: Train, capsys: Capture
) -> None:
    labels = manifest(tmp_path / "labels.json", [odd / "bad" / "nan.wav"])
    flags = ("--validation_split=0", "--eval_strategy=no", f"--dataloader_num_workers={workers}")
    assert train(labels, tmp_path / "run", *flags) == 1
    said = capsys.readouterr().err
    said_about(said, FOUND_BY_DECODING)
    assert said.count("\n") == 1


def test_data_check_judges_each_row_and_writes_a_list_that_trains(
    odd: Path, tmp_path: Path, train: Train, capsys: Capture
) -> None:
    good = good_files(odd)
    labels = manifest(tmp_path / "labels.json", [*good, *(odd / "bad" / name for name in BAD_FILES)])
    fixed = tmp_path / "fixed.json"
    assert run(["data", "check", str(labels), "--fix", str(fixed)]) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err and str(fixed) in said.out
    assert [row["audio"] for row in json.loads(fixed.read_text())] == [str(path) for path in good]
    left_out = (tmp_path / "fixed.left_out.csv").read_text(encoding="utf-8-sig")
    said_about(left_out, set(BAD_FILES))
    assert train(fixed, tmp_path / "run", "--max_steps=1", "--eval_steps=1") == 0


def test_transcribe_answers_in_order_and_a_bad_file_stops_no_other(
    odd: Path, tmp_path: Path, tiny_model: Path, capsys: Capture
) -> None:
    files = good_files(odd)
    for place, name in enumerate(BAD_FILES):
        files.insert(2 * place, odd / "bad" / name)
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)), encoding="utf-8")
    command = ["transcribe", "--model_path", str(tiny_model), "--audio_list", str(tmp_path / "list.txt")]
    out = tmp_path / "texts.json"
    assert run([*command, "--language=en", "--output_file", str(out)]) == 1
    said_about(capsys.readouterr().err, set(BAD_FILES))
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [row["audio_path"] for row in rows] == [str(path) for path in files]
    assert [Path(row["audio_path"]).name in BAD_FILES for row in rows] == ["error" in row for row in rows]
    assert all(row["duration"] == 0.5 for row in rows if "error" not in row)


def test_evaluate_says_which_row_cannot_be_heard(
    odd: Path, tmp_path: Path, finished_run: Path, capsys: Capture
) -> None:
    labels = manifest(tmp_path / "labels.json", [good_files(odd)[0], odd / "bad" / "nan.wav"])
    command = ["evaluate", "--model_path", str(finished_run), "--output_dir", str(tmp_path / "out")]
    assert run([*command, "--test_file", str(labels)]) == 1
    said = capsys.readouterr().err
    said_about(said, FOUND_BY_DECODING)
    assert "row 2" in said
    assert list((tmp_path / "out").iterdir()) == []


def commands(path: Path, tiny_model: Path, out: Path) -> dict[str, list[str]]:
    return {
        "train": [
            "train",
            "--train_file",
            str(path),
            "--model_name_or_path",
            str(tiny_model),
            "--output_dir",
            str(out),
        ],
        "evaluate": ["evaluate", "--test_file", str(path), "--model_path", str(tiny_model), "--output_dir", str(out)],
        "check": ["data", "check", str(path)],
        "split": ["data", "split", str(path), str(out)],
    }


@pytest.mark.parametrize("command", ["train", "evaluate", "check", "split"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such file"]),
        (b"", ["no rows"]),
        (b"[]", ["no rows"]),
        (b'[\n{"audio": "a.wav", "text": "x"},\n{"audio": oops}]', ["line 3", "column 11"]),
        ('[{"audio": "a.wav", "text": "我想喝水"}]'.encode("gbk"), ["GBK", "UTF-8"]),
        (b'[{"audio": "a.wav"}, {"text": "x"}]', ["row 1", "row 2", "no text", "no audio file"]),
    ],
    ids=["missing", "empty", "no rows", "broken JSON", "GBK", "fields missing"],
)
def test_a_manifest_that_cannot_be_used_is_explained(
    command: str, content: bytes | None, words: list[str], tmp_path: Path, tiny_model: Path, capsys: Capture
) -> None:
    path = tmp_path / "labels.json"
    if content is not None:
        path.write_bytes(content)
    assert run(commands(path, tiny_model, tmp_path / "out")[command]) == 1
    said = capsys.readouterr().err
    assert str(path) in said and "Traceback" not in said
    for word in words:
        assert word.lower() in said.lower(), said


def test_one_recording_trains_without_a_split_and_is_explained_with_one(
    tmp_path: Path, recordings: Callable[..., Path], train: Train, capsys: Capture
) -> None:
    labels = recordings(count=1)
    assert train(labels, tmp_path / "run") == 1
    assert "--validation_split 0" in capsys.readouterr().err
    assert train(labels, tmp_path / "run", "--validation_split=0", "--max_steps=1") == 0


def test_a_label_too_long_for_the_model_is_named_before_training(
    tmp_path: Path, recordings: Callable[..., Path], train: Train, tiny_model: Path, capsys: Capture
) -> None:
    labels = recordings(count=4)
    rows = json.loads(labels.read_text())
    rows[2]["text"] = "word " * 2_000
    labels.write_text(json.dumps(rows))
    assert train(labels, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert "row 3" in said.lower() and "448" in said and len(said) < 1_000
    assert run(["data", "check", str(labels), "--model_name_or_path", str(tiny_model)]) == 1
    assert "448" in capsys.readouterr().out
    assert run(["data", "check", str(labels)]) == 0  # a warning: without the model its tokens cannot be counted
    assert "448" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    tmp_path: Path, recordings: Callable[..., Path], train: Train, finished_run: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "run"
    assert train(recordings(), out) == 1
    assert str(out) in (said := capsys.readouterr().err) and "--output_dir" in said
    assert run(["evaluate", "--model_path", str(finished_run), "--output_dir", str(out)]) == 1
    assert str(out) in capsys.readouterr().err
    audio = finished_run.parent / "recordings" / "audio"
    command = ["transcribe", "--model_path", "never loaded", "--audio_path", str(audio), "--output_file"]
    assert run([*command, str(out)]) == 1
    assert str(out) in capsys.readouterr().err
    assert run([*command, str(tmp_path), "--output_format", "json"]) == 1  # a folder
    assert str(tmp_path) in capsys.readouterr().err
    command[-1] = "--output_dir"
    for place in (out, tmp_path / "file"):
        assert run([*command, str(place)]) == 1
        assert str(place) in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_without_permission_is_refused_before_the_work(
    tmp_path: Path, recordings: Callable[..., Path], train: Train, capsys: Capture
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert train(recordings(), locked / "run") == 1
    assert "Permission denied" in capsys.readouterr().err


def limit_file_size(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`after(owner, name, call, size)`: no file may grow beyond `size` bytes once `owner.name` was called so often.

    The kernel then refuses to write as it does on a full disk, with another reason.
    """
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(owner: Any, name: str, call: int, size: int) -> None:
        original = getattr(owner, name)
        calls = 0

        def limiting(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                limit_file_size(size)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, limiting)

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def release() -> None:
    limit_file_size(-1)


# The adapter's weights are 50 kB and stop at the first limit, the optimizer's state 100 kB and stops at the second.
@pytest.mark.parametrize("size", [20_000, 70_000, 700], ids=["weights", "optimizer", "log"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one_and_resume_goes_on(
    size: int,
    tmp_path: Path,
    recordings: Callable[..., Path],
    train: Train,
    after: Callable[..., None],
    capsys: Capture,
) -> None:
    from resonance.train.trainer import WhisperTrainer

    after(WhisperTrainer, "training_step", 3, size)
    folder = tmp_path / "run"
    assert train(recordings(), folder) == 1
    release()
    said = capsys.readouterr().err
    assert str(folder) in said and "--resume" in said and "Traceback" not in said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert RunFolder(folder).latest_checkpoint()
    assert run(["train", "--resume", "--output_dir", str(folder)]) == 0


def test_a_result_that_cannot_be_written_is_made_from_the_checkpoint_later(
    tmp_path: Path, recordings: Callable[..., Path], train: Train, after: Callable[..., None], capsys: Capture
) -> None:
    from resonance import finetune

    after(finetune, "describe", 1, 20_000)
    folder = tmp_path / "run"
    assert train(recordings(), folder) == 1
    release()
    said = capsys.readouterr().err
    assert str(folder / "adapter") in said and "--resume" in said
    assert not list(folder.glob("*adapter*")) and not list(folder.glob(".*part"))
    assert run(["train", "--resume", "--output_dir", str(folder)]) == 0


def test_a_report_and_texts_that_cannot_be_written_leave_what_was_there(
    tmp_path: Path, finished_run: Path, after: Callable[..., None], capsys: Capture
) -> None:
    from resonance.evaluate import evaluation
    from resonance.transcribe import sinks

    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("an older one")
    (out / "texts.json").write_text("older texts")
    after(evaluation, "write_report", 1, 500)
    assert run(["evaluate", "--model_path", str(finished_run), "--output_dir", str(out)]) == 1
    release()
    assert str(out / "report.html") in (said := capsys.readouterr().err) and "Traceback" not in said
    after(sinks, "write_text_atomic", 1, 500)
    audio = finished_run.parent / "recordings" / "audio"
    command = ["transcribe", "--model_path", str(finished_run), "--audio_path", str(audio)]
    command += ["--output_file", str(out / "texts.json")]
    assert run(command) == 1  # not ours, so not replaced
    assert str(out / "texts.json") in (said := capsys.readouterr().err) and "--overwrite" in said
    assert run([*command, "--overwrite"]) == 1
    release()
    assert str(out / "texts.json") in capsys.readouterr().err
    assert {
        path.name: path.read_text() for path in out.iterdir() if path.suffix != ".jsonl" and path.name[0] != "."
    } == {
        "report.html": "an older one",
        "texts.json": "older texts",
    }
    assert len((out / "texts.json.part.jsonl").read_text().splitlines()) == 12  # the work is not lost
    assert run(command) == 0
    assert "12 texts" in capsys.readouterr().out and len(json.loads((out / "texts.json").read_text())) == 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 900 kB, where the system lets us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=10)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts as Linux does")
def test_a_full_disk_is_named_and_the_checkpoints_before_it_are_whole(
    small_disk: Path, recordings: Callable[..., Path], train: Train, capsys: Capture
) -> None:
    folder = small_disk / "run"
    flags = (
        "--max_steps=20",
        "--eval_strategy=no",
        "--validation_split=0",
        "--save_steps=1",
        "--save_total_limit=none",
    )
    assert train(recordings(), folder, *flags) == 1
    said = capsys.readouterr().err
    assert (
        str(folder) in said
        and "Free some space" in said
        and "full" in said.lower() + "no space left"
        and "Traceback" not in said
    )
    latest = RunFolder(folder).latest_checkpoint()
    assert latest and latest.name == f"checkpoint-{len(list((folder / 'checkpoints').iterdir()))}"
