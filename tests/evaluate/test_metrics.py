"""Counts checked by hand, intervals against published values and simulation."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from resonance.errors import DataError
from resonance.evaluate.metrics import (
    Rate,
    Scores,
    bootstrap_interval,
    compare,
    error_counts,
    has_loop,
    measure,
    score,
    share,
    split_units,
    summarize,
)
from resonance.evaluate.normalize import normalizer_for


@pytest.fixture(scope="module")
def shared_data() -> Path:
    beside = Path(__file__).resolve().parents[2] / ".." / "shared"
    folder = Path(os.environ.get("RESONANCE_SHARED", beside)) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real recordings at {folder}; set RESONANCE_SHARED to the folder that holds data/")
    return folder


def exact_scores(outcomes: list[bool]) -> Scores:
    """Scores of one-word phrases, right where `outcomes` says so."""
    return score([("yes", "yes" if right else "no") for right in outcomes], "en")


def test_errors_are_counted_by_kind_and_unit() -> None:
    words = error_counts(["turn the big light on"], ["turn big lamp on please"], "word")[0]
    # "the" is deleted, "light" became "lamp", "please" is inserted
    assert (words.substitutions, words.deletions, words.insertions, words.reference_length) == (1, 1, 1, 5)
    characters = error_counts(["a bc"], ["abd"], "char")[0]
    assert (characters.errors, characters.reference_length) == (1, 3)  # the space is no character


def test_mixed_units_are_chinese_characters_and_latin_words() -> None:
    assert split_units("打开iphone 13的app吗", "mixed") == ["打", "开", "iphone", "13", "的", "app", "吗"]


def test_rates_are_sums_over_all_utterances_not_means_of_rates() -> None:
    scores = score([("one two three four five six seven eight nine ten times", "x"), ("yes", "yes")], "fr")
    assert (scores.wer.count, scores.wer.total) == (11, 12)
    assert scores.wer.value == pytest.approx(11 / 12)


def test_speech_made_up_in_silence_counts_as_insertions() -> None:
    scores = score([("", "谢谢观看"), ("", ""), ("关灯", "关灯")], "zh")
    assert (scores.cer.count, scores.cer.total) == (4, 2)
    assert (scores.exact_phrase_accuracy.count, scores.exact_phrase_accuracy.total) == (2, 3)


def test_nothing_to_divide_by_is_no_rate_rather_than_zero() -> None:
    silence = score([("", "thanks for watching")], "en")
    assert silence.wer == Rate(None, None, None, 3, 0, "none")
    assert score([], "en").exact_phrase_accuracy.value is None


def test_exact_means_equal_after_normalisation_with_spaces_of_chinese_ignored() -> None:
    pairs = [("打開 app", "打开APP。"), ("關燈", "开灯")]
    assert score(pairs, "zh").exact_phrase_accuracy.count == 1
    assert score([("in to", "into")], "en").exact_phrase_accuracy.count == 0


def test_one_recording_has_no_bootstrap_interval_and_a_wide_share() -> None:
    scores = score([("hello world", "hello")], "en")
    assert scores.wer == Rate(0.5, None, None, 1, 2, "none")
    right = score([("hello", "hello")], "en").exact_phrase_accuracy
    assert (right.value, right.high) == (1.0, 1.0)
    assert right.low == pytest.approx(0.2065, abs=1e-4)


def test_wilson_interval_of_none_in_ten_reaches_28_percent() -> None:
    rate = share(0, 10)
    assert rate.low == 0.0
    assert rate.high == pytest.approx(0.2775, abs=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "no no no no",
        "please turn the light on turn the light on turn the light on turn the light on",
        "关关关关",
        "谢谢大家谢谢大家谢谢大家谢谢大家",
        "one, one, one, one",
        "".join(f"the end {i % 3} of it. " for i in range(60)),  # never the same four times in a row
    ],
)
def test_a_stuck_model_is_seen(text: str) -> None:
    assert has_loop(text)


def test_ordinary_and_long_texts_are_no_loops() -> None:
    random = np.random.default_rng(0)
    vocabulary = ["".join(word) for word in random.choice(list("etaoinshrdlu"), size=(150, 5))]
    chapter = " ".join(random.choice(vocabulary, 5000))  # 30 kB: as a whole it compresses like a loop
    assert len(chapter) / len(zlib.compress(chapter.encode())) > 2.4
    assert not has_loop(chapter)
    assert not has_loop("ha ha ha")
    assert not has_loop("")


def test_a_person_who_repeats_is_not_a_stuck_model() -> None:
    scores = score([("no no no no no", "no no no no no"), ("no", "no no no no no")], "en")
    assert (scores.repetition_rate.count, scores.repetition_rate.total) == (1, 2)


def test_bootstrap_covers_the_true_rate_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        lengths = random.integers(1, 12, 40)
        errors = random.binomial(lengths, random.beta(0.5, 1, 40))  # errors come in bunches; true rate 1/3
        interval = bootstrap_interval(errors.tolist(), lengths.tolist(), samples=300, seed=trial)
        assert interval is not None
        hits += interval[0] <= 1 / 3 <= interval[1]
    assert 0.88 <= hits / 300 <= 0.98


def test_bootstrap_is_repeatable_and_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = ([1, 0, 3, 2, 0], [4, 5, 6, 2, 1])
    whole = bootstrap_interval(*values, seed=7)
    assert whole == bootstrap_interval(*values, seed=7)
    monkeypatch.setattr("resonance.evaluate.metrics.BOOTSTRAP_CHUNK", 12)
    assert bootstrap_interval(*values, seed=7) == whole


def test_draws_of_silence_alone_do_not_break_the_interval() -> None:
    interval = bootstrap_interval([1, 0] + [0] * 8, [2, 2] + [0] * 8)
    assert interval is not None
    assert np.isfinite(interval).all()


def test_paired_shares_give_newcombes_published_interval() -> None:
    # Newcombe 1998, Statistics in Medicine 17:2635, method 10 on the table 36, 12, 2, 0: 0.0569 to 0.3404.
    base = exact_scores([True] * 36 + [False] * 12 + [True] * 2)
    tuned = exact_scores([True] * 36 + [True] * 12 + [False] * 2)
    difference = compare(base, tuned).exact_phrase_accuracy
    assert difference.value == pytest.approx(0.2)
    assert difference.low == pytest.approx(0.0569, abs=5e-5)
    assert difference.high == pytest.approx(0.3404, abs=5e-5)
    assert difference.certain


def test_two_recordings_both_better_are_not_yet_certain() -> None:
    difference = compare(exact_scores([False] * 2), exact_scores([True] * 2)).exact_phrase_accuracy
    assert difference.value == 1.0
    assert not difference.certain


def test_pairing_sees_a_small_steady_gain_that_separate_intervals_hide() -> None:
    random = np.random.default_rng(3)
    lengths = random.integers(5, 15, 60)
    hard = random.integers(0, 2, 60).astype(bool)
    reference = [" ".join(["w"] * n) for n in lengths]
    base = score([(r, "" if h else r[4:]) for r, h in zip(reference, hard, strict=True)], "fr")
    tuned = score([(r, "w" if h else r[2:]) for r, h in zip(reference, hard, strict=True)], "fr")
    main = compare(base, tuned).main
    assert main.certain and main.high is not None and main.high < 0
    assert base.wer.low is not None and tuned.wer.high is not None
    assert base.wer.low < tuned.wer.high  # side by side the intervals overlap


def test_models_scored_on_different_recordings_are_not_compared() -> None:
    with pytest.raises(DataError, match="same recordings"):
        compare(score([("a", "a")], "en"), score([("b", "b")], "en"))


def test_groups_are_summed_from_the_same_counts_as_the_whole() -> None:
    normalizer = normalizer_for("en")
    results = measure([("a b", "a c"), ("d", "d"), ("e f g", "")], normalizer)
    parts = [summarize(results[:1], normalizer), summarize(results[1:], normalizer)]
    whole = summarize(results, normalizer)
    assert sum(part.wer.count for part in parts) == whole.wer.count == 4
    assert sum(part.wer.total for part in parts) == whole.wer.total == 6


@pytest.mark.parametrize("folder", ["torgo", "mandarin_aishell_sample", "english_sentences"])
def test_real_transcripts_score_zero_against_themselves(shared_data: Path, folder: str) -> None:
    rows = json.loads((shared_data / folder / "labels.json").read_text(encoding="utf-8"))
    scores = score([(row["text"], row["text"]) for row in rows], rows[0]["language"])
    assert (scores.main.count, scores.repetition_rate.count) == (0, 0)
    assert scores.main.total > len(rows)  # no phrase was normalised away
    assert all(u.reference for u in scores.utterances)
