"""Batches of clips of similar length, computed at the length of their audio.

Whisper pads every clip to 30 s; a 3 s phrase then spends 90 % of the encoder on silence. Here a batch is as long as its
longest clip and a margin, rounded up to one of a few lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from resonance.data.audio import read_audio
from resonance.data.audio_context import AudioContext
from resonance.data.augment import Augmentation, mask_features, vary_clip
from resonance.data.feature_cache import FeatureCache, Features, padded
from resonance.data.features import log_mel
from resonance.data.manifest import Utterance
from resonance.data.tokens import IGNORED_LABEL, LabelTokenizer, TokenPair
from resonance.units import (
    FRAMES_PER_POSITION,
    HOP_LENGTH,
    SAMPLE_RATE,
    SAMPLES_PER_POSITION,
)


class Draw(NamedTuple):
    """One clip of one epoch: its row, and the seed of what augmentation does to it there."""

    row: int
    seed: int
    longest: float = 0.0  # seconds of the longest clip that one optimiser step sees together with this one
    counts: bool = True  # False: only there so that all processes have a batch; nothing is learnt from it


class Clip(NamedTuple):
    """One row, decoded or with its features from the cache."""

    audio: np.ndarray | Features  # float32 [samples] at 16 kHz, or what was computed from it
    tokens: TokenPair
    masks: Augmentation | None  # SpecAugment to apply to its features
    mask_seed: int
    longest: float = 0.0  # seconds that its batch has room for at least, before the margin

    def without_labels(self) -> Clip:
        """The same with nothing to learn from."""
        return self._replace(tokens=TokenPair(self.tokens.decoder_input_ids, [IGNORED_LABEL] * len(self.tokens.labels)))


@dataclass(frozen=True, slots=True)
class ClipMaker:
    """From a row and its sound to a clip, augmented where that is asked for."""

    tokenizer: LabelTokenizer
    augmentation: Augmentation | None
    timestamp_fraction: float

    def __call__(
        self, row: Utterance, read: Callable[[], np.ndarray | Features], longest: float, random: np.random.Generator
    ) -> Clip:
        # Timestamps would be wrong on audio whose speed was changed, so a clip gets one or the other.
        timestamps = bool(row.segments) and random.random() < self.timestamp_fraction
        audio = read()
        if self.augmentation:
            longest = min(longest / (1 - self.augmentation.speed), self.augmentation.max_seconds)
            if not timestamps and not isinstance(audio, Features):
                audio = vary_clip(audio, self.augmentation, random)
        tokens = self.tokenizer.encode(row, timestamps=timestamps)
        return Clip(audio, tokens, self.augmentation, int(random.integers(2**31)), longest)


class ClipDataset(Dataset[Clip]):
    """Rows decoded when they are asked for: nothing is kept in memory, so it does not grow with the data.

    With a `cache`, their features come from it, and augmentation can only hide parts of them.
    """

    def __init__(
        self,
        rows: Sequence[Utterance],
        tokenizer: LabelTokenizer,
        *,
        augmentation: Augmentation | None = None,
        timestamp_fraction: float = 0.0,
        cache: FeatureCache | None = None,
    ) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.augmentation = augmentation
        self.timestamp_fraction = timestamp_fraction
        self.cache = cache

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw | int) -> Clip:
        index, seed, longest, counts = draw if isinstance(draw, tuple) else Draw(draw, 0)
        row = self.rows[index]
        maker = ClipMaker(self.tokenizer, self.augmentation, self.timestamp_fraction)

        def read() -> np.ndarray | Features:
            return self.cache.features(row) if self.cache else read_audio(row.audio, row.start, row.end)

        clip = maker(row, read, longest, np.random.default_rng((seed, index)))
        return clip if counts else clip.without_labels()


class LengthGroupedSampler(Sampler[Draw]):
    """Shuffles, then puts clips of similar length next to each other in groups of one effective batch.

    A group holds the samples of one optimiser step however they are divided into accumulation steps and processes, so
    8x1, 4x2 and two processes with 4 each see the same ones, and at the same audio context: that of the longest in the
    group. The order depends only on `seed` and the epoch.

    `together` is the number of clips that all processes read at once. Where the last of them are missing, draws that do
    not count fill up: accelerate would give some rows a second time.
    """

    mixing = 0.05  # lengths are compared with +-5 % noise: neighbours change from epoch to epoch

    def __init__(self, durations: Sequence[float], group_size: int, seed: int, together: int = 1) -> None:
        self.durations = np.asarray(durations, dtype=np.float64)
        self.group_size = group_size
        self.together = together
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.durations) // self.together) * self.together

    def __iter__(self) -> Iterator[Draw]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.durations))
        noisy = self.durations * random.uniform(1 - self.mixing, 1 + self.mixing, len(order))
        pool_size = 50 * self.group_size
        groups = []
        for first in range(0, len(order), pool_size):
            pool = order[first : first + pool_size]
            pool = pool[np.argsort(noisy[pool], kind="stable")]
            # The incomplete group, which must come last, is a random one, not always that of the longest clips.
            spare = len(pool) % self.group_size
            left_over = np.sort(random.choice(len(pool), spare, replace=False))
            full = np.delete(pool, left_over)
            groups += [full[i : i + self.group_size] for i in range(0, len(full), self.group_size)]
            incomplete = pool[left_over]
        shuffled = [groups[i] for i in random.permutation(len(groups))]
        clip_seed = int(random.integers(2**31))
        for group in [*shuffled, incomplete]:
            longest = float(self.durations[group].max(initial=0.0))
            for index in group:
                yield Draw(int(index), clip_seed, longest)
        for _filler in range(len(self) - len(order)):
            yield Draw(int(incomplete[0]), clip_seed, longest, counts=False)


class InOrderSampler(Sampler[Draw]):
    """All rows in their order, filled up to a multiple of `together` with draws that do not count.

    `together` is the number of clips that all processes read at once. accelerate would fill up with rows that do count, and
    the loss of their batch would be another one than in a single process.
    """

    def __init__(self, rows: int, together: int) -> None:
        self.rows = rows
        self.together = together

    def __len__(self) -> int:
        return -(-self.rows // self.together) * self.together

    def __iter__(self) -> Iterator[Draw]:
        for index in range(len(self)):
            yield Draw(min(index, self.rows - 1), 0, counts=index < self.rows)


@dataclass(frozen=True, slots=True)
class Collator:
    """Clips to one batch: features at the batch's audio context, decoder inputs and labels padded to its longest.

    Returns `input_features` float32 [batch, n_mels, 2 * positions], `decoder_input_ids` int64 [batch, tokens] and
    `labels` int64 [batch, tokens], -100 behind each label's end.
    """

    context: AudioContext
    n_mels: int
    pad_token_id: int

    def __call__(self, clips: Sequence[Clip]) -> dict[str, torch.Tensor]:
        longest = max(clip.longest for clip in clips)
        features = batch_features([clip.audio for clip in clips], self.context, self.n_mels, longest)
        for i, clip in enumerate(clips):
            if clip.masks:
                frames = min(features.shape[-1], samples_of(clip.audio) // HOP_LENGTH)
                random = np.random.default_rng(clip.mask_seed)
                features[i] = mask_features(features[i], frames, clip.masks, random)
        return {
            "input_features": features,
            "decoder_input_ids": pad([clip.tokens.decoder_input_ids for clip in clips], self.pad_token_id),
            "labels": pad([clip.tokens.labels for clip in clips], IGNORED_LABEL),
        }


def batch_features(
    clips: Sequence[np.ndarray | Features], context: AudioContext, n_mels: int, at_least_seconds: float = 0.0
) -> torch.Tensor:
    """Clips at their common audio context, float32 [batch, n_mels, 2 * positions].

    clips: float32 [samples] each, or the features of each.
    """
    longest = max(samples_of(clip) for clip in clips)
    positions = context.positions(max(longest / SAMPLE_RATE, at_least_seconds))
    frames = positions * FRAMES_PER_POSITION
    known = [clip for clip in clips if isinstance(clip, Features)]
    if known:
        return padded(known, frames)
    return features_at([clip for clip in clips if not isinstance(clip, Features)], positions, n_mels)


def features_at(clips: Sequence[np.ndarray], positions: int, n_mels: int) -> torch.Tensor:
    """Clips float32 [samples] each, padded or cut to encoder positions: float32 [batch, n_mels, 2 * positions]."""
    samples = np.zeros((len(clips), positions * SAMPLES_PER_POSITION), dtype=np.float32)
    for row, clip in zip(samples, clips, strict=True):
        row[: len(clip)] = clip[: len(row)]
    return log_mel(torch.from_numpy(samples), positions * FRAMES_PER_POSITION, n_mels)


def samples_of(clip: np.ndarray | Features) -> int:
    return clip.samples if isinstance(clip, Features) else len(clip)


def pad(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Id sequences to int64 [batch, longest], `value` behind each one's end."""
    padded = torch.full((len(sequences), max(map(len, sequences))), value, dtype=torch.int64)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return padded
