"""Evaluation rows are drawn so that their scores mean what they seem to mean."""

from __future__ import annotations

import dataclasses
import random

import pytest

from resonance.data.manifest import Utterance
from resonance.data.split import SplitBy, sentence_key, split
from resonance.errors import ConfigError, DataError


def recordings(sentences: int, takes: int, speakers: int = 1) -> list[Utterance]:
    count = sentences * takes
    return [
        Utterance(f"/data/{n:04}.wav", f"Sentence {n % sentences}!", n + 1, speaker=f"s{n % speakers}")
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("我想喝水。", " 我想 喝水", True),
        ("Ｈello, World!", "hello world", True),
        ("STRASSE", "straße", True),
        ("I can't", "I can", False),
        ("कि", "का", False),
        ("第1句", "第2句", False),
    ],
)
def test_sentences_are_the_same_apart_from_case_width_and_punctuation(one: str, other: str, same: bool) -> None:
    assert (sentence_key(one) == sentence_key(other)) is same


def test_no_sentence_is_on_both_sides_and_the_share_is_kept() -> None:
    rows = recordings(50, 3)
    rows = [dataclasses.replace(row, text=row.text.upper() if row.row % 2 else row.text) for row in rows]
    train, held_out = split(rows, eval_fraction=0.1, by="sentence", seed=1)
    assert not {sentence_key(row.text) for row in train} & {sentence_key(row.text) for row in held_out}
    assert len(held_out) == 15
    assert sorted([*train, *held_out], key=lambda row: row.row) == rows


def test_within_sentence_holds_out_other_takes_of_sentences_in_training() -> None:
    rows = [*recordings(10, 4), Utterance("/data/once.wav", "said once", 99)]
    train, held_out = split(rows, eval_fraction=0.25, by="within_sentence", seed=1)
    assert len(held_out) == 10
    assert len({sentence_key(row.text) for row in held_out}) == 10
    assert {row.text for row in held_out} < {row.text for row in train}


def test_within_sentence_never_trains_on_a_copy_of_a_held_out_recording() -> None:
    rows = recordings(5, 2)
    rows += [dataclasses.replace(row, row=row.row + 100) for row in rows]
    train, held_out = split(rows, eval_fraction=0.5, by="within_sentence", seed=3)
    assert held_out and not {row.audio for row in train} & {row.audio for row in held_out}


def test_no_speaker_is_on_both_sides() -> None:
    train, held_out = split(recordings(40, 2, speakers=8), eval_fraction=0.25, by="speaker", seed=1)
    assert len({row.speaker for row in held_out}) == 2
    assert not {row.speaker for row in train} & {row.speaker for row in held_out}


@pytest.mark.parametrize("by", ["sentence", "speaker", "within_sentence"])
def test_rows_in_another_order_or_folder_are_split_the_same_and_another_seed_differs(by: SplitBy) -> None:
    rows = recordings(40, 3, speakers=12)
    moved = [dataclasses.replace(row, audio=row.audio.replace("/data/", "/mnt/x/")) for row in rows]
    random.Random(0).shuffle(moved)
    chosen = {row.row for row in split(rows, eval_fraction=0.2, by=by, seed=7)[1]}
    assert {row.row for row in split(moved, eval_fraction=0.2, by=by, seed=7)[1]} == chosen
    assert {row.row for row in split(rows, eval_fraction=0.2, by=by, seed=8)[1]} != chosen


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("sizes", [(1, 1), (99, 1), (1, 99), (50, 50)])
def test_two_groups_give_two_sides_that_are_not_empty(sizes: tuple[int, int], fraction: float) -> None:
    texts = ["a"] * sizes[0] + ["b"] * sizes[1]
    rows = [Utterance(f"{n}.wav", text, n) for n, text in enumerate(texts)]
    train, held_out = split(rows, eval_fraction=fraction, by="sentence", seed=1)
    assert train and held_out


def test_recordings_without_a_sentence_are_not_one_group() -> None:
    rows = [Utterance(f"{n}.wav", "…" if n % 2 else "", n) for n in range(20)]
    assert len(split(rows, eval_fraction=0.3, by="sentence", seed=1)[1]) == 6


@pytest.mark.parametrize(
    ("rows", "by", "said"),
    [
        (recordings(1, 1), "sentence", "1 recordings cannot be split"),
        (recordings(1, 5), "sentence", "same sentence"),
        (recordings(5, 1), "speaker", "one speaker"),
        ([*recordings(5, 1, 2), Utterance("x.wav", "x", 6)], "speaker", "the first: row 6"),
        (recordings(5, 1), "within_sentence", "only once"),
    ],
)
def test_too_little_to_split_says_what_to_do(rows: list[Utterance], by: SplitBy, said: str) -> None:
    with pytest.raises(DataError, match=said):
        split(rows, eval_fraction=0.1, by=by, seed=1)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 10])
def test_a_share_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError):
        split(recordings(5, 2), eval_fraction=fraction, by="sentence", seed=1)
