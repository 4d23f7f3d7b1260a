"""Audio longer than a model hears at once, cut where nobody speaks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resonance.transcribe.speech import FRAME, Listener, speech_in, spoken_in
from resonance.units import SAMPLE_RATE

Samples = npt.NDArray[np.float32]

PAUSE_FRAMES = 7  # of 32 ms: what is judged at once, so that a cut falls into a pause and not into a stop consonant
QUIET_WEIGHT = 0.2  # how much the loudness, by that of the loudest frame, counts beside the probability of speech
LEFT_FRAMES = 8  # of a long pause, before what is said next
AHEAD = SAMPLE_RATE  # samples that are looked at behind the longest window
SURELY_SILENT = 0.1  # probability of speech below which frames are alike
AS_QUIET = 0.01  # what a pause may be above the quietest place


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a recording that is decoded at once."""

    start: float  # seconds into the recording
    seconds: float
    speech: float | None  # 0-1, how sure it is that somebody speaks; None: no detector
    spoken: tuple[float, float]  # seconds between which somebody speaks, from the start of the window
    audio: Samples  # float32 [samples] at 16 kHz


def windows(blocks: Iterable[Samples], max_seconds: float) -> Iterator[Window]:
    """Consecutive windows that cover audio arriving in blocks; nothing is left out, nothing comes twice.

    None is longer than `max_seconds`. Each but the last ends at the place of its second half where speech is least probable
    and it is quietest. Holds little more than one window and one block in memory.
    """
    most = int(max_seconds * SAMPLE_RATE)
    listener = Listener()
    held = np.zeros(0, np.float32)  # from the beginning of the next window on
    heard = np.zeros(0, np.float32)  # speech probabilities from the same place on, rounded to frames
    done = 0  # samples in windows so far

    def window(length: int) -> Window:
        found, seconds = heard[: -(-length // FRAME)], length / SAMPLE_RATE
        return Window(done / SAMPLE_RATE, seconds, speech_in(found), spoken_in(found, seconds), held[:length])

    for block in blocks:
        held = np.concatenate([held, block])
        heard = np.concatenate([heard, listener.hear(block)])
        while len(held) > most + AHEAD:
            cut = best_cut(held[: most + AHEAD], heard, most)
            yield window(cut)
            # Probabilities go on at the frame in which the cut lies: at most 32 ms off.
            held, heard, done = held[cut:], heard[round(cut / FRAME) :], done + cut
    heard = np.concatenate([heard, listener.hear(np.zeros(0, np.float32), last=True)])
    while len(held):
        cut = len(held) if len(held) <= most else best_cut(held, heard, most)
        yield window(cut)
        held, heard, done = held[cut:], heard[round(cut / FRAME) :], done + cut


def best_cut(audio: Samples, speech: npt.NDArray[np.float32], most: int) -> int:
    """The sample of the second half of the first `most` at which to cut: towards the end of the longest pause that reaches
    there, so that much of what follows fits into the next window.

    audio: float32 [samples], with some more behind, so that the length of a pause at the end is known; speech: probabilities
    of its frames of 512 samples, or empty: then loudness decides alone.
    """
    frames = audio[: len(audio) // FRAME * FRAME].reshape(-1, FRAME)
    end = most // FRAME
    half = end // 2
    if end - half <= PAUSE_FRAMES:
        return most
    loudness = np.sqrt(np.square(frames, dtype=np.float64).mean(axis=1))
    cost = QUIET_WEIGHT * loudness / max(loudness.max(), 1e-9)
    known = np.maximum(speech[: len(frames)] - SURELY_SILENT, 0)
    if len(known):
        cost += np.pad(known, (0, len(frames) - len(known)), mode="edge")
    smooth = np.convolve(cost, np.full(PAUSE_FRAMES, 1 / PAUSE_FRAMES), mode="valid")
    middle = np.arange(len(smooth)) + PAUSE_FRAMES // 2  # the frame that each value is about
    allowed = (middle >= half) & (middle < end)
    pauses = np.split(middle, np.flatnonzero(smooth > smooth[allowed].min() + AS_QUIET))
    longest = max((pause for pause in pauses if len(pause) and pause[-1] >= half and pause[0] < end), key=len)
    first, last = int(longest[0]), int(longest[-1])
    frame = min(max((first + last + 1) // 2, last - LEFT_FRAMES, half), end - 1)
    return frame * FRAME + FRAME // 2
