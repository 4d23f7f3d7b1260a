"""What is finished stays finished: files for all and for each, other settings, full disks, several processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from resonance.config_types import OutputFormat
from resonance.errors import DataError
from resonance.ranks import Ranks
from resonance.transcribe.rows import Row
from resonance.transcribe.sinks import Folder, SharedFile
from resonance.transcribe.subtitles import Layout

SETTINGS: dict[str, Any] = {"task": None, "num_beams": 1}
PATHS = [Path(f"in/{name}.wav") for name in "abcde"]
Make = Callable[..., SharedFile | Folder]


def row(path: Path, text: str = "") -> Row:
    return {"audio_path": str(path), "text": text or path.stem, "language": "en", "duration": 1.0, "segments": []}


def failure(path: Path) -> Row:
    return {"audio_path": str(path), "error": f"{path}: damaged"}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Make]:
    """A function that opens an output in tmp_path/out: a file by its name, else the folder."""
    sinks: list[SharedFile | Folder] = []

    def make(
        name: str,
        formats: Sequence[OutputFormat],
        paths: Sequence[Path] = PATHS,
        mine: Ranks | None = None,
        settings: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> SharedFile | Folder:
        while sinks and mine is None:  # as if the process before had been killed
            sinks.pop().close()
        kind = SharedFile if name else Folder
        sink = kind(paths, tmp_path / "out" / name, formats, Layout(), mine or Ranks())
        sinks.append(sink)
        sink.claim(settings or SETTINGS, overwrite=overwrite)
        return sink

    yield make
    for sink in sinks:
        sink.close()


def texts(path: Path) -> list[str]:
    content = path.read_text(encoding="utf-8")
    rows = json.loads(content) if path.suffix == ".json" else [json.loads(line) for line in content.splitlines()]
    return [r.get("text", "error") for r in rows]


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_stopped_run_goes_on_with_what_is_left_and_the_order_is_the_list_s(
    name: str, opened: Make, tmp_path: Path
) -> None:
    form: OutputFormat = "jsonl" if name.endswith("l") else "json"
    sink = opened(name, [form])
    for path in (PATHS[3], PATHS[1]):
        sink.add(row(path))
    journal = tmp_path / "out" / ("x.jsonl" if form == "jsonl" else "x.json.part.jsonl")
    with journal.open("ab") as stream:
        stream.write(b'{"audio_path": "in/a.wav", "te')  # torn by a kill
    sink = opened(name, [form])
    assert sink.left() == [PATHS[0], PATHS[2], PATHS[4]]
    for path in sink.left():
        sink.add(row(path))
    assert sink.finish() == 0
    assert texts(tmp_path / "out" / name) == list("abcde") and visible(tmp_path / "out") == [name]
    again = opened(name, [form])
    assert again.left() == [] and again.finish() == 0


def test_what_failed_is_tried_again(opened: Make, tmp_path: Path) -> None:
    for name, form in (("x.json", "json"), ("x.jsonl", "jsonl"), ("x.txt", "txt")):
        sink = opened(name, [form])
        for path in PATHS:
            sink.add(failure(path) if path == PATHS[2] else row(path))
        assert sink.finish() == 1
        if form != "txt":
            assert texts(tmp_path / "out" / name) == ["a", "b", "error", "d", "e"]
        sink = opened(name, [form])
        assert sink.left() == [PATHS[2]]
        sink.add(row(PATHS[2]))
        assert sink.finish() == 0
        assert (tmp_path / "out" / name).read_text().count("c.wav") == 1
    assert visible(tmp_path / "out") == ["x.json", "x.jsonl", "x.txt"]


@pytest.mark.parametrize(("name", "form"), [("x.json", "json"), ("x.jsonl", "jsonl"), ("x.txt", "txt")])
def test_recordings_that_came_later_are_added_to_a_finished_file(
    name: str, form: OutputFormat, opened: Make, tmp_path: Path
) -> None:
    sink = opened(name, [form], PATHS[:3])
    for path in sink.left():
        sink.add(row(path))
    sink.finish()
    sink = opened(name, [form], PATHS[1:])
    assert sink.left() == PATHS[3:]
    for path in sink.left():
        sink.add(row(path))
    sink.finish()
    # JSON lines grow; another format is what was asked for.
    if form == "txt":
        assert (tmp_path / "out" / name).read_text() == "".join(f"{path}\t{path.stem}\n" for path in PATHS[1:])
    else:
        assert texts(tmp_path / "out" / name) == (list("abcde") if form == "jsonl" else list("bcde"))


def test_a_recording_that_is_named_twice_is_transcribed_once_and_written_twice(opened: Make, tmp_path: Path) -> None:
    for name, form in (("x.json", "json"), ("x.jsonl", "jsonl")):
        sink = opened(name, [form], [PATHS[0], PATHS[1], PATHS[0]])
        assert sink.left() == PATHS[:2]
        for path in sink.left():
            sink.add(row(path))
        sink.finish()
        assert texts(tmp_path / "out" / name) == ["a", "b", "a"]


def test_each_recording_has_its_files_and_one_that_went_missing_is_made_again(opened: Make, tmp_path: Path) -> None:
    sink = opened("", ["json", "vtt"])
    for path in PATHS:
        sink.add(failure(path) if path == PATHS[4] else row(path))
    assert sink.finish() == 1
    made = [f"{name}.{form}" for name in "abcd" for form in ("json", "vtt")]
    assert visible(tmp_path / "out") == made
    (tmp_path / "out" / "b.vtt").unlink()
    assert opened("", ["json", "vtt"]).left() == [PATHS[1], PATHS[4]]
    assert opened("", ["json", "srt"]).left() == PATHS  # another format


@pytest.mark.parametrize("other", ["day2/rec1.wav", "day2/REC1.wav", "day2/rec1.mp3"])
def test_the_text_of_another_recording_is_not_replaced_unasked(other: str, opened: Make, tmp_path: Path) -> None:
    first, second = Path("day1/rec1.wav"), Path(other)
    sink = opened("", ["json"], [first])
    sink.add(row(first, "one"))
    assert sink.finish() == 0
    with pytest.raises(DataError, match=r"day1.rec1\.wav.*day2.*--overwrite") as caught:
        opened("", ["json"], [Path("day2/new.wav"), second])
    assert second.name in str(caught.value)
    assert visible(tmp_path / "out") == ["rec1.json"] and text_in(tmp_path / "out" / "rec1.json") == "one"
    again = opened("", ["json"], [first])  # as if nothing had been tried
    assert again.left() == [] and again.finish() == 0

    sink = opened("", ["json"], [second], overwrite=True)
    assert sink.left() == [second]
    sink.add(row(second, "two"))
    sink.finish()
    with pytest.raises(DataError, match="day2"):
        opened("", ["json"], [first])


def text_in(path: Path) -> str:
    found = json.loads(path.read_text(encoding="utf-8"))["text"]
    assert isinstance(found, str)
    return found


def test_one_relative_path_in_two_folders_is_two_recordings_and_two_spellings_are_one(
    opened: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day in ("day1", "day2"):
        (tmp_path / day).mkdir()
    monkeypatch.chdir(tmp_path / "day1")
    sink = opened("", ["json"], [Path("rec1.wav")])
    sink.add(row(Path("rec1.wav")))
    sink.finish()
    for same in (Path("rec1.wav"), tmp_path / "day1" / "rec1.wav"):
        assert opened("", ["json"], [same]).left() == []
    monkeypatch.chdir(tmp_path / "day2")
    with pytest.raises(DataError, match="day2"):
        opened("", ["json"], [Path("rec1.wav")])


def test_a_recording_that_is_named_otherwise_now_is_written_under_its_new_name(opened: Make, tmp_path: Path) -> None:
    first, second = Path("day1/rec1.wav"), Path("day2/rec1.wav")
    sink = opened("", ["json"], [first])
    sink.add(row(first, "one"))
    sink.finish()
    sink = opened("", ["json"], [first, second])
    assert sink.left() == [first, second]
    for path, text in ((first, "one"), (second, "two")):
        sink.add(row(path, text))
    sink.finish()
    out = tmp_path / "out"
    assert [text_in(out / name) for name in ("rec1.json", "day1/rec1.json", "day2/rec1.json")] == ["one", "one", "two"]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", ""])
def test_a_text_with_an_error_counts_as_both(
    name: str, opened: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = opened(name, ["jsonl" if name.endswith("l") else "json"], PATHS[:3])
    sink.add(row(PATHS[0]))
    sink.add(row(PATHS[1]) | {"error": "cut off after 3 s"})
    sink.add(failure(PATHS[2]))
    assert sink.finish() == 2
    said = capsys.readouterr().out
    assert said == f"2 texts written to {tmp_path / 'out' / name}; 2 recordings have an error\n"


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", ""])
def test_other_settings_are_refused_by_name_and_overwriting_begins_anew(
    name: str, opened: Make, tmp_path: Path
) -> None:
    formats: list[OutputFormat] = ["jsonl"] if name.endswith("l") else ["json"]
    sink = opened(name, formats)
    for path in PATHS[:4]:
        sink.add(row(path))
    with pytest.raises(DataError, match=r"num_beams was 1, now 5.*--overwrite"):
        opened(name, formats, settings=SETTINGS | {"num_beams": 5})
    sink = opened(name, formats, settings=SETTINGS | {"num_beams": 5}, overwrite=True)
    assert sink.left() == PATHS
    sink.add(row(PATHS[0], "new"))
    sink = opened(name, formats, settings=SETTINGS | {"num_beams": 5})  # killed, and without overwrite now
    assert sink.left() == PATHS[1:]
    for path in sink.left():
        sink.add(row(path))
    sink.finish()
    if name:
        assert texts(tmp_path / "out" / name) == ["new", *"bcde"]
    else:
        assert json.loads((tmp_path / "out" / "a.json").read_text())["text"] == "new"


@pytest.mark.parametrize(("name", "there"), [("x.json", "x.json"), ("x.jsonl", "x.jsonl"), ("", "b.json")])
def test_what_somebody_else_wrote_is_not_replaced_unasked(name: str, there: str, opened: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / there).write_text("by hand")
    formats: list[OutputFormat] = ["jsonl"] if name.endswith("l") else ["json"]
    with pytest.raises(DataError) as caught:
        opened(name, formats)
    assert there in str(caught.value) and "--overwrite" in str(caught.value)
    assert (tmp_path / "out" / there).read_text() == "by hand"
    assert opened(name, formats, overwrite=True).left() == PATHS


def test_two_commands_do_not_write_one_output(opened: Make) -> None:
    opened("x.json", ["json"])
    with pytest.raises(DataError, match="Another process"):
        opened("x.json", ["json"], mine=Ranks())


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", ""])
def test_a_full_disk_keeps_what_was_finished(name: str, opened: Make, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    formats: list[OutputFormat] = ["jsonl"] if name.endswith("l") else ["json"]
    sink = opened(name, formats)
    for path in PATHS[:3]:
        sink.add(row(path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))  # the kernel refuses as on a full disk
        with pytest.raises(DataError, match="cannot be written"):
            sink.add(row(PATHS[3], "long " * 200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sink = opened(name, formats)
    assert sink.left() == PATHS[3:]
    for path in sink.left():
        sink.add(row(path))
    assert sink.finish() == 0


@pytest.mark.parametrize(("name", "form"), [("x.json", "json"), ("x.jsonl", "jsonl"), ("", "json")])
def test_processes_share_the_list_and_the_last_one_brings_it_together(
    name: str, form: OutputFormat, opened: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [opened(name, [form], mine=Ranks(rank, 3, launched=True)) for rank in range(3)]
    assert [sink.left() for sink in several] == [PATHS[0::3], PATHS[1::3], PATHS[2::3]]
    codes = {}
    for rank in (2, 0, 1):
        for path in several[rank].left():
            several[rank].add(failure(path) if path == PATHS[4] else row(path))
        codes[rank] = several[rank].finish()
        assert (tmp_path / "out" / (name or "a.json")).exists() == (rank == 1 if name else rank != 2)
    assert codes == {2: 0, 0: 0, 1: 1}  # who is last answers for all
    assert capsys.readouterr().out.count("4 texts") == 1
    if name:
        assert texts(tmp_path / "out" / name) == [*"abcd", "error"]
    # Gone on with by one process alone.
    for sink in several:
        sink.close()
    sink = opened(name, [form])
    assert sink.left() == [PATHS[4]]
    sink.add(row(PATHS[4]))
    assert sink.finish() == 0
    if name:
        assert texts(tmp_path / "out" / name) == list("abcde") and visible(tmp_path / "out") == [name]


def test_a_process_that_starts_again_does_the_rest_of_its_share_while_others_write(
    opened: Make, tmp_path: Path
) -> None:
    first, second = (opened("x.json", ["json"], mine=Ranks(rank, 2, launched=True)) for rank in range(2))
    first.add(row(PATHS[0]))
    second.add(row(PATHS[1]))
    first.close()  # killed
    first = opened("x.json", ["json"], mine=Ranks(0, 2, launched=True))
    assert first.left() == [PATHS[2], PATHS[4]]
    threads = [
        threading.Thread(target=finish, args=(sink, paths))
        for sink, paths in ((first, [PATHS[2], PATHS[4]]), (second, [PATHS[3]]))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts(tmp_path / "out" / "x.json") == list("abcde")


def finish(sink: SharedFile | Folder, paths: Sequence[Path]) -> None:
    for path in paths:
        sink.add(row(path))
    sink.finish()


def test_overwriting_in_several_processes_keeps_what_the_others_have_just_done(opened: Make, tmp_path: Path) -> None:
    sink = opened("x.json", ["json"])
    for path in PATHS:
        sink.add(row(path, "old"))
    sink.finish()
    sink.close()
    for rank in (0, 1):
        sink = opened("x.json", ["json"], mine=Ranks(rank, 2, launched=True), settings={"task": "x"}, overwrite=True)
        finish(sink, sink.left())
    assert texts(tmp_path / "out" / "x.json") == list("abcde")


def test_a_process_that_is_late_with_its_last_retry_is_merged_too(opened: Make, tmp_path: Path) -> None:
    """Its mark of the run before counts as long as it has not begun: others may finish without it."""
    ranks = [Ranks(rank, 2, launched=True) for rank in range(2)]
    second = opened("x.json", ["json"], mine=ranks[1])
    second.add(failure(PATHS[1]))
    second.add(row(PATHS[3]))
    second.finish()
    second.close()
    first = opened("x.json", ["json"], mine=ranks[0])
    finish(first, first.left())
    first.close()
    assert texts(tmp_path / "out" / "x.json") == ["a", "error", "c", "d", "e"]
    second, first = opened("x.json", ["json"], mine=ranks[1]), opened("x.json", ["json"], mine=ranks[0])
    assert first.left() == [] and second.left() == [PATHS[1]]
    first.finish()
    finish(second, [PATHS[1]])
    assert texts(tmp_path / "out" / "x.json") == list("abcde")
