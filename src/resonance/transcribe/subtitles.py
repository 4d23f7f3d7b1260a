"""Subtitles: SubRip and WebVTT cues that can be read, one after the other, from segments or words with times."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from resonance.transcribe.rows import Row

SHORTEST_MS = 500  # a shorter cue is a flash
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
    txt_segments: bool = False  # txt has a line for each segment, not for each recording


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


@dataclass(slots=True)
class _Draft:
    """A cue to be: milliseconds, and what it says."""

    start: int
    end: int
    tokens: list[_Token]


def columns(text: str) -> int:
    """How wide `text` is on a screen: 2 for a wide character, 0 for a combining one, else 1."""
    return sum(
        2 if unicodedata.east_asian_width(c) in "WF" else unicodedata.category(c) not in ("Mn", "Me", "Cf")
        for c in text
    )


def cues(row: Row, layout: Layout) -> list[Cue]:
    """The subtitles of a row with segments. None overlaps another, ends after the recording or is a flash, unless the
    recording is too short for all; all text is there, in its order."""
    longest = round(layout.seconds * 1000)
    shortest = min(SHORTEST_MS, longest)
    drafts = [part for segment in row.get("segments", ()) for part in _divided(_tokens(segment, layout), layout)]
    timed = [_Draft(round(part[0].start), round(part[-1].end), part) for part in drafts if columns(_text(part))]
    if not timed:
        return []
    total = round(row.get("duration", 0.0) * 1000)
    total = total or max(timed[-1].start + shortest, *(draft.end for draft in timed))
    now = 0
    for draft in timed:
        draft.start = now = min(max(draft.start, now), total)
        draft.end = min(max(draft.end, now), total)
    shown = _without_flashes(timed, total, shortest, layout)
    made: list[Cue] = []
    starts = _apart([draft.start for draft in shown], total, shortest)
    for draft, start, limit in zip(shown, starts, [*starts[1:], max(total, starts[-1] + 1)], strict=True):
        end = min(max(draft.end, start + shortest), start + longest, limit)
        made.append(Cue(start, end, tuple(_wrapped(draft.tokens, layout.line_length))))
    return made


def _without_flashes(drafts: Sequence[_Draft], total: int, shortest: int, layout: Layout) -> list[_Draft]:
    """What has less time than `shortest` joined to what is near: to the one before, else to the next, where that fits."""
    made: list[_Draft] = []
    waiting: _Draft | None = None
    for draft, following in zip(drafts, [*drafts[1:], None], strict=True):
        if waiting:
            draft, waiting = _joined(waiting, draft), None
        if (following.start if following else total) - draft.start < shortest:
            if made and _may_join(made[-1], draft, layout):
                made[-1] = _joined(made[-1], draft)
                continue
            if following and _may_join(draft, following, layout):
                waiting = draft
                continue
        made.append(draft)
    return made


def _may_join(first: _Draft, second: _Draft, layout: Layout) -> bool:
    joined = _joined(first, second)
    if second.start - first.end > SHORTEST_MS or joined.end - joined.start > layout.seconds * 1000:
        return False
    return len(_wrapped(joined.tokens, layout.line_length)) <= layout.line_count


def _joined(first: _Draft, second: _Draft) -> _Draft:
    head, *tail = second.tokens
    before, after = _text(first.tokens)[-1], head.text[0]
    if not after.isspace() and columns(before) < 2 and columns(after) < 2:
        head = _Token(f" {head.text}", head.start, head.end)
    return _Draft(first.start, max(first.end, second.end), [*first.tokens, head, *tail])


def _apart(starts: Sequence[int], total: int, shortest: int) -> list[int]:
    """Times from 0 to `total`, each `shortest` or more before the next, as far as there is room for that many.

    What is missing is taken from the one before; only at the very beginning from those that follow.
    """
    step = max(min(shortest, total // len(starts)), 1)
    made: list[int] = []
    limit = total
    for start in reversed(starts):
        limit = min(start, limit - step)
        made.append(limit)
    made.reverse()
    now = 0
    for i, start in enumerate(made):
        made[i] = max(start, now)
        now = made[i] + step
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
    tokens: list[_Token] = []
    for text, start, end in spans:
        pieces = [
            cut
            for piece in _glued(_TOKEN.findall(" ".join(text.split()) if not words else text))
            for cut in _cut(piece, layout.line_length)
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


def _cut(text: str, line_length: int) -> Iterator[str]:
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


def _text(tokens: Sequence[_Token]) -> str:
    return "".join(token.text for token in tokens).strip()


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
