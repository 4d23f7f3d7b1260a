"""Features are what WhisperFeatureExtractor computes, at the clip's own length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from resonance.data.audio import read_audio
from resonance.data.audio_context import AudioContext
from resonance.data.batches import batch_features
from resonance.data.features import log_mel
from resonance.units import HOP_LENGTH, SAMPLE_RATE

TOLERANCE = 1e-4
WINDOW_FRAMES = 3000


def speech_like(samples: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    swell = np.abs(np.sin(np.arange(samples) / 3000))
    return (0.3 * swell * random.standard_normal(samples)).astype(np.float32)


def extractor_features(audio: np.ndarray, n_mels: int) -> torch.Tensor:
    stock = WhisperFeatureExtractor(feature_size=n_mels)
    features: torch.Tensor = stock(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features[0]
    return features


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize(
    ("samples", "frames"),
    [
        (160, 4),  # 10 ms, shorter than the analysis window
        (401, 100),
        (SAMPLE_RATE, 100),  # the audio ends where the last frame does
        (SAMPLE_RATE, 160),
        (3 * SAMPLE_RATE + 17, 320),
        (29 * SAMPLE_RATE, WINDOW_FRAMES),
        (30 * SAMPLE_RATE - 1, WINDOW_FRAMES),
        (30 * SAMPLE_RATE, WINDOW_FRAMES),  # the extractor mirrors the end of a full window
    ],
)
def test_features_equal_the_extractors(samples: int, frames: int, n_mels: int) -> None:
    audio = speech_like(samples)
    ours = log_mel(torch.from_numpy(audio)[None], frames, n_mels)
    assert ours.shape == (1, n_mels, frames)
    torch.testing.assert_close(ours[0], extractor_features(audio, n_mels)[:, :frames], atol=TOLERANCE, rtol=0)


def test_clips_of_one_batch_do_not_change_each_other() -> None:
    clips = [speech_like(9_000, seed=1), 0.01 * speech_like(30_000, seed=2)]  # one 40 dB quieter
    together = batch_features(clips, AudioContext("auto", 0.5), 80)
    for clip, features in zip(clips, together, strict=True):
        expected = extractor_features(clip, 80)[:, : features.shape[-1]]
        torch.testing.assert_close(features, expected, atol=TOLERANCE, rtol=0)


def test_behind_the_clip_is_what_the_extractor_computes_for_silence() -> None:
    audio = speech_like(SAMPLE_RATE)
    features = log_mel(torch.from_numpy(audio)[None], 300, 80)[0]
    silence = features[:, SAMPLE_RATE // HOP_LENGTH + 2 :]
    assert silence.unique().numel() == 1
    assert float(silence[0, 0]) == pytest.approx(float(features.max()) - 2.0, abs=1e-5)  # 8 decades below, / 4


def test_features_of_real_speech_equal_the_extractors(shared: Path) -> None:
    folder = shared / "data" / "torgo" / "audio"
    for path in sorted(folder.iterdir())[::150]:
        audio = read_audio(path)
        ours = batch_features([audio], AudioContext("auto", 0.6), 80)[0]
        torch.testing.assert_close(ours, extractor_features(audio, 80)[:, : ours.shape[1]], atol=TOLERANCE, rtol=0)
