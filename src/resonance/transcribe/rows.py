"""What is kept of one recording: a row of the JSON output, which all other formats are made from."""

from __future__ import annotations

import json
import math
import re
from typing import Any, TextIO

from resonance.transcribe.recognizer import TimedText, Times
from resonance.transcribe.result import FileResult

Row = dict[str, Any]


def row_of(result: FileResult, times: Times) -> Row:
    """The row of the JSON output. Times are seconds, confidences 0-1; what was not asked for or not found is left out."""
    row: Row = {"audio_path": result.audio_path}
    if result.error is not None and not result.text:
        return row | {"error": result.error}
    row |= {"text": result.text, "language": result.language, "duration": round(result.duration, 3)}
    if (confidence := _confidence(result.segments)) is not None:
        row["confidence"] = confidence
    if any(segment.repetitive for segment in result.segments):
        row["repetition"] = True
    if result.phrase is not None or result.phrase_score is not None:
        row |= {"phrase": result.phrase, "phrase_score": _rounded(result.phrase_score)}
    if times != "none":
        row["segments"] = [_segment(segment, times) for segment in result.segments if segment.text.strip()]
    if result.left_out:
        row["left_out"] = [_span(part) for part in result.left_out]
    if result.error is not None:
        row["error"] = result.error
    return row


def _span(part: TimedText) -> Row:
    return {"start": round(part.start, 3), "end": round(part.end, 3), "text": part.text}


def _segment(segment: TimedText, times: Times) -> Row:
    row = _span(segment)
    if segment.confidence is not None:
        row["confidence"] = _rounded(segment.confidence)
    if times == "word":
        row["words"] = [
            {
                "start": round(word.start, 3),
                "end": round(word.end, 3),
                "word": word.text,
                "confidence": _rounded(word.confidence),
            }
            for word in segment.words
        ]
    if segment.repetitive:
        row["repetition"] = True
    return row


def _confidence(segments: tuple[TimedText, ...]) -> float | None:
    """Geometric mean over the segments, each as heavy as its text is long. None where one has no confidence."""
    if not segments or any(segment.confidence is None for segment in segments):
        return None
    weights = [max(len(segment.text), 1) for segment in segments]
    logs = [math.log(max(segment.confidence or 0.0, 1e-9)) for segment in segments]
    return _rounded(math.exp(sum(w * log for w, log in zip(weights, logs, strict=True)) / sum(weights)))


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 4)


def as_json(row: Row, indent: int | None = None) -> str:
    """One JSON object, in characters as they are. Names that are no UTF-8 on disk are escaped, and read back as they were."""
    text = json.dumps(row, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row, indent=indent)
    return text


def printable(name: str) -> str:
    """A file's name for a line of text: one line, no tabs, and `\\udcff` for a byte that is no UTF-8."""
    return (
        name.encode("utf-8", "backslashreplace").decode().replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    )


def encodable(text: str, stream: TextIO, *, is_json: bool = False) -> str:
    """`text` as the encoding of `stream` can say it, other characters escaped; JSON remains JSON."""
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        if is_json:  # has such characters in strings only
            return re.sub(r"[^\x00-\x7f]+", lambda found: json.dumps(found[0])[1:-1], text)
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text
