"""From what was understood to what each format says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from resonance.languages import LANGUAGES
from resonance.serve.speech import Answer
from resonance.transcribe.fallback import compression_ratio
from resonance.transcribe.formats import render
from resonance.transcribe.recognizer import TimedText, Times
from resonance.transcribe.rows import row_of
from resonance.transcribe.subtitles import Layout

Tokens = Callable[[str], Sequence[int]]  # the model's tokens of a text
LEAST_CONFIDENCE = 1e-9


def voice_of(answer: Answer) -> dict[str, Any]:
    """Which model answered: with every transcript."""
    voice = answer.voice
    adapter = voice and {"patient_id": voice.patient, "version": voice.version, "fingerprint": voice.fingerprint}
    return {"adapter": adapter, "base_fingerprint": answer.base_fingerprint}


def transcript(answer: Answer, times: Times, *, confidence: bool) -> dict[str, Any]:
    """The answer of POST /transcribe."""
    row = row_of(answer.result, times)
    row.setdefault("text", "")
    row.setdefault("language", answer.result.language)
    row.setdefault("duration", round(answer.result.duration, 3))
    del row["audio_path"]
    if "error" in row:
        row["warning"] = row.pop("error")
    if not confidence:
        row.pop("confidence", None)
        for segment in row.get("segments", ()):
            segment.pop("confidence", None)
            for word in segment.get("words", ()):
                word.pop("confidence", None)
    return row | voice_of(answer)


def subtitles(answer: Answer, form: Literal["srt", "vtt"]) -> str:
    row = row_of(answer.result, "segment")
    return "".join(render(form, [row], several=False, layout=Layout()))


def usage(answer: Answer) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(answer.result.duration, 3)}


def openai_text(answer: Answer, *, logprobs: bool) -> dict[str, Any]:
    """`json` of OpenAI."""
    found: dict[str, Any] = {"text": answer.result.text, "usage": usage(answer), "resonance": voice_of(answer)}
    if logprobs:
        found["logprobs"] = word_logprobs(answer.result.segments)
    return found


def openai_verbose(
    answer: Answer, *, task: str, granularities: Sequence[str], temperature: float, tokens: Tokens
) -> dict[str, Any]:
    """`verbose_json` of OpenAI. A translation is in English, whatever was spoken."""
    result = answer.result
    code = "en" if task == "translate" else result.language
    found: dict[str, Any] = {
        "task": task,
        "language": LANGUAGES.get(code or "", "unknown"),
        "duration": round(result.duration, 3),
        "text": result.text,
    }
    if "segment" in granularities:
        found["segments"] = [
            _segment(number, segment, temperature, tokens)
            for number, segment in enumerate(part for part in result.segments if part.text.strip())
        ]
    if "word" in granularities:
        found["words"] = [
            {"word": word.text.strip(), "start": round(word.start, 3), "end": round(word.end, 3)}
            for segment in result.segments
            for word in segment.words
            if word.text.strip()
        ]
    return found | {"usage": usage(answer), "resonance": voice_of(answer)}


def _segment(number: int, segment: TimedText, temperature: float, tokens: Tokens) -> dict[str, Any]:
    return {
        "id": number,
        "seek": round(segment.start * 100),
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": [*tokens(f" {segment.text}")],
        "temperature": temperature if segment.temperature is None else segment.temperature,
        "avg_logprob": round(_log(segment.confidence), 4),
        "compression_ratio": round(compression_ratio(segment.text), 4),
        "no_speech_prob": round(segment.no_speech_probability or 0.0, 4),
    }


def word_logprobs(segments: Sequence[TimedText]) -> list[dict[str, Any]]:
    """`logprobs` of OpenAI, a word each: the mean over its tokens, so that exp of their mean is the confidence."""
    return [
        {"token": word.text, "bytes": [*word.text.encode()], "logprob": round(_log(word.confidence), 4)}
        for segment in segments
        for word in segment.words
    ]


def _log(confidence: float | None) -> float:
    return math.log(max(confidence or 0.0, LEAST_CONFIDENCE))
