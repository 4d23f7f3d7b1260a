"""Where one utterance ends, while it is being spoken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resonance.transcribe.longform import best_cut
from resonance.transcribe.speech import FRAME, NOBODY, Listener
from resonance.units import SAMPLE_RATE

Samples = npt.NDArray[np.float32]

PAUSE_SECONDS = 1.2  # of silence behind speech: slow speech has long pauses within a sentence
LEAD_SECONDS = 0.5  # of that pause stays with the utterance
UNSURE_SECONDS = 6.0  # in which the detector hears nobody: as much is looked at at once, for it misses soft speech
QUIET_LEVEL = 10 ** (-50 / 20)  # without a detector: root mean square of a frame in which nobody speaks


@dataclass(frozen=True, slots=True)
class Utterance:
    """One stretch of speech."""

    start: float  # seconds from the beginning of the stream
    audio: Samples


class Utterances:
    """Cuts a stream into utterances: at pauses, and where one is longer than the model hears at once. Nothing is left out:
    where the detector hears nobody, whoever transcribes decides, who looks at the level too."""

    def __init__(self, max_seconds: float) -> None:
        self.most = int(max_seconds * SAMPLE_RATE)
        self.listener = Listener()
        self.held = np.zeros(0, np.float32)  # of the utterance under way
        self.heard = np.zeros(0, np.float32)  # probabilities of speech in its frames
        self.first = 0  # sample of the stream at which `held` begins

    @property
    def under_way(self) -> Utterance | None:
        """What has been said of the present one; None while nobody speaks."""
        return Utterance(self.first / SAMPLE_RATE, self.held) if self._spoken().any() else None

    def add(self, audio: Samples) -> list[Utterance]:
        """Take what was heard, and give what is finished by it."""
        self.held = np.concatenate([self.held, audio])
        found = self.listener.hear(audio)
        self.heard = np.concatenate([self.heard, found if self.listener.model else self._loud()])
        finished = []
        while (length := self._finished()) is not None:
            finished.append(self._cut(length))
        return finished

    def end(self) -> Utterance | None:
        """What is left when the stream ends."""
        return self._cut(len(self.held)) if len(self.held) else None

    def _finished(self) -> int | None:
        """Samples of the utterance that is complete; None: none is."""
        if len(self.held) > self.most:
            return best_cut(self.held[: self.most], self.heard)
        spoken = np.flatnonzero(self._spoken())
        if not len(spoken):
            unsure = min(int(UNSURE_SECONDS * SAMPLE_RATE), self.most)
            return best_cut(self.held[:unsure], self.heard) if len(self.held) > unsure else None
        behind = int(spoken[-1] + 1) * FRAME
        if len(self.held) - behind < PAUSE_SECONDS * SAMPLE_RATE:
            return None
        return behind + int(LEAD_SECONDS * SAMPLE_RATE) // FRAME * FRAME

    def _spoken(self) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = self.heard > NOBODY
        return found

    def _cut(self, length: int) -> Utterance:
        found = Utterance(self.first / SAMPLE_RATE, self.held[:length])
        self.held, self.heard = self.held[length:], self.heard[round(length / FRAME) :]
        self.first += length
        return found

    def _loud(self) -> Samples:
        """For the frames of `held` that have none yet: 1 where something is heard. Without a detector, the level decides."""
        begun = len(self.heard) * FRAME
        frames = self.held[begun : len(self.held) // FRAME * FRAME].reshape(-1, FRAME)
        level = np.sqrt(np.square(frames, dtype=np.float64).mean(axis=1))
        return np.asarray(level > QUIET_LEVEL, np.float32)
