"""Which clips share a batch, how long it is, and what is in it."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperTokenizer

from resonance.data.audio_context import CONTEXT_SECONDS, AudioContext
from resonance.data.augment import Augmentation
from resonance.data.batches import (
    Clip,
    ClipDataset,
    Collator,
    Draw,
    LengthGroupedSampler,
)
from resonance.data.formats import load_manifest
from resonance.data.manifest import Segment, Utterance
from resonance.data.tokens import IGNORED_LABEL, LabelTokenizer, TokenPair
from resonance.units import POSITIONS_PER_SECOND

MARGIN_SECONDS = 0.6


def clip(seconds: float, label: list[int]) -> Clip:
    audio = np.full(round(seconds * 16_000), 0.1, dtype=np.float32)
    return Clip(audio, TokenPair([7, *label], [IGNORED_LABEL, *label]), None, 0)


def phrase_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Durations in seconds as in recorded phrases: mostly 1-4 s, some up to 20."""
    return np.clip(np.random.default_rng(seed).lognormal(0.7, 0.6, count), 0.3, 20.0)


def groups(sampler: LengthGroupedSampler, size: int) -> list[list[int]]:
    rows = [draw.row for draw in sampler]
    return [rows[i : i + size] for i in range(0, len(rows), size)]


# --- audio context


def test_a_batch_is_as_long_as_its_longest_clip_and_margin_rounded_up() -> None:
    context = AudioContext("auto", MARGIN_SECONDS)
    batch = Collator(context, 80, pad_token_id=0)([clip(0.4, [1]), clip(1.1, [1, 2])])
    assert batch["input_features"].shape == (2, 80, 170)  # 1.1 + 0.6 s
    assert context.positions(1.1) == 85  # exactly on a bucket
    assert context.positions(29.9) == context.positions(45.0) == 1500


@pytest.mark.parametrize(("length", "positions"), [("full", 1500), (5.0, 250), (30.0, 1500)])
def test_a_fixed_context_does_not_depend_on_the_clips(length: object, positions: int) -> None:
    context = AudioContext(length, MARGIN_SECONDS)  # type: ignore[arg-type]
    assert {context.positions(seconds) for seconds in (0.1, 3.0, 29.0)} == {positions}


def test_a_model_with_a_short_window_is_never_given_more() -> None:
    assert AudioContext("auto", MARGIN_SECONDS, window_positions=500).positions(12.0) == 500


def test_every_clip_and_its_margin_fit_and_rounding_adds_little() -> None:
    context = AudioContext("auto", MARGIN_SECONDS)
    wanted = phrase_lengths(5_000) + MARGIN_SECONDS
    given = np.array([context.positions(s - MARGIN_SECONDS) for s in wanted]) / POSITIONS_PER_SECOND
    assert (given >= wanted - 1e-9).all()
    assert (given / wanted).mean() < 1.06
    steps = np.diff(CONTEXT_SECONDS) / CONTEXT_SECONDS[:-1]
    assert steps.max() <= 0.12 and len(CONTEXT_SECONDS) <= 48  # kernels are cached by shape


def padding_share(durations: np.ndarray, size: int = 8) -> float:
    """Encoder positions of whole batches, beyond what the clips and their margins need."""
    context = AudioContext("auto", MARGIN_SECONDS)
    batches = groups(LengthGroupedSampler(durations.tolist(), size, seed=1), size)
    spent = sum(context.positions(max(durations[b])) * len(b) for b in batches) / POSITIONS_PER_SECOND
    return float(spent / (durations + MARGIN_SECONDS).sum()) - 1


def test_grouping_keeps_the_padding_of_batches_low() -> None:
    durations = phrase_lengths(2_000)
    assert padding_share(durations) < 0.20  # 15 %
    # Batches of 8 in shuffled order, the common way, almost double the work.
    context = AudioContext("auto", MARGIN_SECONDS)
    shuffled = sum(context.positions(max(durations[i : i + 8])) * 8 for i in range(0, 2_000, 8)) / POSITIONS_PER_SECOND
    assert shuffled / (durations + MARGIN_SECONDS).sum() > 1.6


def test_real_recordings_are_rounded_by_less_than_15_percent(shared: Path) -> None:
    context = AudioContext("auto", MARGIN_SECONDS)
    for name in ("torgo", "fsdd"):
        rows = json.loads((shared / "data" / name / "labels.json").read_text(encoding="utf-8"))
        seconds = np.array([soundfile.info(shared / "data" / name / row["audio"]).duration for row in rows])
        given = np.array([context.positions(s) for s in seconds]) / POSITIONS_PER_SECOND
        assert (given / (seconds + MARGIN_SECONDS)).mean() < 1.15, name  # 1.07 and 1.11
        assert padding_share(seconds) < 0.25, name  # 21 % and 15 %


# --- what is in a batch


def test_labels_are_padded_to_the_longest_of_their_batch_and_no_further() -> None:
    batch = Collator(AudioContext("auto", 0.0), 80, pad_token_id=9)([clip(0.5, [1, 2, 3]), clip(0.5, [4])])
    assert batch["decoder_input_ids"].tolist() == [[7, 1, 2, 3], [7, 4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 1, 2, 3], [-100, 4, -100, -100]]
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_features": torch.float32,
        "decoder_input_ids": torch.int64,
        "labels": torch.int64,
    }


def test_an_end_token_as_padding_is_not_hidden_where_it_is_an_answer() -> None:
    end = 9  # Whisper pads with the token that also ends an answer
    batch = Collator(AudioContext("auto", 0.0), 80, pad_token_id=end)([clip(0.5, [1, 2, end]), clip(0.5, [end])])
    assert batch["labels"].tolist() == [[-100, 1, 2, end], [-100, end, -100, -100]]


def dataset(labels: Path, model: Path, **settings: object) -> ClipDataset:
    tokenizer = LabelTokenizer(WhisperTokenizer.from_pretrained(model), True, "en")
    return ClipDataset(load_manifest(labels).utterances, tokenizer, **settings)  # type: ignore[arg-type]


AUGMENTED = Augmentation(speed=0.1, gain_db=6.0, mask_time_prob=0.3, mask_time_length=4, mask_feature_prob=0.2)


def features(clips: list[Clip]) -> torch.Tensor:
    return Collator(AudioContext(2.0, 0.0), 80, pad_token_id=0)(clips)["input_features"]


def test_training_clips_change_with_the_seed_of_the_epoch_and_repeat_with_it(
    recordings: Callable[..., Path], tiny_model: Path
) -> None:
    rows = dataset(recordings(count=3), tiny_model, augmentation=AUGMENTED)
    first, again, next_epoch = (features([rows[Draw(i, seed)] for i in range(3)]) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_epoch)
    shuffled = features([rows[Draw(i, 5)] for i in (2, 0, 1)])
    assert torch.equal(shuffled[[1, 2, 0]], first)  # whatever batch or worker a clip comes in


def test_evaluation_clips_are_never_changed(recordings: Callable[..., Path], tiny_model: Path) -> None:
    labels = recordings(count=3)
    plain = dataset(labels, tiny_model)
    assert torch.equal(features([plain[0], plain[1]]), features([plain[Draw(0, 1)], plain[Draw(1, 2)]]))
    assert not torch.equal(
        features([plain[0]]), features([dataset(labels, tiny_model, augmentation=AUGMENTED)[Draw(0, 1)]])
    )


def test_a_share_of_rows_with_times_is_trained_with_timestamps_at_its_own_speed(
    recordings: Callable[..., Path], tiny_model: Path
) -> None:
    rows = load_manifest(recordings(count=1, seconds=(1.0, 1.0))).utterances
    timed = [Utterance(rows[0].audio, "one", row=1, segments=(Segment(0.0, 0.9, "one"),))]
    tokenizer = LabelTokenizer(WhisperTokenizer.from_pretrained(tiny_model), True, "en")
    data = ClipDataset(timed, tokenizer, augmentation=Augmentation(speed=0.2), timestamp_fraction=0.3)
    start = tokenizer.special("<|0.00|>")
    with_times = 0
    for seed in range(200):
        drawn = data[Draw(0, seed)]
        if start in drawn.tokens.labels:
            with_times += 1
            assert len(drawn.audio) == 16_000
    assert 40 <= with_times <= 80


def test_nothing_decoded_is_kept(recordings: Callable[..., Path], tiny_model: Path) -> None:
    data = dataset(recordings(count=4), tiny_model, augmentation=AUGMENTED)
    before = {name: id(value) for name, value in vars(data).items()}
    for i in range(4):
        assert len(data[Draw(i, 0)].audio) > 0
    assert {name: id(value) for name, value in vars(data).items()} == before
    assert not any(isinstance(value, (np.ndarray, torch.Tensor)) for value in vars(data).values())
    assert all(not hasattr(row, "samples") for row in data.rows)


# --- order


def test_every_row_comes_once_an_epoch_in_another_order_each_time() -> None:
    sampler = LengthGroupedSampler(phrase_lengths(1_003).tolist(), 8, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([draw.row for draw in sampler])
    assert all(Counter(order) == Counter(range(1_003)) for order in orders)
    assert orders[0] == orders[2] != orders[1]
    same = LengthGroupedSampler(phrase_lengths(1_003).tolist(), 8, seed=3)
    assert [draw.row for draw in same] == orders[0]
    other = LengthGroupedSampler(phrase_lengths(1_003).tolist(), 8, seed=4)
    assert [draw.row for draw in other] != orders[0]


def test_groups_change_their_members_from_epoch_to_epoch() -> None:
    sampler = LengthGroupedSampler(phrase_lengths(64).tolist(), 8, seed=3)
    first = {frozenset(group) for group in groups(sampler, 8)}
    sampler.set_epoch(1)
    assert len(first & {frozenset(group) for group in groups(sampler, 8)}) < 4


def test_augmentation_differs_between_epochs_and_not_within_a_repeat() -> None:
    sampler = LengthGroupedSampler([1.0] * 16, 8, seed=3)
    seeds = {draw.seed for draw in sampler}
    sampler.set_epoch(1)
    assert len(seeds) == 1 and seeds.isdisjoint({draw.seed for draw in sampler})


def test_the_incomplete_group_is_last_and_not_always_that_of_the_longest_clips() -> None:
    durations = phrase_lengths(403)
    sampler = LengthGroupedSampler(durations.tolist(), 8, seed=1)
    left_over: list[float] = []
    for epoch in range(30):
        sampler.set_epoch(epoch)
        order = groups(sampler, 8)
        assert [len(group) for group in order] == [8] * 50 + [3]
        left_over += durations[order[-1]].tolist()
    assert np.median(left_over) < np.quantile(durations, 0.7)


@pytest.mark.parametrize("speed", [0.0, 0.2])
def test_all_batches_of_one_group_have_the_context_of_its_longest_clip(
    recordings: Callable[..., Path], tiny_model: Path, speed: float
) -> None:
    labels = recordings(count=16, seconds=(0.3, 3.0))
    plain, data = dataset(labels, tiny_model), dataset(labels, tiny_model, augmentation=Augmentation(speed=speed))
    durations = [len(plain[i].audio) / 16_000 for i in range(16)]
    draws = list(LengthGroupedSampler(durations, 8, seed=0))
    collate = Collator(AudioContext("auto", MARGIN_SECONDS), 80, pad_token_id=0)

    def frames(*of: Draw) -> int:
        return collate([data[draw] for draw in of])["input_features"].shape[-1]

    for group in (draws[:8], draws[8:]):
        whole = frames(*group)
        assert [frames(*group[i : i + 2]) for i in range(0, 8, 2)] == [whole] * 4


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_get_batches_of_the_same_group_and_fill_up_with_clips_that_do_not_count(processes: int) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    each = 8 // processes
    alone = groups(LengthGroupedSampler(phrase_lengths(27).tolist(), 8, seed=1), 8)
    sampler = LengthGroupedSampler(phrase_lengths(27).tolist(), 8, seed=1, together=8)
    ranks = [
        list(BatchSamplerShard(BatchSampler(sampler, each, drop_last=False), processes, rank))
        for rank in range(processes)
    ]
    steps = [list(itertools.chain.from_iterable(batches)) for batches in zip(*ranks, strict=True)]
    assert [[draw.row for draw in step if draw.counts] for step in steps] == alone
    assert [len(step) for step in steps] == [8, 8, 8, 8]
    # accelerate's own way of filling up trains some rows twice.
    plain = LengthGroupedSampler(phrase_lengths(27).tolist(), 8, seed=1)
    last = [
        list(BatchSamplerShard(BatchSampler(plain, each, drop_last=False), processes, r))[-1] for r in range(processes)
    ]
    assert sum(len(batch) for batch in last) == 8


def test_a_clip_that_does_not_count_has_no_label(recordings: Callable[..., Path], tiny_model: Path) -> None:
    data = dataset(recordings(count=1), tiny_model)
    filler, counted = data[Draw(0, 0, counts=False)], data[Draw(0, 0)]
    assert set(filler.tokens.labels) == {IGNORED_LABEL}
    assert filler.tokens.decoder_input_ids == counted.tokens.decoder_input_ids
