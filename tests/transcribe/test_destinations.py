"""Where texts are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resonance.config_recognizer import TranscribeConfig
from resonance.errors import ConfigError
from resonance.transcribe.destinations import asked_times, chosen_formats, names, refuse_many_in_one, shared_files


def config(**given: Any) -> TranscribeConfig:
    return TranscribeConfig(model_path="m", audio_path=Path("a"), **given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"output_file": Path("x.srt")}, ["srt"]),
        ({"output_file": Path("x.JSONL")}, ["jsonl"]),
        ({"output_file": Path("texts")}, ["json"]),
        ({"output_file": Path("x.dat"), "output_format": ["tsv", "srt", "tsv"]}, ["tsv", "srt"]),
        ({"output_dir": Path("x")}, ["json"]),
    ],
)
def test_formats_are_those_given_or_what_the_name_says(given: dict[str, Any], expected: list[str]) -> None:
    assert chosen_formats(config(**given)) == expected


def test_a_suffix_that_is_no_format_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"\.docx is no format of ours.* txt, srt, vtt, tsv, json, jsonl"):
        chosen_formats(config(output_file=Path("a.docx")))


def test_subtitles_bring_their_times() -> None:
    assert asked_times(config(), ["json", "srt"]) == "segment"
    assert asked_times(config(return_timestamps="word"), ["srt"]) == "word"
    assert asked_times(config(), ["json", "txt"]) == "none"


def test_what_does_not_fit_into_one_place_is_refused() -> None:
    refuse_many_in_one(config(output_dir=Path("x")), ["srt", "vtt"], 5, 2)
    refuse_many_in_one(config(output_file=Path("x.srt")), ["srt"], 1, 1)
    for given, formats, count, world, words in (
        ({"output_file": Path("x.srt")}, ["srt"], 2, 1, "--output_dir"),
        ({}, ["vtt"], 2, 1, "--output_dir"),
        ({}, ["txt", "json"], 1, 1, "Several formats"),
        ({}, [], 5, 2, "Several processes"),
    ):
        with pytest.raises(ConfigError, match=words):
            refuse_many_in_one(config(**given), formats, count, world)  # type: ignore[arg-type]


def test_several_formats_share_the_stem_of_the_file() -> None:
    assert shared_files(Path("o/x.dat"), ["tsv"]) == {"tsv": Path("o/x.dat")}
    assert shared_files(Path("o/x.json"), ["json", "srt"]) == {"json": Path("o/x.json"), "srt": Path("o/x.srt")}
    assert shared_files(Path("o/v1.2"), ["json", "srt"]) == {"json": Path("o/v1.2.json"), "srt": Path("o/v1.2.srt")}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a/x.wav"], ["x"]),
        (["a/x.wav", "b/y.wav"], ["x", "y"]),
        (["a/x.wav", "b/x.wav", "b/c/y.wav"], ["a/x", "b/x", "b/c/y"]),
        (["a/x.wav", "a/b/x.wav"], ["x", "b/x"]),
        (["a/x.wav", "a/x.mp3", "a/y.mp3"], ["x.wav", "x.mp3", "y"]),
        (["a/x.wav", "a/X.wav"], ["x.wav", "X.wav (2)"]),  # disks of Windows and macOS take them for one
        (["x.mp3.wav", "x.mp3", "x.wav"], ["x.mp3", "x.mp3 (2)", "x.wav"]),
        (["a/x.wav", "a/../a/x.wav"], ["x", "x"]),
        ([".wav", "a.b.wav"], [".wav", "a.b"]),
    ],
)
def test_each_recording_has_a_place_of_its_own(given: list[str], expected: list[str]) -> None:
    found = names([Path(name) for name in given])
    assert [found[Path(name)] for name in given] == expected
