"""Features kept on disk, so that only the first pass through the recordings decodes them.

One safetensors file for each clip, under a name made of the audio's content and of what its features depend on.
So the same recording is found again in another folder, by another training and after a crash, and one that was changed is not.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from resonance.data.audio import read_audio
from resonance.data.features import log_mel
from resonance.data.manifest import Utterance
from resonance.units import GIBIBYTE, HOP_LENGTH, N_FFT, WINDOW_FRAMES

VERSION = 1  # part of every name: a change of decoding, resampling or features makes the old files unused
WHOLE_BYTES = 16 << 20  # files up to this size are told apart by all of their content
PART_BYTES = 1 << 20
LEFT_FREE = 2 * GIBIBYTE  # of the disk: checkpoints need it more
REMEMBERED = 4096  # digests: rows that are parts of one long file ask for the same one


class Features(NamedTuple):
    """Features of one clip."""

    values: (
        np.ndarray
    )  # float16 [n_mels, frames]: to the first frame that hears only silence, or all 3000 of the window
    samples: int  # of the audio


class FeatureCache:
    """Log-mel features of rows, from `folder` where they have been computed before.

    Worker processes share the folder: files are written under another name first. A file that is damaged is computed and
    written again; where nothing can be written (a disk that is nearly full), features are computed each time, and are the same.
    """

    def __init__(self, folder: Path, n_mels: int) -> None:
        self.folder = folder
        self.n_mels = n_mels
        self.writes = True

    def features(self, row: Utterance) -> Features:
        """Of a clip. Raises AudioError where it cannot be read and is not known."""
        file = self._file(row)
        known = self._read(file) if file else None
        if known is not None:
            return known
        audio = read_audio(row.audio, row.start, row.end)
        features = Features(clip_features(audio, self.n_mels), len(audio))
        if file and self.writes:
            self._write(file, features)
        return features

    def _file(self, row: Utterance) -> Path | None:
        try:
            stat = Path(row.audio).stat()
            content = content_digest(str(row.audio), stat.st_size, stat.st_mtime_ns)
        except OSError:  # decoding says what is wrong
            return None
        text = f"{VERSION} {content} {row.start!r} {row.end!r} {self.n_mels}"
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _read(self, file: Path) -> Features | None:
        try:
            found = load_file(file)
            values, samples = found["values"], found["samples"]
        except (OSError, SafetensorError, KeyError):
            return None
        if values.dtype != np.float16 or values.shape[:1] != (self.n_mels,) or samples.shape != (1,):
            return None
        return Features(values, int(samples[0]))

    def _write(self, file: Path, features: Features) -> None:
        part = file.with_name(f"{file.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(file.parent).free < LEFT_FREE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save_file({"values": features.values, "samples": np.array([features.samples])}, part)
            part.replace(file)
        except (OSError, SafetensorError):
            self.writes = False
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def clip_features(audio: np.ndarray, n_mels: int) -> np.ndarray:
    """Features float16 [n_mels, frames] of a clip float32 [samples], as `Features.values`."""
    reached = -(-(len(audio) + N_FFT // 2) // HOP_LENGTH)  # frames whose window holds audio
    # The last 200 samples of 30 s are mirrored behind their end: see log_mel.
    frames = WINDOW_FRAMES if reached >= WINDOW_FRAMES else reached + 1
    features: np.ndarray = log_mel(torch.from_numpy(audio)[None], frames, n_mels)[0].to(torch.float16).numpy()
    return features


def padded(clips: Sequence[Features], frames: int) -> torch.Tensor:
    """Features of clips at a common length, float32 [batch, n_mels, frames], with silence behind each one's end."""
    batch = torch.empty(len(clips), len(clips[0].values), frames)
    for row, clip in zip(batch, clips, strict=True):
        known = min(frames, clip.values.shape[1])
        row[:, :known] = torch.from_numpy(clip.values[:, :known])
        row[:, known:] = float(clip.values[0, -1])  # silence is the same in all bands and frames
    return batch


@functools.lru_cache(maxsize=REMEMBERED)
def content_digest(path: str, size: int, modified_ns: int) -> str:
    """Of a file's content; of a large one its size, its time and both ends, because it would be read for every row."""
    digest = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as stream:
        if size <= WHOLE_BYTES:
            digest.update(stream.read())
        else:
            digest.update(f"{size} {modified_ns}".encode())
            digest.update(stream.read(PART_BYTES))
            stream.seek(-PART_BYTES, os.SEEK_END)
            digest.update(stream.read(PART_BYTES))
    return digest.hexdigest()
