"""Whether features are worth keeping on disk: by the passes, by their size and by what preparing them takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from resonance.config import TrainConfig
from resonance.messages import _
from resonance.plan.devices import Device
from resonance.plan.recordings import Recordings
from resonance.units import FRAMES_PER_SECOND, GIBIBYTE

# Of one processor core, to decode a recording and compute its features. Measured: 0.4 to 0.5 ms a second of 16 kHz WAV and FLAC
# (benchmarks/feature_cache.py); decoding alone 0.6 of 44 kHz FLAC, 0.7 of MP3, 1.0 of 48 kHz M4A, 2.8 of Opus. From the cache it
# is less than 0.1 ms a recording.
PREPARE_SECONDS, PREPARE_SECONDS_A_SECOND = 0.0005, 0.001
# Shares of the cores that prepare audio: beyond them a GPU may come to wait, or the model's own computing is slowed down.
BUSY = {"cuda": 0.5, "mps": 0.5, "cpu": 0.05}
FREE_DISK_SHARE = 0.2
FREE_DISK_ELSEWHERE = 250 * GIBIBYTE  # of a machine that is planned for


def cached_bytes(recordings: Recordings, n_mels: int) -> int:
    """What the features of the recordings to train on take on disk, 16 bits each, in blocks of 4 KiB."""
    frames = recordings.hours * 3600 * FRAMES_PER_SECOND + 3 * recordings.clips
    return int(frames * n_mels * 2) + recordings.clips * (160 + 2048)  # a header, and half a block that is not used


def feature_cache(
    config: TrainConfig,
    device: Device,
    recordings: Recordings,
    n_mels: int,
    *,
    passes: float,
    clips_per_second: float,
    workers: int,
) -> tuple[Literal["none", "disk"], str]:
    """The choice and its reason. `workers` processes prepare audio for a training of `clips_per_second`."""
    if config.speed_perturbation or config.gain_db:
        return "none", _("recordings are changed in every pass")
    if passes < 2:
        return "none", _("every recording is heard about once")
    seconds = recordings.hours * 3600 / recordings.clips
    busy = clips_per_second * (PREPARE_SECONDS + PREPARE_SECONDS_A_SECOND * seconds) / max(workers, 1)
    if busy <= BUSY[device.kind]:
        return "none", _("audio is prepared faster than it is learnt from")
    size = cached_bytes(recordings, n_mels)
    if size > FREE_DISK_SHARE * free_disk(config.feature_cache_dir or config.output_dir, device):
        return "none", _("{size:.1f} GiB would be much of the free disk").format(size=size / GIBIBYTE)
    return "disk", _("{passes:.0f} passes decode once: {size:.1f} GiB on disk").format(
        passes=passes, size=size / GIBIBYTE
    )


def free_disk(folder: Path, device: Device) -> int:
    """Bytes that are free where `folder` is or will be."""
    if not device.here:
        return FREE_DISK_ELSEWHERE
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
