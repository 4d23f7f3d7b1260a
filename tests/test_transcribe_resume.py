"""The real command, killed with SIGKILL and started again, alone and as one of two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import forked
from resonance.cli import run

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
    pytest.mark.usefixtures("short_answers"),
]
COUNT = 44


@pytest.fixture
def audio(recordings_in: Callable[[Path, int], Path], tmp_path: Path) -> list[Path]:
    labels = recordings_in(tmp_path / "recordings", COUNT)
    return sorted((labels.parent / "audio").iterdir())


def command(model: Path, audio: list[Path], tmp_path: Path, *flags: object) -> list[str]:
    (tmp_path / "list.txt").write_text("\n".join(map(str, audio)))
    flags = (
        "--audio_list",
        tmp_path / "list.txt",
        "--language=en",
        "--batch_size=1",
        "--audio_context=2",
        *flags,
        "--skip_nonspeech=False",
    )
    return ["transcribe", "--model_path", str(model), *map(str, flags)]


class Started:
    """`resonance ARGUMENTS` in the background."""

    def __init__(self, arguments: list[str], rank: int | None = None, world: int = 2) -> None:
        place = {} if rank is None else {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
        self.out, self.err = folder / "out", folder / "err"
        command = ["-m", "resonance", *arguments]
        self.process = forked.Forked(command, out=self.out, errors=self.err, environment={**os.environ, **place})

    def end(self) -> tuple[int, str, str]:
        """Exit code, and what was printed."""
        code = self.process.wait(timeout=120)
        return code, self.out.read_text(encoding="utf-8"), self.err.read_text(encoding="utf-8")


def complaints(err: str) -> list[str]:
    """What stderr has besides how far it is, which is said where it takes more than a second."""
    return [line for line in err.splitlines() if " s of audio in 1 s" not in line]


def kill_when(started: Started, journal: Path) -> list[str]:
    """SIGKILL once `journal` has rows. Returns the recordings in it."""
    until = time.monotonic() + 120
    while not (journal.is_file() and journal.stat().st_size):
        assert started.process.poll() is None and time.monotonic() < until, started.end()
        time.sleep(0.002)
    started.process.kill()
    assert started.process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line)["audio_path"] for line in lines if line.endswith("\n")]


@pytest.mark.parametrize(
    ("flags", "journal"),
    [
        (("--output_file", "out/x.jsonl"), "out/x.jsonl"),
        (("--output_file", "out/x.json"), "out/x.json.part.jsonl"),
        (("--output_dir", "out", "--output_format", "srt,json"), "out/.resonance-transcribe.part.jsonl"),
    ],
    ids=["JSON lines", "JSON", "folder"],
)
def test_killed_at_any_moment_a_run_loses_only_what_was_under_way(
    flags: tuple[str, ...],
    journal: str,
    tiny_model: Path,
    audio: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command(tiny_model, audio, tmp_path, *flags)
    done = kill_when(Started(arguments), Path(journal))
    assert 0 < len(done) < COUNT
    for path in done:  # whatever is transcribed again would be missed now
        Path(path).unlink()
    assert run(arguments) == 0
    assert complaints(capsys.readouterr().err) == []
    if journal.startswith("out/."):
        names = {path.name for path in Path("out").iterdir() if not path.name.startswith(".")}
        assert names == {f"{path.stem}.{form}" for path in audio for form in ("srt", "json")}
    else:
        text = Path(flags[1]).read_text(encoding="utf-8")
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
        assert [row["audio_path"] for row in rows] == [str(path) for path in audio]
        assert all("text" in row for row in rows)
    shutil.rmtree(audio[0].parent)
    assert run(arguments) == 0  # nothing is left to do


def test_two_processes_share_the_work_and_one_that_was_killed_is_started_again(
    tiny_model: Path, audio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command(tiny_model, audio, tmp_path, "--output_file", "out/x.json")
    first, second = Started(arguments, 0), Started(arguments, 1)
    done = kill_when(first, Path("out/x.json.rank0-of-2.jsonl"))
    assert set(done) <= {str(path) for path in audio[0::2]} and len(done) < COUNT // 2
    code, out, err = second.end()
    assert (code, out, complaints(err)) == (0, "", [])
    assert not Path("out/x.json").exists()
    for path in [*done, *audio[1::2]]:
        Path(path).unlink()
    code, out, err = Started(arguments, 0).end()
    assert (code, complaints(err)) == (0, []) and f"{COUNT} texts" in out
    rows = json.loads(Path("out/x.json").read_text(encoding="utf-8"))
    assert [row["audio_path"] for row in rows] == [str(path) for path in audio]
    assert {path.name for path in Path("out").iterdir()} == {"x.json", ".x.json.settings.json"}
