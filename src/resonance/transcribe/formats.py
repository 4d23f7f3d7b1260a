"""Rows as txt, tsv, json, jsonl, srt or vtt, piece by piece, so that no more than one row is held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from resonance.config_types import OutputFormat
from resonance.transcribe.rows import Row, as_json, printable
from resonance.transcribe.subtitles import Layout, srt, vtt

SUBTITLES = ("srt", "vtt")  # one recording a file: their times begin with it
TIMED = ("srt", "vtt", "tsv")  # cannot be written without times


def render(form: OutputFormat, rows: Iterable[Row], *, several: bool, layout: Layout) -> Iterator[str]:
    """The content of a file of this format, in pieces. With `several` recordings txt and tsv name them, and JSON is a list."""
    if form == "json":
        yield from _json(rows, several)
    elif form == "jsonl":
        yield from (as_json(row) + "\n" for row in rows)
    elif form == "tsv":
        yield from _tsv(rows, several)
    elif form == "txt":
        yield from _txt(rows, several, layout.txt_segments)
    else:
        for row in rows:
            yield from (srt if form == "srt" else vtt)(row, layout)


def _json(rows: Iterable[Row], several: bool) -> Iterator[str]:
    if not several:
        yield from (as_json(row, indent=1) + "\n" for row in rows)
        return
    before = "[\n"
    for row in rows:
        yield before + "\n".join(f" {line}" for line in as_json(row, indent=1).split("\n"))
        before = ",\n"
    yield "\n]\n"


def _tsv(rows: Iterable[Row], several: bool) -> Iterator[str]:
    """As openai/whisper writes it: start and end in whole milliseconds."""
    yield ("audio_path\t" if several else "") + "start\tend\ttext\n"
    for row in rows:
        name = f"{printable(row['audio_path'])}\t" if several else ""
        for segment in row.get("segments", ()):
            start, end = round(segment["start"] * 1000), round(segment["end"] * 1000)
            yield f"{name}{start}\t{end}\t{_one_line(segment['text'])}\n"


def _txt(rows: Iterable[Row], several: bool, by_segment: bool) -> Iterator[str]:
    """One recording a line; `by_segment`, one segment a line. Rows have segments too where another format needs times."""
    for row in rows:
        if "text" not in row:
            continue
        name = f"{printable(row['audio_path'])}\t" if several else ""
        segments = row.get("segments", ()) if by_segment else ()
        texts = [segment["text"] for segment in segments] or [row["text"]]
        yield from (f"{name}{_one_line(text)}\n" for text in texts)


def _one_line(text: str) -> str:
    return " ".join(text.split()) if {"\t", "\n", "\r"} & set(text) else text
