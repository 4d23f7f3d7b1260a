"""Chinese in the script that was asked for, by OpenCC; times and word borders stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from resonance.transcribe.recognizer import TimedText, Word
from resonance.transcribe.result import FileResult

Script = Literal["simplified", "traditional", "taiwan", "hongkong"]
# OpenCC's tables of characters, not those that put another region's words in the place of what was said (s2twp).
TABLES = {"simplified": "t2s", "traditional": "s2t", "taiwan": "s2tw", "hongkong": "s2hk"}
CHINESE = ("zh", "yue")  # the kanji of Japanese are left alone


def script_converter(script: Script | None) -> Callable[[FileResult], FileResult]:
    """The function that writes the Chinese of a result in `script`; without one, every result stays as it is."""
    if script is None:
        return lambda result: result
    from opencc import OpenCC

    convert: Callable[[str], str] = OpenCC(TABLES[script]).convert

    def in_script(result: FileResult) -> FileResult:
        if result.language not in CHINESE:
            return result
        return replace(
            result,
            text=convert(result.text),
            segments=tuple(_segment(part, convert) for part in result.segments),
            left_out=tuple(_segment(part, convert) for part in result.left_out),
        )

    return in_script


def _segment(segment: TimedText, convert: Callable[[str], str]) -> TimedText:
    """Converted as a whole, because a character's form depends on its neighbours (头发, 发现); its words are cut from that."""
    joined = "".join(word.text for word in segment.words)
    whole = convert(joined)
    if len(whole) != len(joined):
        words = [convert(word.text) for word in segment.words]
    else:
        words, start = [], 0
        for word in segment.words:
            words.append(whole[start : start + len(word.text)])
            start += len(word.text)
    return replace(segment, text=convert(segment.text), words=tuple(map(_with_text, segment.words, words)))


def _with_text(word: Word, text: str) -> Word:
    return replace(word, text=text)
