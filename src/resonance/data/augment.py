"""Small changes to clips while training, so that few recordings go further.

Every function takes its own random generator: the same seed gives the same change, whichever worker makes it and
however often a run was resumed. Nothing is changed in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr
import torch

from resonance.units import SAMPLE_RATE, WINDOW_SECONDS


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How much may change. Zeros leave the clips as they are."""

    speed: float = 0.0  # 0.1: between 90 % and 110 % of the speed, pitch included
    max_seconds: float = WINDOW_SECONDS  # no clip is slowed down beyond what the encoder sees
    gain_db: float = 0.0  # 6: between -6 dB and +6 dB
    mask_time_prob: float = 0.0  # share of a clip's frames that SpecAugment masks
    mask_time_length: int = 10  # frames of one time mask
    mask_feature_prob: float = 0.0  # share of the mel bins that SpecAugment masks
    mask_feature_length: int = 10  # bins of one mask


def vary_clip(audio: np.ndarray, amount: Augmentation, random: np.random.Generator) -> np.ndarray:
    """Speed and level of one clip, float32 [samples] to float32 [other samples], peaks kept below full scale."""
    if amount.speed:
        slowest = max(1.0 - amount.speed, min(len(audio) / (amount.max_seconds * SAMPLE_RATE), 1.0))
        factor = random.uniform(slowest, 1.0 + amount.speed)
        audio = soxr.resample(audio, SAMPLE_RATE * factor, SAMPLE_RATE)
    if amount.gain_db:
        gain = 10 ** (random.uniform(-amount.gain_db, amount.gain_db) / 20)
        peak = float(np.abs(audio).max(initial=0.0))
        audio = audio * np.float32(min(gain, 1.0 / peak) if peak else gain)
    return audio


def mask_features(mel: torch.Tensor, frames: int, amount: Augmentation, random: np.random.Generator) -> torch.Tensor:
    """SpecAugment (arXiv 1904.08779) on one clip: [n_mels, frames] with stretches of time and of mel bins set to 0.

    Only the first `frames` frames, where the clip is, are masked. The number of masks is probability x length / mask
    length, rounded at random, as in transformers' `_compute_mask_indices`.
    """
    mel = mel.clone()
    for length, size, probability, axis in (
        (amount.mask_time_length, frames, amount.mask_time_prob, 1),
        (amount.mask_feature_length, mel.shape[0], amount.mask_feature_prob, 0),
    ):
        if not probability or size <= length:
            continue
        for _mask in range(int(probability * size / length + random.random())):
            start = int(random.integers(0, size - length + 1))
            mel.narrow(axis, start, length).zero_()
    return mel
