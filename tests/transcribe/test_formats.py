"""One row a recording, and what each format makes of it."""

from __future__ import annotations

import io
import json

import pytest

from resonance.config_types import OutputFormat
from resonance.transcribe.formats import render
from resonance.transcribe.recognizer import TimedText, Word
from resonance.transcribe.result import FileResult
from resonance.transcribe.rows import Row, as_json, encodable, printable, row_of
from resonance.transcribe.subtitles import Layout

HELLO = TimedText(0.0, 1.23456, "hello you", 0.5, (Word(0.0, 0.5, " hello", 0.25), Word(0.5, 1.23456, " you", 1.0)))
RESULT = FileResult("a.wav", "hello you", "en", 1.23456, (HELLO,), None)
BAD = FileResult("b.wav", "", None, 0.0, (), "b.wav: no such file")


def written(form: OutputFormat, rows: list[Row], several: bool = True) -> str:
    return "".join(render(form, rows, several=several, layout=Layout()))


def test_a_row_has_what_was_asked_for() -> None:
    plain = FileResult("a.wav", "hello", "en", 1.23456, (TimedText(0.0, 1.23456, "hello"),), None)
    assert row_of(plain, "none") == {"audio_path": "a.wav", "text": "hello", "language": "en", "duration": 1.235}
    assert row_of(plain, "segment")["segments"] == [{"start": 0.0, "end": 1.235, "text": "hello"}]
    assert row_of(RESULT, "none")["confidence"] == 0.5
    assert row_of(RESULT, "word")["segments"] == [
        {
            "start": 0.0,
            "end": 1.235,
            "text": "hello you",
            "confidence": 0.5,
            "words": [
                {"start": 0.0, "end": 0.5, "word": " hello", "confidence": 0.25},
                {"start": 0.5, "end": 1.235, "word": " you", "confidence": 1.0},
            ],
        }
    ]


def test_a_row_says_what_is_wrong_with_a_text() -> None:
    assert row_of(BAD, "segment") == {"audio_path": "b.wav", "error": "b.wav: no such file"}
    torn = FileResult(
        *("c.wav", "la la", "en", 9.0),
        (TimedText(0.0, 2.0, "la la", 0.9, repetitive=True),),
        "c.wav: damaged after 9.0 s",
        left_out=(TimedText(3.0, 5.0, "Thanks for watching."),),
        phrase="la",
        phrase_score=0.25,
    )
    row = row_of(torn, "segment")
    assert row["text"] == "la la" and row["error"] == "c.wav: damaged after 9.0 s"
    assert row["repetition"] is True and row["segments"][0]["repetition"] is True
    assert row["left_out"] == [{"start": 3.0, "end": 5.0, "text": "Thanks for watching."}]
    assert (row["phrase"], row["phrase_score"]) == ("la", 0.25)


def test_a_blank_segment_is_none() -> None:
    parts = (TimedText(0.0, 1.0, "a"), TimedText(1.0, 1.0, " "), TimedText(1.0, 2.0, ""))
    assert [s["text"] for s in row_of(FileResult("a.wav", "a", "en", 2.0, parts, None), "segment")["segments"]] == ["a"]


def test_confidence_of_a_recording_weighs_its_segments_by_their_length() -> None:
    parts = (TimedText(0, 1, "a" * 30, 0.9), TimedText(1, 2, "b" * 10, 0.1))
    row = row_of(FileResult("a.wav", "x", "en", 2.0, parts, None), "none")
    assert row["confidence"] == pytest.approx(0.9**0.75 * 0.1**0.25, abs=1e-4)


def test_json_is_a_list_and_json_lines_are_rows() -> None:
    rows = [row_of(RESULT, "word"), row_of(BAD, "word")]
    assert written("json", rows) == json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    assert json.loads(written("json", rows[:1], several=False)) == rows[0]
    assert [json.loads(line) for line in written("jsonl", rows).splitlines()] == rows


def test_tables_are_whisper_s_and_hold_a_tab_and_a_line_break_in_a_text() -> None:
    rows = [
        row_of(FileResult("a\tb.wav", "x", "en", 2.0, (TimedText(0.004, 1.5, "one\ttwo\nthree"),), None), "segment")
    ]
    assert written("tsv", rows, several=False) == "start\tend\ttext\n4\t1500\tone two three\n"
    assert (
        written("tsv", [*rows, row_of(BAD, "segment")])
        == "audio_path\tstart\tend\ttext\na\\tb.wav\t4\t1500\tone two three\n"
    )


def test_text_names_its_recording_where_there_are_several() -> None:
    rows = [row_of(RESULT, "none"), row_of(BAD, "none"), {"audio_path": "c.wav", "text": "two\nlines"}]
    assert written("txt", rows) == "a.wav\thello you\nc.wav\ttwo lines\n"
    assert written("txt", rows[:1], several=False) == "hello you\n"


def test_text_has_a_line_for_each_segment_only_where_that_was_asked_for() -> None:
    parts = (TimedText(0.0, 1.0, "One."), TimedText(1.0, 2.0, "Two."))
    row = row_of(FileResult("a.wav", "One. Two.", "en", 2.0, parts, None), "segment")
    assert written("txt", [row], several=False) == "One. Two.\n"
    layout = Layout(txt_segments=True)
    assert "".join(render("txt", [row], several=False, layout=layout)) == "One.\nTwo.\n"


def test_what_an_encoding_cannot_say_is_escaped_and_json_stays_json() -> None:
    latin = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    assert encodable("naïve", latin) == "naïve" and encodable("我 é", latin) == "\\u6211 é"
    row = {"audio_path": "我.wav", "text": "é 😀 \u0081"}
    assert json.loads(encodable(as_json(row), latin, is_json=True)) == row
    assert encodable("我", io.StringIO()) == "我"


def test_a_name_that_is_no_utf_8_is_written_and_read_back() -> None:
    row = {"audio_path": "\udcff我.wav", "text": "我"}
    text = as_json(row)
    assert json.loads(text.encode()) == row and as_json({"text": "我"}) == '{"text": "我"}'
    assert printable(row["audio_path"]) == "\\udcff我.wav"
    written("txt", [row]).encode()
