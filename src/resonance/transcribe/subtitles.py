"""Subtitles: SubRip and WebVTT cues that can be read, one after the other, from segments or words with times."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from resonance.transcribe.rows import Row

SHORTEST_MS = 500  # a shorter cue is a flash; it stays so long where nothing comes after it
# Scripts that are written without spaces, each character of which may begin a line: kana, Chinese, full-width forms.
_UNSPACED = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"\s*(?:[{_UNSPACED}]|[^\s{_UNSPACED}]+)")
_CLOSING = re.compile(r"\s*[、。〃〉》」』】〕〗〙〛！），．：；？］｝～…—,.!?;:)\]}%”’ー々ゝゞ]+")
_OPENING = re.compile(r"[（〈《「『【〔“‘(\[{]+")
_PAUSE = re.compile(r"[、。，．！？；：,.!?;:…]['\"”’」』）)]*$")


@dataclass(frozen=True, slots=True)
class Layout:
    """How much of a text is seen at once."""

    line_length: int = 42  # columns; a Chinese, Japanese or Korean character takes two
    line_count: int = 2
    seconds: float = 7.0


@dataclass(frozen=True, slots=True)
class Cue:
    """One subtitle. Milliseconds from the start of the recording, end > start."""

    start: int
    end: int
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Token:
    """What is not divided: a word, or a character where words stand without spaces, with the space before it."""

    text: str
    start: float  # ms
    end: float


def columns(text: str) -> int:
    """How wide `text` is on a screen: 2 for a wide character, 0 for a combining one, else 1."""
    return sum(
        2 if unicodedata.east_asian_width(c) in "WF" else unicodedata.category(c) not in ("Mn", "Me", "Cf")
        for c in text
    )


def cues(row: Row, layout: Layout) -> list[Cue]:
    """The subtitles of a row with segments. None overlaps another or has no length; all text is there, in its order."""
    shortest = min(SHORTEST_MS, round(layout.seconds * 1000))
    drafts = [part for segment in row.get("segments", ()) for part in _divided(_tokens(segment, layout), layout)]
    last = round(row["duration"] * 1000) if "duration" in row else None
    made: list[Cue] = []
    now = 0
    for i, part in enumerate(drafts):
        start = max(round(part[0].start), now)
        limit = max(round(drafts[i + 1][0].start), start) if i + 1 < len(drafts) else last or start + shortest
        end = min(round(part[-1].end), start + round(layout.seconds * 1000))
        end = max(end, min(start + shortest, limit), start + 1)
        if i + 1 < len(drafts):
            end = max(min(end, limit), start + 1)
        made.append(Cue(start, end, tuple(_wrapped(part, layout.line_length))))
        now = end
    return made


def srt(row: Row, layout: Layout) -> Iterator[str]:
    """SubRip: numbered cues. Its players know no escape for the arrow."""
    for number, cue in enumerate(cues(row, layout), 1):
        text = "\n".join(cue.lines).replace("-->", "->")
        yield f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{text}\n\n"


def vtt(row: Row, layout: Layout) -> Iterator[str]:
    """WebVTT (W3C)."""
    yield "WEBVTT\n\n"
    for cue in cues(row, layout):
        text = html.escape("\n".join(cue.lines), quote=False)
        yield f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{text}\n\n"


def _clock(milliseconds: int, point: str) -> str:
    seconds, ms = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{point}{ms:03d}"


def _tokens(segment: dict[str, Any], layout: Layout) -> list[_Token]:
    """With the times of the words; without, in proportion to the width of the text."""
    words = [word for word in segment.get("words") or () if word["word"].strip()]
    if words:
        spans = [(word["word"], word["start"] * 1000, word["end"] * 1000) for word in words]
    else:
        spans = [(segment["text"], segment["start"] * 1000, segment["end"] * 1000)]
    most = layout.line_length * layout.line_count
    tokens: list[_Token] = []
    for text, start, end in spans:
        pieces = [
            cut
            for piece in _glued(_TOKEN.findall(" ".join(text.split()) if not words else text))
            for cut in _cut(piece, layout.line_length, most)
        ]
        widths = [max(columns(piece), 1) for piece in pieces]
        so_far = 0
        for piece, width in zip(pieces, widths, strict=True):
            first, so_far = so_far, so_far + width
            share = (end - start) / sum(widths)
            tokens.append(_Token(piece, start + first * share, start + so_far * share))
    return _punctuated(tokens)


def _glued(pieces: Sequence[str]) -> list[str]:
    """Closing punctuation joined to what it closes, opening punctuation to what it opens."""
    made: list[str] = []
    for piece in pieces:
        if made and ((_CLOSING.fullmatch(piece) and not piece[0].isspace()) or _OPENING.fullmatch(made[-1].strip())):
            made[-1] += piece
        else:
            made.append(piece)
    return made


def _punctuated(tokens: Sequence[_Token]) -> list[_Token]:
    """A word that is only closing punctuation belongs to the word before."""
    made: list[_Token] = []
    for token in tokens:
        if made and _CLOSING.fullmatch(token.text) and not token.text[0].isspace():
            made[-1] = _Token(made[-1].text + token.text, made[-1].start, max(made[-1].end, token.end))
        else:
            made.append(token)
    return made


def _cut(text: str, line_length: int, most: int) -> Iterator[str]:
    """A word that is longer than a line, as an address is, is cut where the line ends."""
    if columns(text.strip()) <= line_length:
        yield text
        return
    part = ""
    for character in text:
        if part.strip() and columns((part + character).strip()) > line_length:
            yield part
            part = ""
        part += character
    yield part


def _divided(tokens: Sequence[_Token], layout: Layout) -> Iterator[list[_Token]]:
    """Tokens in parts that fit the layout, divided behind punctuation where that leaves a part at least half full."""
    rest = list(tokens)
    while rest:
        count = 1
        while count < len(rest) and _fits(rest[: count + 1], layout):
            count += 1
        if count < len(rest):
            pauses = [i for i in range(count, (count - 1) // 2, -1) if _PAUSE.search(rest[i - 1].text)]
            count = pauses[0] if pauses else count
        yield rest[:count]
        rest = rest[count:]


def _fits(tokens: Sequence[_Token], layout: Layout) -> bool:
    if tokens[-1].end - tokens[0].start > layout.seconds * 1000:
        return False
    return len(_wrapped(tokens, layout.line_length)) <= layout.line_count


def _wrapped(tokens: Sequence[_Token], line_length: int) -> list[str]:
    lines: list[str] = []
    line = ""
    for token in tokens:
        if line.strip() and columns((line + token.text).strip()) > line_length:
            lines.append(line.strip())
            line = ""
        line += token.text
    return [*lines, line.strip()] if line.strip() else lines
