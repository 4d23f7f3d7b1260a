"""Log-mel features of the clip's own length.

Equal to `WhisperFeatureExtractor` (which pads every clip to 30 s first) to within float rounding, for as many frames as
are asked for: the frames behind the audio hold what the extractor computes for digital silence.
"""

from __future__ import annotations

import functools

import torch

from resonance.units import HOP_LENGTH, N_FFT, SAMPLE_RATE, WINDOW_SECONDS

WINDOW_SAMPLES = int(WINDOW_SECONDS * SAMPLE_RATE)


@functools.cache
def mel_filters(n_mels: int) -> torch.Tensor:
    """Slaney mel filters for 0-8 kHz, [n_mels, 201], as WhisperFeatureExtractor builds them."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=1 + N_FFT // 2,
        num_mel_filters=n_mels,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).to(torch.float32).T.contiguous()


@functools.cache
def hann_window() -> torch.Tensor:
    return torch.hann_window(N_FFT)


def log_mel(audio: torch.Tensor, frames: int, n_mels: int) -> torch.Tensor:
    """Features of a batch of clips at 16 kHz, each followed by silence to the same length.

    audio: float32 [batch, samples], zero behind each clip's end; samples past `frames` * 160 are cut off.
    Returns float32 [batch, n_mels, frames].
    """
    samples = frames * HOP_LENGTH
    half = N_FFT // 2
    audio = torch.nn.functional.pad(audio[:, :samples], (0, max(0, samples - audio.shape[1])))
    # The extractor's transform is centred on 30 s: mirrored audio before and behind them, silence behind a shorter clip.
    before = audio[:, 1 : half + 1].flip(1)
    after = audio[:, -half - 1 : -1].flip(1) if samples == WINDOW_SAMPLES else audio.new_zeros(len(audio), half)
    padded = torch.cat([before, audio, after], dim=1)
    spectrum = torch.stft(padded, N_FFT, HOP_LENGTH, window=hann_window(), center=False, return_complex=True)
    power = spectrum[..., :frames].abs() ** 2  # [batch, 201, frames]
    mel = mel_filters(n_mels) @ power  # [batch, n_mels, frames]
    log_spec = mel.clamp(min=1e-10).log10()
    log_spec = torch.maximum(log_spec, log_spec.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (log_spec + 4.0) / 4.0
