"""Long audio as openai/whisper decodes it: one window after the other, each from where the last whole sentence ended.

The most accurate way for a stock model (large-v3: 10.0 % of words wrong, 11.0 % cut into windows, by Hugging Face's figures),
and the slowest: no window can begin before the one before it is done.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from resonance.transcribe.longform import Samples, Window, window_of
from resonance.transcribe.recognizer import DecodeSettings, Recognizer, Transcript
from resonance.transcribe.segments import joined
from resonance.transcribe.speech import Listener
from resonance.units import SAMPLE_RATE

LEAST_STEP_SECONDS = 1.0  # and otherwise the whole window
LEAST_REST = SAMPLE_RATE // 10  # samples behind a last sentence that may hold another one
REMEMBERED = 2000  # characters of what was said: more than the decoder takes
TOO_HOT = 0.5  # what was drawn above this temperature is no help for what follows (openai/whisper, `transcribe.py`)


def decode_in_sequence(
    recognizer: Recognizer, blocks: Iterable[Samples], settings: DecodeSettings, *, condition_on_previous_text: bool
) -> Iterator[tuple[Window, Transcript]]:
    """Windows and their transcripts, without the sentence that the end of a window has cut off: the next begins with it.

    The model has to write times. Holds a window and a block in memory.
    """
    most = round(recognizer.max_clip_seconds * SAMPLE_RATE)
    settings = replace(settings, times=settings.times if settings.times != "none" else "segment")
    coming = iter(blocks)
    held = np.zeros(0, np.float32)
    done, more, before = 0, True, ""
    while True:
        while more and len(held) < most:
            block = next(coming, None)
            more = block is not None
            if block is not None:
                held = np.concatenate([held, block])
        if not len(held):
            return
        audio = held[:most]
        heard = recognizer.transcribe([audio], replace(settings, prompt=before or None))[0]
        length = len(audio)
        until = heard.complete_until
        # A model that goes on by less would take hours of noise in steps of a timestamp.
        if until is not None and until >= LEAST_STEP_SECONDS and len(held) - until * SAMPLE_RATE > LEAST_REST:
            length = min(round(until * SAMPLE_RATE), length)
            heard = _complete(heard)
        yield window_of(done, audio[:length], Listener().hear(audio[:length], last=True)), heard
        held, done = held[length:], done + length
        if condition_on_previous_text:
            before = f"{before} {heard.text}".strip()[-REMEMBERED:] if heard.temperature <= TOO_HOT else ""


def _complete(heard: Transcript) -> Transcript:
    """Without what is said after the last whole sentence."""
    assert heard.complete_until is not None
    segments = tuple(s for s in heard.segments if s.end <= heard.complete_until + 1e-6)
    return replace(heard, segments=segments, text=functools.reduce(joined, (s.text for s in segments), ""))
