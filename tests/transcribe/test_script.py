"""Chinese in the script that was asked for."""

from __future__ import annotations

import pytest

from resonance.transcribe.recognizer import TimedText, Word
from resonance.transcribe.result import FileResult
from resonance.transcribe.script import Script, script_converter


def result(text: str, language: str | None = "zh", words: list[str] | None = None) -> FileResult:
    times = tuple(Word(i, i + 1.0, word, 0.5) for i, word in enumerate(words or []))
    return FileResult("a.wav", text, language, 3.0, (TimedText(0.0, 3.0, text, 0.5, times),), None)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("simplified", "我的头发，台湾说"),
        ("traditional", "我的頭髮，臺灣說"),
        ("taiwan", "我的頭髮，臺灣說"),
        ("hongkong", "我的頭髮，台灣説"),
    ],
)
def test_texts_segments_and_words_are_converted_by_their_neighbours(script: Script, expected: str) -> None:
    text = "我的头发，台湾说"
    for given in (text, "我的頭髮，臺灣說"):
        found = script_converter(script)(result(given, words=list(given)))
        assert (found.text, found.segments[0].text) == (expected, expected)
        assert [word.text for word in found.segments[0].words] == list(expected)  # 髮, not 發, for a single 发
    assert [word.start for word in found.segments[0].words] == [float(i) for i in range(len(text))]


def test_words_keep_their_borders_and_spaces() -> None:
    found = script_converter("traditional")(result("OK 谢谢 头发", words=["OK", " 谢谢", " 头发"]))
    assert [word.text for word in found.segments[0].words] == ["OK", " 謝謝", " 頭髮"]


@pytest.mark.parametrize("language", ["ja", "en", None])
def test_other_languages_are_left_alone(language: str | None) -> None:
    given = result("国会で説明した", language)
    assert script_converter("traditional")(given) is given
    assert script_converter(None)(given) is given
