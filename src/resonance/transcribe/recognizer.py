"""What every engine does: a batch of audio in, a transcript for each clip out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from resonance.transcribe.phrases import PhraseHelp

Times = Literal["none", "segment", "word"]


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How to decode. None leaves the choice to the model or its adapter."""

    language: str | None = None  # Whisper's code; None: the adapter's, else detected
    task: Literal["transcribe", "translate"] | None = None
    num_beams: int = 1
    times: Times = "none"
    scores: bool = False  # confidences too, which beams have to be scored again for
    temperatures: tuple[float, ...] = (0.0,)  # the next one where a text is repetitive or improbable
    compression_ratio_threshold: float = 2.4  # a text that gzip makes smaller than this many times is repetitive
    log_prob_threshold: float = -1.0  # mean over the tokens, below which a text is improbable
    max_new_tokens: int | None = None  # at most so many for one clip; None: as many as can be said in its time
    no_speech_threshold: float = 0.6  # probability of silence above which an improbable text is not tried again
    prompt: str | None = None  # what was said before
    phrases: PhraseHelp | None = None  # what this person says


@dataclass(frozen=True, slots=True)
class Word:
    """One word, or one token of a character or more where words stand without spaces. Times are seconds from the start of the audio."""

    start: float
    end: float
    text: str  # with the space before it, so that words join to the text
    confidence: float  # 0-1: geometric mean of its tokens' probabilities


@dataclass(frozen=True, slots=True)
class TimedText:
    """A piece of a transcript. Times are seconds from the start of the audio."""

    start: float
    end: float
    text: str
    confidence: float | None = None  # 0-1: geometric mean of its tokens' probabilities; None: not asked for
    words: tuple[Word, ...] = ()
    repetitive: bool = False  # the text repeats itself, at every temperature
    temperature: float | None = None  # at which it was decoded; None: the engine does not say
    no_speech_probability: float | None = None  # 0-1, of the clip it is in; None: not asked for


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was understood of one clip. The numbers are None where `scores` were not asked for and none were needed."""

    text: str
    language: str | None
    segments: tuple[TimedText, ...] = ()
    mean_log_prob: float | None = None  # over the tokens and the end of the text
    no_speech_probability: float | None = None  # 0-1, what the model gives for its token of silence
    compression_ratio: float = 0.0
    temperature: float = 0.0
    timed: bool = False  # whether the model itself has written the times of the segments
    complete_until: float | None = None  # seconds after which a sentence is cut off; None: complete to the end
    phrase: str | None = None  # the one of the phrase list that it is, if it is one
    phrase_score: float | None = None  # 0-1: probability among the phrases of the list

    @property
    def confidence(self) -> float | None:
        """0-1: geometric mean of the tokens' probabilities."""
        return None if self.mean_log_prob is None else float(np.exp(self.mean_log_prob))


class Recognizer(Protocol):
    """A loaded model."""

    @property
    def name(self) -> str:
        """What was loaded: a hub name or a folder."""

    @property
    def max_clip_seconds(self) -> float:
        """The longest clip that can be decoded at once; longer audio is cut first (`longform`)."""

    @property
    def best_clip_seconds(self) -> float:
        """The longest clip that is decoded well: near what the model was trained on. At most `max_clip_seconds`."""

    @property
    def personal(self) -> bool:
        """Whether it was tuned by Resonance, for somebody whom a voice-activity detector may not hear."""

    def transcribe(self, clips: Sequence[np.ndarray], settings: DecodeSettings) -> list[Transcript]:
        """Transcripts of clips float32 [samples] at 16 kHz, in their order. They are decoded as one batch."""
