"""Which files are transcribed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from resonance.errors import DataError
from resonance.transcribe.inputs import list_audio


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_gives_its_recordings_in_order_and_nothing_else(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.wav", "b/10.M4A", "a.flac", "notes.txt", "labels.json")
    assert list_audio(tmp_path, None) == [tmp_path / name for name in ("a.flac", "b/10.M4A", "b/2.wav")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("calls/*.mp3", ["calls/1.mp3", "calls/2.mp3"]),
        ("calls/**/*.mp3", ["calls/1.mp3", "calls/2.mp3", "calls/old/3.mp3"]),
        ("calls/?.*", ["calls/1.mp3", "calls/1.wav", "calls/2.mp3"]),  # no notes
        ("calls/[!1]*", ["calls/2.mp3"]),
        ("calls/*.dat", ["calls/odd.dat"]),  # asked for by its suffix
    ],
)
def test_a_pattern_gives_the_recordings_that_fit(pattern: str, expected: list[str], tmp_path: Path) -> None:
    touch(tmp_path, "calls/1.mp3", "calls/1.wav", "calls/2.mp3", "calls/old/3.mp3", "calls/3.txt", "calls/odd.dat")
    assert list_audio(tmp_path / pattern, None) == [tmp_path / name for name in expected]


def test_a_file_whose_name_looks_like_a_pattern_wins(tmp_path: Path) -> None:
    touch(tmp_path, "take [1].wav", "take 1.wav")
    assert list_audio(tmp_path / "take [1].wav", None) == [tmp_path / "take [1].wav"]


@pytest.mark.parametrize(
    "content",
    [
        "one.wav\n\n  sub/我想 喝水.wav  \nmissing.wav\n",
        "\ufeffone.wav\r\nsub/我想 喝水.wav\r\nmissing.wav",
        '["one.wav", "sub/我想 喝水.wav", "missing.wav"]',
        '[{"audio_path": "one.wav"}, {"audio": "sub/我想 喝水.wav", "text": "x"}, "missing.wav"]',
        '{"audio_path": "one.wav"}\n{"audio_path": "sub/我想 喝水.wav"}\n{"audio": "missing.wav"}\n',
    ],
    ids=["text", "Windows", "JSON", "JSON rows", "JSON lines"],
)
def test_a_list_is_read_beside_itself_in_its_order(content: str, tmp_path: Path) -> None:
    folder = touch(tmp_path / "lists", "one.wav", "sub/我想 喝水.wav")
    (folder / "list").write_text(content, encoding="utf-8", newline="")
    found = list_audio(None, folder / "list")
    assert found == [folder / "one.wav", folder / "sub" / "我想 喝水.wav", Path("missing.wav")]


def test_a_list_of_paths_may_begin_with_a_bracket_and_name_one_twice(tmp_path: Path) -> None:
    touch(tmp_path, "[old] a.wav")
    (tmp_path / "list").write_text("[old] a.wav\nb.wav\n[old] a.wav\n")
    assert list_audio(None, tmp_path / "list") == [tmp_path / "[old] a.wav", Path("b.wav"), tmp_path / "[old] a.wav"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("[]", "empty"),
        ('["a.wav",\n oops]', "line 2, column 2"),
        ("[1, 2]", "entry 1 names none"),
        ('["a.wav", {"audio_path": 5}]', "entry 2 names none"),
        ('[{"file": "a.wav"}]', "not a list of recordings"),
        ('{"a.wav": "text"}', "not a list of recordings"),
        ("gbk: 我".encode("gbk"), "UTF-8"),
    ],
)
def test_a_list_that_is_none_is_refused_with_its_name(content: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        list_audio(None, path)
    assert str(path) in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("name", ["missing.wav", "empty folder", "*.wav", "x" * 300])
def test_a_place_without_recordings_is_refused_before_a_model_is_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty folder").mkdir()
    with pytest.raises(DataError) as caught:
        list_audio(tmp_path / name, None)
    assert name in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes any byte in a name")
def test_names_that_are_no_utf_8_are_found(tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/\xff.wav"
    os.close(os.open(place, os.O_CREAT))
    (found,) = list_audio(tmp_path, None)
    assert os.fsencode(found) == place


def test_a_hundred_thousand_names_are_read_in_seconds_and_odd_ones_stop_none(tmp_path: Path) -> None:
    touch(tmp_path, "here.wav")
    names = [f"speaker/{i:06}.wav" for i in range(100_000)]
    names[5], names[6], names[7] = "here.wav", "x" * 300, "nul\0byte.wav"
    (tmp_path / "list.json").write_text(json.dumps(names))
    before = time.process_time()
    found = list_audio(None, tmp_path / "list.json")
    assert time.process_time() - before < 10  # 0.9 s measured
    assert len(found) == 100_000 and found[5] == tmp_path / "here.wav" and found[99_999] == Path(names[-1])
