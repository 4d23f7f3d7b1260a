"""Augmentation changes copies, the same way for the same seed, and never loses speech."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resonance.data.augment import Augmentation, mask_features, vary_clip

MASKS = Augmentation(mask_time_prob=0.3, mask_time_length=5, mask_feature_prob=0.2, mask_feature_length=8)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_masking_leaves_its_input_as_it_was_and_repeats_with_the_seed() -> None:
    mel = torch.rand(80, 300) + 1.0
    before = mel.clone()
    first, again, other = (mask_features(mel, 200, MASKS, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(mel, before)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[first != 0], mel[first != 0])  # masked to 0, else untouched


def test_time_masks_fall_on_the_clip_and_cover_about_the_share_asked_for() -> None:
    only_time = Augmentation(mask_time_prob=0.2, mask_time_length=5)
    mel = torch.ones(80, 400)
    shares = []
    for seed in range(200):
        masked = mask_features(mel, 100, only_time, generator(seed))
        assert masked[:, 100:].all()  # behind the clip is nothing to hide
        shares.append(float((masked[0, :100] == 0).float().mean()))
    # Masks may overlap: 4 masks of 5 frames in 100 cover 18 % on average.
    assert 0.15 < np.mean(shares) < 0.20


def test_a_clip_shorter_than_a_mask_is_never_hidden_as_a_whole() -> None:
    mel = torch.ones(80, 100)
    masked = mask_features(mel, 5, Augmentation(mask_time_prob=1.0, mask_time_length=10), generator(0))
    assert torch.equal(masked, mel)


def test_speed_and_level_change_within_their_bounds_and_repeat_with_the_seed() -> None:
    amount = Augmentation(speed=0.1, gain_db=6.0)
    audio = (0.2 * np.sin(np.arange(16_000) / 20)).astype(np.float32)
    before = audio.copy()
    varied = [vary_clip(audio, amount, generator(seed)) for seed in range(30)]
    assert np.array_equal(audio, before)
    assert np.array_equal(varied[3], vary_clip(audio, amount, generator(3)))
    assert all(v.dtype == np.float32 for v in varied)
    lengths = [len(v) / len(audio) for v in varied]
    assert 1 / 1.1 - 1e-3 < min(lengths) < 0.95 and 1.05 < max(lengths) < 1 / 0.9 + 1e-3
    peaks = [np.abs(v).max() for v in varied]
    assert 0.19 / 2 < min(peaks) < 0.14 and 0.28 < max(peaks) < 0.43  # resampling rings a little
    loud = vary_clip(np.float32(0.9) * np.sign(audio), Augmentation(gain_db=20.0), generator(1))
    assert np.abs(loud).max() <= 1.0


@pytest.mark.parametrize("seconds", [4.9, 5.0, 6.0])
def test_no_clip_is_slowed_down_beyond_what_the_encoder_sees(seconds: float) -> None:
    # A clip cut off at the end of the context would be trained with words that are not in it.
    audio = np.zeros(round(seconds * 16_000), dtype=np.float32)
    amount = Augmentation(speed=0.5, max_seconds=5.0)
    longest = max(len(vary_clip(audio, amount, generator(seed))) for seed in range(50))
    assert longest <= max(len(audio), 5.0 * 16_000) + 1
