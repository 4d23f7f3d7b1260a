"""Decoders behind one record: an open file, what its header says, and its samples in blocks at its own rate, in mono.

WAV, FLAC, OGG, AIFF and the like are decoded by libsndfile, everything else by FFmpeg (PyAV), chosen by the first bytes
of the file, never by its name. MP3 goes to FFmpeg although libsndfile reads it too: libsndfile's MP3 decoder prints to
the terminal on files that are fine (libsndfile issue 958), and the samples of both agree to 2e-6, seeking included.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from resonance.errors import AudioError, NoSoundError
from resonance.messages import _

Samples = npt.NDArray[np.float32]
Blocks = Iterator[tuple[int, Samples]]  # (samples per second, mono samples) as the file has them
Name = Path | str  # of a file, or of what is held in memory, for messages

BLOCK_VALUES = 1 << 18  # float32 values decoded at once, all channels together: 1 MiB, 16 s of 16 kHz mono
# Outside, a header is forged or broken: sound of 1 Hz becomes 16,000 times as long.
MIN_SOURCE_RATE = 1_000
MAX_SOURCE_RATE = 768_000
EXACT_SECONDS = 0.02  # libsndfile formats: some recorders count their 44 header bytes as sound
PACKET_SECONDS = 0.25  # FFmpeg formats: encoder delay and padding are counted by some headers and not by others
PREROLL_SECONDS = 0.25  # decoded and dropped before a span, until the decoder has settled

SOUNDFILE_STARTS = (b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"OggS", b"FORM", b".snd", b"caff", b"NIST")
MP3_LENGTH_TAGS = (b"Xing", b"Info", b"VBRI")  # in the first frame, with the number of frames
OGG_PAGE_BYTES = 27 + 255 + 255 * 255  # the longest: header, lengths of its parts, parts
# FFmpeg containers whose header states the length. In the others FFmpeg guesses it from the bit rate (off by 57 % on a
# recording with pauses), so it is counted.
FORMATS_WITH_LENGTH = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "asf", "flac", "mp3"}


@dataclass(frozen=True, slots=True)
class Source:
    """An open file. `blocks(start, end)` decodes a span given in seconds."""

    path: Name
    sample_rate: int
    channels: int
    format: str
    promised: float | None  # seconds, where the header states them
    readable: float  # seconds that can be there at most, from the size of the file
    slack: float  # seconds that the promise may be off
    blocks: Callable[[float, float | None], Blocks]
    count_seconds: Callable[[], float]  # without decoding
    cut_off: bool = False  # the end is missing, and nothing says how much of it


@contextlib.contextmanager
def open_source(path: Name, data: bytes | None = None) -> Iterator[Source]:
    """Open an audio or video file, or `data`, the content of one, which then is called `path`.

    Raises AudioError when it is not there, may not be read or holds no sound.
    """
    with contextlib.ExitStack() as stack:
        handle: BinaryIO
        if data is not None:
            handle, head, size = io.BytesIO(data), data[:512], len(data)
        else:
            handle, head, size = _open_file(Path(path), stack)
        if not size:
            raise NoSoundError(_("{path}: the file is empty (0 bytes). Copy or record it again.").format(path=path))
        if head.startswith(SOUNDFILE_STARTS) and (file := _open_soundfile(path, data)):
            stack.callback(file.close)
            yield _soundfile_source(path, data, file, handle, head)
            return
        yield _av_source(path, handle, head, stack)


def _open_file(path: Path, stack: contextlib.ExitStack) -> tuple[BinaryIO, bytes, int]:
    """The open file, its first bytes and its size."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise AudioError(_("{path}: this is a folder. Give an audio file.").format(path=path))
        if not stat.S_ISREG(found.st_mode):
            raise AudioError(_("{path}: not a file but a device or pipe. Give an audio file.").format(path=path))
        handle = stack.enter_context(path.open("rb"))
        head = handle.read(512)
    except FileNotFoundError:
        raise AudioError(
            _("{path}: no such file. Check the name and the folder it is looked for in.").format(path=path)
        ) from None
    except PermissionError:
        raise AudioError(
            _("{path}: you have no permission to read this file. Ask its owner, or copy it.").format(path=path)
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise AudioError(_("{path}: cannot be read ({reason}).").format(path=path, reason=reason)) from error
    return handle, head, found.st_size


def _open_soundfile(path: Name, data: bytes | None) -> soundfile.SoundFile | None:
    """None when libsndfile does not know the encoding, or when FFmpeg does better."""
    try:
        # Bytes, because names that are not UTF-8 (a GBK archive unpacked on Linux) cannot be passed as text.
        name = str(path) if os.name == "nt" else os.fsencode(path)
        file = soundfile.SoundFile(name if data is None else io.BytesIO(data))
    except soundfile.LibsndfileError:
        return None
    # 0: a WAV recorder that crashed leaves a length of 0 before all of its sound. 2**62: FLAC of unknown length.
    if 0 < file.frames < 2**62:
        return file
    file.close()
    return None


def _soundfile_source(
    path: Name, data: bytes | None, file: soundfile.SoundFile, handle: BinaryIO, head: bytes
) -> Source:
    rate = file.samplerate
    _check_rate(path, rate)
    promised = readable = file.frames / rate
    if head[:4] == b"RIFF":
        # libsndfile shortens a file that was cut off without a word; the data chunk tells.
        claimed = readable * _promised_share(handle, head)
        promised = claimed if claimed > readable + EXACT_SECONDS else readable

    def blocks(start: float, end: float | None) -> Blocks:
        last = file.frames if end is None else min(file.frames, round(end * rate))
        return _soundfile_blocks(path, data, file, round(start * rate), last)

    form = f"{file.format} {file.subtype}"
    cut_off = head[:4] == b"OggS" and _ogg_cut_off(handle)
    return Source(path, rate, file.channels, form, promised, readable, EXACT_SECONDS, blocks, lambda: readable, cut_off)


def _promised_share(handle: BinaryIO, head: bytes) -> float:
    """How many times the sound that is there a WAV header announces: 1.0 when the file is complete."""
    size = handle.seek(0, os.SEEK_END)
    position = 12
    while position + 8 <= size:
        if position + 8 > len(head):
            handle.seek(position)
            name_and_length = handle.read(8)
        else:
            name_and_length = head[position : position + 8]
        length = int.from_bytes(name_and_length[4:], "little")
        if name_and_length[:4] == b"data":
            there = size - position - 8
            # Programs that write to a pipe announce 2 GB or 4 GB because they cannot know.
            return 1.0 if length >= 0x7FFF_0000 or not there else max(1.0, length / there)
        position += 8 + length + length % 2
    return 1.0


def _ogg_cut_off(handle: BinaryIO) -> bool:
    """Whether the file ends in the middle of a page, which libsndfile leaves out without a word."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(max(0, size - OGG_PAGE_BYTES))
    tail = handle.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    return len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def _soundfile_blocks(path: Name, data: bytes | None, file: soundfile.SoundFile, first: int, last: int) -> Blocks:
    weights = np.full(file.channels, 1 / file.channels, np.float32)
    step = max(1, BLOCK_VALUES // file.channels)
    position = first
    with contextlib.ExitStack() as reopened:
        while position < last:
            try:
                if file.tell() != position:
                    file.seek(position)
                block = file.read(min(step, last - position), dtype="float32", always_2d=True)  # [samples, channels]
            except soundfile.LibsndfileError:
                # Damaged from somewhere in this block on: smaller steps find how much of it can be read.
                step //= 4
                if step < file.samplerate * EXACT_SECONDS:
                    return
                if again := _open_soundfile(path, data):
                    file = reopened.enter_context(again)
                continue
            if not len(block):
                return
            position += len(block)
            # A product takes 0.08 ms for 3 s of stereo, mean(axis=1) 2.5 ms.
            yield file.samplerate, block[:, 0] if file.channels == 1 else block @ weights


def _av_source(path: Name, handle: BinaryIO, head: bytes, stack: contextlib.ExitStack) -> Source:
    import av

    try:
        # From the open file, so that no name is taken for an address, and no playlist makes FFmpeg open anything else.
        handle.seek(0)
        container = stack.enter_context(
            av.open(handle, options={"protocol_whitelist": "none"}, metadata_errors="ignore")
        )
    except (av.FFmpegError, ValueError) as error:
        raise _not_audio(path, head, error) from error
    stream = container.streams.best("audio")
    if stream is None:
        # FFmpeg takes some texts for subtitles.
        raise _text_file(path, head) or AudioError(
            _("{path}: there is no audio track in it. Record it again with the microphone on.").format(path=path)
        )
    if stream.codec_context is None:
        raise AudioError(
            _("{path}: its audio track is encoded or protected in a way that cannot be read. Save it as WAV.").format(
                path=path
            )
        )
    name = container.format.name

    def count_seconds() -> float:
        first, last = None, 0.0
        with contextlib.suppress(av.FFmpegError):
            for packet in container.demux(stream):
                if packet.pts is not None:
                    first = packet.pts if first is None else first
                    last = float((packet.pts + (packet.duration or 0) - first) * stream.time_base)
        return last

    return Source(
        path,
        stream.codec_context.sample_rate,
        stream.codec_context.channels,
        f"{name} {stream.codec_context.name}",
        _stated_seconds(container, stream, handle, head),
        math.inf,
        PACKET_SECONDS,
        lambda start, end: _joined(_av_frames(path, container, stream, start, end)),
        count_seconds,
    )


def _stated_seconds(container: Any, stream: Any, handle: BinaryIO, head: bytes) -> float | None:
    """Seconds of the audio track, where the container's header states them."""
    name = container.format.name
    if name not in FORMATS_WITH_LENGTH or (name == "mp3" and not _mp3_states_length(handle, head)):
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base) or None
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):  # Matroska, per track
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    # Of the whole file: the audio track's own only if there is no other.
    return container.duration / 1e6 if container.duration and len(container.streams) == 1 else None


def _mp3_states_length(handle: BinaryIO, head: bytes) -> bool:
    if head[:3] == b"ID3":
        # A tag before the sound: its length is four bytes of seven bits each.
        position = handle.tell()
        handle.seek(10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)))
        head = handle.read(512)
        handle.seek(position)
    return any(tag in head for tag in MP3_LENGTH_TAGS)


def _av_frames(path: Name, container: Any, stream: Any, start: float, end: float | None) -> Blocks:
    """Decoded frames of the span, mixed to mono."""
    import av

    origin = float((stream.start_time or 0) * stream.time_base)
    if start:
        container.seek(int((max(0.0, start - PREROLL_SECONDS) + origin) / stream.time_base), stream=stream)
    # In seconds; after a seek, where the first frame says it is. Matroska's marks are whole milliseconds.
    position = None if start else 0.0
    lost_seconds = 0.0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:  # the file ends in the middle of a packet
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.FFmpegError:
            lost_seconds += float((packet.duration or 0) * stream.time_base) or EXACT_SECONDS
            if lost_seconds > PACKET_SECONDS:
                raise AudioError(
                    _("{path}: the file is damaged {seconds:.1f} seconds in. Copy or record it again.").format(
                        path=path, seconds=position or 0.0
                    )
                ) from None
            continue
        for frame in frames:
            rate = frame.sample_rate
            _check_rate(path, rate)
            if position is None:
                if frame.pts is None:
                    raise AudioError(
                        _("{path}: has no time marks to find the span by. Convert it to WAV first.").format(path=path)
                    )
                position = float(frame.pts * frame.time_base) - origin
            block = _mono(frame)
            skip = max(0, round((start - position) * rate))
            keep = len(block) if end is None else round((end - position) * rate)
            position += len(block) / rate
            if len(block := block[skip : max(0, keep)]):
                yield rate, block
            if end is not None and position >= end:
                return


def _mono(frame: Any) -> Samples:
    values = frame.to_ndarray()  # planar: [channels, samples]; packed: [1, samples * channels]
    channels = frame.layout.nb_channels
    if not frame.format.is_planar:
        values = values.reshape(-1, channels).T
    if values.dtype.kind in "iu":
        full_scale = 2.0 ** (8 * values.dtype.itemsize - 1)
        values = (values.astype(np.float32) - (full_scale if values.dtype.kind == "u" else 0)) / full_scale
    return np.asarray(values[0] if channels == 1 else values.mean(axis=0), dtype=np.float32)


def _joined(frames: Blocks) -> Blocks:
    """The same samples in blocks of a useful size: a frame has 20 to 70 ms."""
    parts: list[Samples] = []
    rate = held = 0
    for frame_rate, block in frames:
        if parts and (frame_rate != rate or held >= BLOCK_VALUES):
            yield rate, np.concatenate(parts)
            parts, held = [], 0
        rate = frame_rate
        held += len(block)
        parts.append(block)
    if parts:
        yield rate, np.concatenate(parts)


def _check_rate(path: Name, rate: int) -> None:
    if not MIN_SOURCE_RATE <= rate <= MAX_SOURCE_RATE:
        raise AudioError(
            _(
                "{path}: its header claims {rate} samples per second; sound has {least} to {most}. The file is damaged."
            ).format(path=path, rate=rate, least=MIN_SOURCE_RATE, most=MAX_SOURCE_RATE)
        )


def _not_audio(path: Name, head: bytes, error: Exception) -> AudioError:
    if head[4:8] == b"ftyp" or head[:4] == b"OggS":
        return end_missing(path)
    return _text_file(path, head) or AudioError(
        _(
            "{path}: no sound that can be decoded ({reason}). Check that a media player plays it; if so, save it as WAV."
        ).format(path=path, reason=getattr(error, "strerror", None) or error)
    )


def _text_file(path: Name, head: bytes) -> AudioError | None:
    """What to say of a file that begins with nothing but text; None of any other."""
    if re.search(rb"[\0-\x08\x0e-\x1f]", head):
        return None
    beginning = " ".join(head[:200].decode("utf-8", errors="replace").split())[:40]
    return AudioError(
        _("{path}: this is a text file, not audio. It begins with “{beginning}”.").format(
            path=path, beginning=beginning
        )
    )


def end_missing(path: Name) -> AudioError:
    return AudioError(_("{path}: the file is cut off: its end is missing. Copy or record it again.").format(path=path))
