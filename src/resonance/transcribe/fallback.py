"""Decoding again at a higher temperature where a text repeats itself or is improbable, as openai/whisper does."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resonance.transcribe.recognizer import DecodeSettings


@dataclass(frozen=True, slots=True)
class Decoded:
    """What an engine wrote for one row."""

    ids: list[int]  # text and timestamps, without prompt and end
    log_probs: list[float]  # of each of `ids`, then of `<|endoftext|>` if the text has ended; empty where not asked for
    no_speech_probability: float | None
    temperature: float = 0.0

    @property
    def mean_log_prob(self) -> float | None:
        """Over the tokens and the end; None where not asked for."""
        return sum(self.log_probs) / len(self.log_probs) if self.log_probs else None


@dataclass(frozen=True, slots=True)
class Judged:
    """What was written, as text, and how far gzip compresses that."""

    decoded: Decoded
    text: str
    compression_ratio: float
    repetitive: bool
    improbable: bool
    silent: bool  # the model finds silence probable, and what it wrote improbable

    @property
    def wrong(self) -> bool:
        """Whether another attempt may be better. Of silence none is (openai/whisper, `transcribe.py`)."""
        return (self.repetitive or self.improbable) and not self.silent


def with_fallback(
    attempt: Callable[[Sequence[int], float], list[Decoded]],
    text_of: Callable[[Decoded], str],
    rows: int,
    settings: DecodeSettings,
) -> list[Judged]:
    """What to keep for each of so many rows. `attempt` decodes some of them at a temperature.

    openai/whisper keeps the last attempt where none is right, which then was drawn at temperature 1. Here the best of them
    is kept: one that does not repeat itself, then the most probable.
    """
    found: list[list[Judged]] = [[] for _row in range(rows)]
    wanted = list(range(rows))
    for temperature in settings.temperatures:
        for row, decoded in zip(wanted, attempt(wanted, temperature), strict=True):
            found[row].append(judge(decoded, text_of(decoded), settings))
        wanted = [row for row in wanted if found[row][-1].wrong]
        if not wanted:
            break
    return [max(tries, key=_worth) for tries in found]


def judge(decoded: Decoded, text: str, settings: DecodeSettings) -> Judged:
    """Whether the text is one to keep, by the thresholds of `settings`."""
    ratio = compression_ratio(text)
    mean = decoded.mean_log_prob
    improbable = mean is not None and mean < settings.log_prob_threshold
    silent = improbable and (decoded.no_speech_probability or 0.0) > settings.no_speech_threshold
    return Judged(decoded, text, ratio, ratio > settings.compression_ratio_threshold, improbable, silent)


def compression_ratio(text: str) -> float:
    """Bytes of the text by bytes of it compressed; 2.4 and more is a loop (openai/whisper, `transcribe.py`)."""
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data)) if data else 0.0


def _worth(judged: Judged) -> tuple[bool, bool, float]:
    """Of several attempts the first of the best is kept: the order of equals is that of the temperatures."""
    mean = judged.decoded.mean_log_prob
    return not judged.wrong, not judged.repetitive, mean if mean is not None else 0.0
