"""Audio files in and out: anything that holds sound becomes float32 mono at 16 kHz, block by block."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from resonance.data.decoders import Blocks, Name, Samples, Source, end_missing, open_source
from resonance.errors import AudioError, DataError, NoSoundError, TooLongError
from resonance.messages import _
from resonance.units import SAMPLE_RATE

LOUDEST = 1e4  # sound is from -1 to 1. Of 1e30 in a file of floats the log-mel spectrogram is no number
SPAN_SLACK_SECONDS = 0.25  # a span may end this much after the recording: manifests round, and count MP3 padding or not
MAX_WAV_SECONDS = (2**32 - 100) // (2 * SAMPLE_RATE)  # 37 hours: a WAV header counts bytes in 32 bits


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What the header of an audio file says."""

    duration: float  # seconds
    sample_rate: int  # samples per second
    channels: int
    format: str  # container and codec, e.g. "WAV PCM_16", "matroska,webm opus"


def read_audio(
    path: str | Path,
    start: float = 0.0,
    end: float | None = None,
    *,
    max_seconds: float | None = None,
    data: bytes | None = None,
) -> Samples:
    """The sound of a file, or of the span from `start` to `end` (seconds), as float32 [samples] at 16 kHz, mono.

    Values are as decoded, with no change of level; channels are averaged. All of what was asked for is there, and all of
    it is finite. Raises AudioError, which names the file and what is wrong with it, TooLongError when there is more than
    `max_seconds` of sound: decoding stops there. With `data`, the content of a file held in memory, `path` only names it.
    """
    with open_source(path, data) as source:
        if source.cut_off and end is None:
            raise end_missing(source.path)
        blocks = list(_bounded(source, start, end, max_seconds))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def iter_blocks(
    path: str | Path,
    start: float = 0.0,
    end: float | None = None,
    *,
    max_seconds: float | None = None,
    data: bytes | None = None,
) -> Iterator[Samples]:
    """Like `read_audio`, piece by piece in bounded memory: float32 [samples] at 16 kHz, some seconds each.

    A file that is damaged or cut off raises AudioError after its readable part.
    """
    with open_source(path, data) as source:
        yield from _bounded(source, start, end, max_seconds)


def probe(path: str | Path, data: bytes | None = None) -> AudioInfo:
    """Length and format of a file, or of its content `data`, without decoding it. Raises AudioError as far as the header
    shows a fault.

    Where the header states no length (a browser's WebM, MP3 without a length tag), packets are counted: 0.1 ms a second.
    """
    with open_source(path, data) as source:
        if source.cut_off:
            raise end_missing(source.path)
        if source.promised is None:
            duration = source.count_seconds()
        else:
            duration = source.promised
            _refuse_cut_off(source, source.readable, duration)
        return AudioInfo(duration, source.sample_rate, source.channels, source.format)


def write_wav(path: str | Path, audio: Samples | Iterable[Samples]) -> None:
    """Write float samples at 16 kHz, as one array [samples] or in blocks, as a 16-bit mono WAV file.

    Samples outside -1 … 1 are clipped. The file appears complete or not at all; missing folders are made. Raises
    DataError when it cannot be written, AudioError when a sample is not a number or there are more than 37 hours.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            with wave.open(stream, "wb") as file:
                file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
                for block in (audio,) if isinstance(audio, np.ndarray) else audio:
                    _refuse_impossible(path, block, file.tell() / SAMPLE_RATE)
                    if file.tell() + len(block) > MAX_WAV_SECONDS * SAMPLE_RATE:
                        raise _too_long(path, MAX_WAV_SECONDS)
                    file.writeframesraw(np.clip(np.rint(block * 32768.0), -32768, 32767).astype("<i2").tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            _("{path}: cannot be written ({reason}). Choose another folder or free some space.").format(
                path=path, reason=error.strerror or error
            )
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _bounded(source: Source, start: float, end: float | None, max_seconds: float | None) -> Iterator[Samples]:
    """The blocks of a span; TooLongError where the header or the samples show more than `max_seconds` of them."""
    limit = math.inf if max_seconds is None else round(max_seconds * SAMPLE_RATE) + 1
    known_end = end if end is not None else source.promised
    if known_end is not None and (min(known_end, source.readable) - start) * SAMPLE_RATE > limit:
        raise _too_long(source.path, max_seconds)
    total = 0
    for block in _at_16khz(source, start, end):
        total += len(block)
        if total > limit:
            raise _too_long(source.path, max_seconds)
        yield block


def _at_16khz(source: Source, start: float, end: float | None) -> Iterator[Samples]:
    rate, resampler = SAMPLE_RATE, None
    produced = 0
    for block_rate, block in _checked(source, start, end):
        if block_rate != rate:
            # Also in the middle of a file: recordings joined end to end change their rate.
            if resampler and len(rest := resampler.resample_chunk(np.zeros(0, np.float32), last=True)):
                yield rest
            rate = block_rate
            resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, quality="HQ")
        if resampler:
            block = resampler.resample_chunk(block)
            _refuse_impossible(source.path, block, start + produced / SAMPLE_RATE)
        if len(block):
            produced += len(block)
            yield block
    if resampler and len(rest := resampler.resample_chunk(np.zeros(0, np.float32), last=True)):
        yield rest


def _checked(source: Source, start: float, end: float | None) -> Blocks:
    """The blocks of a span; an AudioError where the span, the samples or the amount of sound are not right."""
    promised = source.promised
    if not (0 <= start < (math.inf if end is None else end)):
        raise _bad_span(source.path, start, end, promised)
    if promised and (start >= promised or (end is not None and end > promised + SPAN_SLACK_SECONDS)):
        raise _bad_span(source.path, start, end, promised)
    delivered = 0.0
    for rate, block in source.blocks(start, end):
        _refuse_impossible(source.path, block, start + delivered)
        delivered += len(block) / rate
        yield rate, block
    if promised is None and ((end is not None and start + delivered < end - source.slack) or (start and not delivered)):
        raise _bad_span(source.path, start, end, None)
    wanted_end = promised if end is None or promised is None else min(end, promised)
    _refuse_cut_off(source, start + delivered, wanted_end)
    if source.cut_off and (end is None or end > start + delivered):
        raise end_missing(source.path)
    if not delivered:
        raise NoSoundError(_("{path}: holds no sound (0 seconds). Record it again.").format(path=source.path))


def _refuse_impossible(path: Name, block: Samples, seconds: float) -> None:
    loudest = float(np.abs(block).max(initial=0))
    if loudest <= LOUDEST:
        return
    if math.isfinite(loudest):
        raise AudioError(
            _("{path}: holds samples of {found:.1e}; sound is from -1 to 1. Export it again as 16-bit WAV.").format(
                path=path, found=loudest
            )
        )
    raise AudioError(
        _(
            "{path}: holds samples that are not numbers (NaN or infinite), near {seconds:.2f} seconds. "
            "Export it again from the program that made it."
        ).format(path=path, seconds=seconds)
    )


def _refuse_cut_off(source: Source, readable: float, wanted: float | None) -> None:
    if wanted is not None and readable < wanted - source.slack:
        raise AudioError(
            _(
                "{path}: the file is cut off or damaged: only {readable:.2f} of {wanted:.2f} seconds can be read. "
                "Copy or record it again."
            ).format(path=source.path, readable=readable, wanted=wanted)
        )


def _bad_span(path: Name, start: float, end: float | None, duration: float | None) -> AudioError:
    span = f"{start:.2f}-{'' if end is None else f'{end:.2f}'}"
    if duration is None:
        return AudioError(
            _("{path}: seconds {span} are not in this recording. Correct start and end.").format(path=path, span=span)
        )
    return AudioError(
        _(
            "{path}: seconds {span} are not in this recording, which is {duration:.2f} seconds long. Correct start and end."
        ).format(path=path, span=span, duration=duration)
    )


def _too_long(path: Name, max_seconds: float | None) -> TooLongError:
    return TooLongError(
        _("{path}: longer than the {limit:g} seconds allowed. Cut it into shorter pieces.").format(
            path=path, limit=max_seconds
        )
    )
