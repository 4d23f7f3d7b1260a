"""What an export is called with in other programs, and what those make of a short audio context."""

from __future__ import annotations

import shlex
from pathlib import Path

from resonance.data.audio_context import AudioContext
from resonance.messages import _
from resonance.model import adapters, exports
from resonance.units import TIMESTAMP_STEP_SECONDS


def usage(record: exports.Record, info: adapters.Info | None, context: AudioContext, place: Path) -> list[str]:
    """Lines to type. `place`: what programs are given, the folder or the file."""
    language = info.language if info else None
    translates = bool(info and info.task == "translate")
    if record.format == "ggml":
        flags = [
            *(["-l", language] if language else []),
            *(["-tr"] if translates else []),
            *([] if record.writes_timestamps else ["-nt"]),
            *([] if context.length == "full" else ["-ac", str(positions(info, context))]),
        ]
        return [shlex.join(["whisper-cli", "-m", str(place), *flags, "-f", "recording.wav"])]
    lines = [f"resonance transcribe --model_path {shlex.quote(str(place))} --audio_path recording.wav"]
    if record.format == "ctranslate2":
        settings = [
            '"recording.wav"',
            *([f'language="{language}"'] if language else []),
            *(['task="translate"'] if translates else []),
            *([] if record.writes_timestamps else ["without_timestamps=True"]),
        ]
        lines.append(f'faster_whisper.WhisperModel("{place}").transcribe({", ".join(settings)})')
    return lines


def context_notes(record: exports.Record, info: adapters.Info | None, context: AudioContext) -> list[str]:
    """What becomes of a model that was trained on less than 30 s at once, and what faster-whisper makes of it."""
    notes = []
    if context.length != "full" and record.format == "ggml":
        most = positions(info, context)
        seconds = most * TIMESTAMP_STEP_SECONDS - context.margin_seconds
        notes.append(
            _(
                "This model was trained at the length of its recordings. whisper.cpp hears 30 s, unless it is given "
                "--audio-ctx (-ac); {positions} is right for recordings of up to {seconds:.1f} s, and longer ones would be cut "
                "off there."
            ).format(positions=most, seconds=seconds)
        )
    elif context.length != "full":
        notes.append(
            _(
                "This model was trained at the length of its recordings. Resonance keeps to that; other programs let it hear "
                "30 s, which is slower and may be understood differently."
            )
        )
    if record.difference_in_faster_whisper is not None:
        notes.append(
            _(
                "As faster-whisper is usually called, {share:.1%} of the characters differ from the original's: what it puts "
                "behind a short recording is not silence to the model. Add silence up to 30 s yourself, and see whether that is "
                "better."
            ).format(share=record.difference_in_faster_whisper)
        )
    return notes


def positions(info: adapters.Info | None, context: AudioContext) -> int:
    """Encoder positions for the longest recording that the model was trained on; its window where that is not known."""
    longest = info.data.get("longest_clip_seconds") if info else None
    return context.positions(float(longest)) if longest else context.window_positions
