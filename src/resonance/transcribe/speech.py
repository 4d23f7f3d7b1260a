"""Where somebody speaks: Silero's voice-activity detector, as faster-whisper ships it, and what is made of its answer.

Thresholds meant for fluent speech drop soft and atypical speech. Here they lie below all of it that was measured: only where
hardly anything is heard does the detector decide alone, and where little is, the model has to be unsure too.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resonance.transcribe.recognizer import Transcript
from resonance.units import SAMPLE_RATE

FRAME = 512  # samples that Silero judges at once: 32 ms
BEFORE = 64  # samples before each frame that Silero looks at too
# The mean of the five most probable frames. Measured: seven recordings without speech 0.03-0.36, 838 TORGO clips 0.39-0.99
# (588 of them by people with dysarthria), spoken digits of a telephone from 0.30.
LOUDEST_FRAMES = 5
QUIET_LEVEL = 10 ** (-38 / 20)  # root mean square, below which a window is made louder for the detector
SPEAKING_LEVEL = 10 ** (-26 / 20)  # and then to this, as TORGO's clips have it
SILENT_LEVEL = 10 ** (-80 / 20)  # below, a 16-bit recording holds one bit of noise
NOBODY = 0.2  # below, no model is believed that wrote something, and none is asked
SOMEBODY = 0.38  # from here on, the model is believed whatever it says


@functools.cache
def detector() -> Any | None:
    """Silero's model; None where faster-whisper (the extra ct2), which brings it, is not installed."""
    package, runtime = importlib.util.find_spec("faster_whisper"), importlib.util.find_spec("onnxruntime")
    if package is None or package.origin is None or runtime is None:
        return None
    # Only the file is taken: importing faster-whisper takes half a second.
    files = sorted(Path(package.origin).parent.glob("assets/silero_vad_v6*.onnx"))
    if not files:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(files[-1], options, providers=["CPUExecutionProvider"])


class Listener:
    """Speech probabilities of audio that arrives in blocks, the same however it is divided."""

    def __init__(self) -> None:
        self.model = detector()
        self.rest = np.zeros(0, np.float32)  # samples that do not fill a frame yet
        self.before = np.zeros(BEFORE, np.float32)  # what each frame is judged with
        self.state = [np.zeros((1, 1, 128), np.float32)] * 2  # the detector's memory

    def hear(self, audio: npt.NDArray[np.float32], *, last: bool = False) -> npt.NDArray[np.float32]:
        """Probabilities [frames] of the frames of 512 samples that are full now; with `last`, of the one begun too."""
        audio = np.concatenate([self.rest, audio])
        whole = len(audio) // FRAME * FRAME
        self.rest = audio[whole:]
        if last and len(self.rest):
            audio, self.rest = np.pad(audio, (0, whole + FRAME - len(audio))), self.rest[:0]
            whole += FRAME
        if self.model is None or not whole:
            return np.zeros(0, np.float32)
        heard = np.concatenate([self.before, audio[:whole]])
        self.before = heard[-BEFORE:]
        frames = np.lib.stride_tricks.sliding_window_view(heard, BEFORE + FRAME)[::FRAME]
        inputs = {"input": np.ascontiguousarray(frames), "h": self.state[0], "c": self.state[1]}
        found, *self.state = self.model.run(None, inputs)
        return np.asarray(found, np.float32).reshape(-1)


def at_speaking_level(
    audio: npt.NDArray[np.float32], probabilities: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The probabilities of a window, or where it is too quiet for them to mean anything, those of the same made louder.

    Silero goes by the level and Whisper's features hardly do: 50 dB below their level, the detector found nobody in 18 of 48
    clips that were decoded as before.
    """
    level = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64)))) if len(audio) else 0.0
    speech = speech_in(probabilities)
    if speech is None or speech >= SOMEBODY or not SILENT_LEVEL < level < QUIET_LEVEL:
        return probabilities
    return Listener().hear(np.clip(audio * np.float32(SPEAKING_LEVEL / level), -1, 1), last=True)


def speech_in(probabilities: npt.NDArray[np.float32]) -> float | None:
    """0-1: how sure it is that somebody speaks in these frames. None where there is no detector."""
    if not len(probabilities):
        return None
    return float(np.sort(probabilities)[-LOUDEST_FRAMES:].mean())


class Spoken(NamedTuple):
    """Where in a clip somebody speaks: between which seconds, and for how many of them. All of it where nobody knows."""

    start: float
    end: float
    seconds: float


def spoken_in(probabilities: npt.NDArray[np.float32], seconds: float) -> Spoken:
    """From the frames of a clip of so many seconds. Where there is no detector, no time is surely speech."""
    speaks = np.flatnonzero(probabilities > SOMEBODY)
    if not len(speaks):
        return Spoken(0.0, seconds, 0.0)
    end = min(float(speaks[-1] + 1) * FRAME / SAMPLE_RATE, seconds)
    return Spoken(float(speaks[0]) * FRAME / SAMPLE_RATE, end, len(speaks) * FRAME / SAMPLE_RATE)


def nobody_spoke(
    speech: float | None, heard: Transcript, *, no_speech_threshold: float, log_prob_threshold: float, loop_ratio: float
) -> bool:
    """Whether the text of a window is to be left out as made up.

    Without a detector, as openai/whisper decides: the model finds silence probable and its own text improbable.
    """
    silent = (heard.no_speech_probability or 0.0) > no_speech_threshold
    improbable = heard.mean_log_prob is not None and heard.mean_log_prob < log_prob_threshold
    loops = heard.compression_ratio > loop_ratio
    if speech is None:
        return silent and improbable
    if speech < NOBODY:
        return True
    return speech < SOMEBODY and (silent or improbable or loops)
