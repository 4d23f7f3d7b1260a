"""Whether an export still understands what the original does: both transcribe the same recordings."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np

from resonance.config_export import ExportConfig
from resonance.data.audio import read_audio
from resonance.data.convert import MEDIA_SUFFIX
from resonance.data.formats import load_manifest
from resonance.data.manifest import Utterance
from resonance.errors import AudioError, DataError
from resonance.messages import _
from resonance.model.runs import RunFolder
from resonance.transcribe.recognizer import DecodeSettings, Recognizer, Transcript
from resonance.units import SAMPLE_RATE, WINDOW_SECONDS

DEMO_SPEAKER = Path(__file__).parent.parent / "demo_speaker"
BATCH = 8
WINDOW_SAMPLES = int(WINDOW_SECONDS * SAMPLE_RATE)
SHOWN = 5  # recordings whose texts are told when an export fails


@dataclass(frozen=True, slots=True)
class Clip:
    """A recording that original and export transcribe."""

    name: str
    audio: np.ndarray  # float32 [samples] at 16 kHz


@dataclass(frozen=True, slots=True)
class Comparison:
    """Texts of the same clips by the original and by an export."""

    clips: Sequence[Clip]
    original: list[str]
    exported: list[str]

    @property
    def differences(self) -> list[float]:
        return [difference(a, b) for a, b in zip(self.original, self.exported, strict=True)]

    @property
    def mean(self) -> float:
        return float(np.mean(self.differences))

    def verdict(self) -> str:
        """How alike they are, in one line."""
        same = sum(a == b for a, b in zip(self.original, self.exported, strict=True))
        text = _("{same} of {count} texts are the original's to the letter; {share:.1%} of the characters differ.")
        return text.format(same=same, count=len(self.clips), share=self.mean)

    def worst(self) -> list[str]:
        """One line for each of the clips that differ most."""
        order = sorted(range(len(self.clips)), key=lambda i: -self.differences[i])
        return [
            _("{name}: {share:.0%} of the characters differ. Original: “{original}” Export: “{exported}”").format(
                name=self.clips[i].name,
                share=self.differences[i],
                original=shortened(self.original[i]),
                exported=shortened(self.exported[i]),
            )
            for i in order[:SHOWN]
            if self.differences[i] > 0
        ]


def shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[:most] + " …"


def difference(a: str, b: str) -> float:
    """Characters to change, add or leave out to make one text the other, as a share of the longer one. 0 to 1."""
    if not a or not b:
        return float(a != b)
    counts = jiwer.process_characters(a, b)
    changes: int = counts.substitutions + counts.insertions + counts.deletions
    return min(changes / max(len(a), len(b)), 1.0)


def choose_clips(config: ExportConfig, run: RunFolder | None) -> tuple[list[Clip], str]:
    """Recordings to compare on, and where they are from. Raises DataError where those that are given cannot be read."""
    if config.check_file is not None:
        rows = given_rows(config.check_file)
        return read_clips(spread(rows, config.max_check_samples)), str(config.check_file)
    if run and run.held_out_rows.is_file():
        rows = load_manifest(run.held_out_rows).utterances
        try:
            return read_clips(spread(rows, config.max_check_samples)), _("recordings that the training held out")
        except AudioError:  # moved away since; the export can be checked without them
            pass
    rows = load_manifest(DEMO_SPEAKER / "labels.json").utterances
    return read_clips(spread(rows, config.max_check_samples)), _("the demo's speaker")


def given_rows(path: Path) -> list[Utterance]:
    """The recordings that a manifest lists, of a folder, or the one recording."""
    if not path.exists():
        raise DataError(_("{path}: no such file or folder. Check the name.").format(path=path))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and MEDIA_SUFFIX.fullmatch(file.suffix))
        if not files:
            raise DataError(_("{path}: no audio files in this folder.").format(path=path))
    elif MEDIA_SUFFIX.fullmatch(path.suffix):
        files = [path]
    else:
        return load_manifest(path).utterances
    return [Utterance(str(file), "", row) for row, file in enumerate(files, 1)]


def spread(rows: Sequence[Utterance], most: int) -> list[Utterance]:
    """At most so many rows from all over the list, which may be sorted by speaker or phrase."""
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def read_clips(rows: Sequence[Utterance]) -> list[Clip]:
    """In the order of their length, so that batches are of like length. Raises AudioError."""
    clips = [Clip(Path(row.audio).name, read_audio(Path(row.audio), row.start, row.end)) for row in rows]
    return sorted(clips, key=lambda clip: len(clip.audio))


def transcribe(
    recognizer: Recognizer, clips: Sequence[Clip], settings: DecodeSettings
) -> tuple[list[Transcript], float]:
    """Transcripts, and the seconds they took once everything had been set up. Of a longer clip its first part."""
    most = int(recognizer.max_clip_seconds * SAMPLE_RATE)
    audios = [clip.audio[:most] for clip in clips]
    recognizer.transcribe(audios[:1], settings)
    began = time.perf_counter()
    transcripts = []
    for first in range(0, len(audios), BATCH):
        transcripts += recognizer.transcribe(audios[first : first + BATCH], settings)
    return transcripts, time.perf_counter() - began


def faster_whisper_texts(
    folder: Path, clips: Sequence[Clip], languages: Sequence[str | None], task: str, new_tokens: int, *, silence: bool
) -> list[str]:
    """What faster-whisper makes of the clips: greedy, no temperature, nothing left out.

    It fills up 30 s behind the sound with zeros in place of features, which are not those of silence, and what a model makes
    of that is its own affair. With `silence` it is given 30 s of sound, and has to understand what PyTorch does.
    """
    from faster_whisper import WhisperModel

    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    model = WhisperModel(str(folder), device="cpu", compute_type="default", local_files_only=True)
    texts = []
    for clip, language in zip(clips, languages, strict=True):
        audio = clip.audio[:WINDOW_SAMPLES]
        segments, _info = model.transcribe(
            np.pad(audio, (0, WINDOW_SAMPLES - len(audio))) if silence else audio,
            language=language,
            task=task,
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
            compression_ratio_threshold=None,
            log_prob_threshold=None,
            no_speech_threshold=None,
            suppress_tokens=generation.get("suppress_tokens") or [],  # it has a list of its own otherwise
            # CTranslate2 gives half of prompt and new tokens together.
            max_new_tokens=min(2 * new_tokens - 4, 444),
        )
        texts.append("".join(segment.text for segment in segments).strip())
    return texts
