"""A list of phrases: spellings, scores against the plain forward pass, the choice, bad lists."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resonance.data.tokens import LabelTokenizer
from resonance.errors import DataError, ManifestError
from resonance.model.load import Whisper, load_whisper
from resonance.transcribe import phrases as module
from resonance.transcribe.phrases import (
    PhraseHelp,
    apply,
    choose,
    mean_log_probs,
    read_phrases,
    search,
    spellings,
    spoken,
)

PHRASES = ("No.", "yes", "open the door", "open the window", "i am cold")


@pytest.fixture(scope="module")
def whisper(tiny_model: Path) -> Whisper:
    return load_whisper(str(tiny_model), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(whisper: Whisper) -> LabelTokenizer:
    return LabelTokenizer(whisper.tokenizer, True, "en")


def encoder_output(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 40, 32, generator=torch.Generator().manual_seed(seed))


def by_hand(whisper: Whisper, hidden: torch.Tensor, prompt: list[int], ids: list[int]) -> float:
    """Mean log-probability of one text for one row [positions, d_model], by a plain forward pass."""
    answer = [*ids, module.end_of_text(whisper.model)]
    with torch.inference_mode():
        logits = whisper.model(
            encoder_outputs=(hidden[None],), decoder_input_ids=torch.tensor([[*prompt, *ids]])
        ).logits
    log_probs = logits[0, len(prompt) - 1 :].log_softmax(dim=-1)
    return float(log_probs[torch.arange(len(answer)), torch.tensor(answer)].mean())


def test_every_phrase_gets_the_score_of_its_best_spelling(
    whisper: Whisper, tokenizer: LabelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAM_NATS", np.inf)
    monkeypatch.setattr(module, "MARGIN", np.inf)
    monkeypatch.setattr(module, "STATES_AT_ONCE", 7)  # several pieces in each level
    hidden, prompt = encoder_output(3), tokenizer.prompt("en")
    trie = PhraseHelp(PHRASES).trie(tokenizer, "en")
    for states, found in zip(hidden, search(whisper.model, hidden, prompt, trie, beam=1000), strict=True):
        assert sorted(found) == list(range(len(PHRASES)))
        for number, phrase in enumerate(PHRASES):
            ids = [tokenizer.text_ids(text, "en") for text in spellings(phrase, "en")]
            expected = [by_hand(whisper, states, prompt, one) for one in ids]
            assert found[number].mean_log_prob == pytest.approx(max(expected), abs=1e-5)
            assert trie.ids(found[number].node, trie.parents()) == ids[int(np.argmax(expected))]


def test_free_texts_of_different_lengths_are_scored_as_one_by_one(whisper: Whisper, tokenizer: LabelTokenizer) -> None:
    hidden, prompt = encoder_output(3), tokenizer.prompt("en")
    texts = [tokenizer.text_ids(text, "en") for text in ("a longer text", "no", "")]
    together = mean_log_probs(whisper.model, hidden, prompt, texts)
    assert together == pytest.approx(
        [by_hand(whisper, row, prompt, ids) for row, ids in zip(hidden, texts, strict=True)], abs=1e-5
    )


def answers(whisper: Whisper, tokenizer: LabelTokenizer, help: PhraseHelp, rows: int = 5, **given: Any) -> list[Any]:
    hidden = given.pop("hidden", encoder_output(rows))
    texts = given.pop("texts", ["something else"] * len(hidden))
    free = [(text, tokenizer.text_ids(text, "en")) for text in texts]
    return apply(whisper.model, hidden, ["en"] * len(hidden), free, tokenizer, help)


def test_a_batch_answers_as_its_rows_alone(whisper: Whisper, tokenizer: LabelTokenizer) -> None:
    help = PhraseHelp(PHRASES, only=True, threshold=0.0)
    hidden = encoder_output(18)  # more than are scored together
    together = answers(whisper, tokenizer, help, hidden=hidden)
    for row, choice in zip(hidden[::6], together[::6], strict=True):
        (alone,) = answers(whisper, tokenizer, help, hidden=row[None])
        assert (alone.phrase, alone.ids) == (choice.phrase, choice.ids)
        assert alone.score == pytest.approx(choice.score, abs=1e-4)


def test_languages_in_one_batch_keep_their_rows(whisper: Whisper, tokenizer: LabelTokenizer) -> None:
    help, hidden = PhraseHelp(("我想喝水", "yes"), only=True, threshold=0.0), encoder_output(3)
    free = [("x", tokenizer.text_ids("x", "en"))] * 3
    mixed = apply(whisper.model, hidden, ["zh", "en", "zh"], free, tokenizer, help)
    chinese = apply(whisper.model, hidden, ["zh"] * 3, free, tokenizer, help)
    assert [mixed[i].score for i in (0, 2)] == pytest.approx([chinese[i].score for i in (0, 2)], abs=1e-4)
    assert mixed[1].score != pytest.approx(chinese[1].score, abs=1e-4)


def test_only_phrases_are_answered_where_only_they_may_be(whisper: Whisper, tokenizer: LabelTokenizer) -> None:
    some = answers(whisper, tokenizer, PhraseHelp(PHRASES, only=True, threshold=0.0))
    assert all(c.text == c.phrase and c.phrase in PHRASES and 0 < c.score <= 1 for c in some)
    none = answers(whisper, tokenizer, PhraseHelp(PHRASES, only=True, threshold=1.0))
    assert [(c.text, c.phrase, c.ids) for c in none] == [("", None, [])] * 5


def test_the_weight_decides_between_the_free_text_and_the_nearest_phrase(
    whisper: Whisper, tokenizer: LabelTokenizer
) -> None:
    for text in ("something else", "no"):
        light = answers(whisper, tokenizer, PhraseHelp(PHRASES, weight=0), 1, texts=[text])
        assert [(c.text, c.phrase) for c in light] == [(text, None)]
    heavy = answers(whisper, tokenizer, PhraseHelp(PHRASES, weight=1000))
    assert all(c.phrase in PHRASES for c in heavy)


def test_a_free_text_that_is_a_phrase_is_answered_as_the_list_spells_it(
    whisper: Whisper, tokenizer: LabelTokenizer
) -> None:
    (choice,) = answers(whisper, tokenizer, PhraseHelp(("I'm cold!",), only=True), 1, texts=["i’m cold"])
    assert (choice.text, choice.phrase, choice.score) == ("I'm cold!", "I'm cold!", 1.0)


def test_a_phrase_less_probable_than_the_free_text_scores_less() -> None:
    help = PhraseHelp(PHRASES, only=True, threshold=0.5)
    near, far = choose({0: -0.2, 1: -3.0}, -0.3, None, help), choose({0: -4.0, 1: -9.0}, -0.3, None, help)
    assert near[0] == 0 and far[0] is None
    assert near[1] > 0.8 > 0.1 > far[1]
    assert choose({}, -0.3, None, help) == (None, 0.0)


def test_spellings_cover_first_letter_end_marks_and_chinese_scripts() -> None:
    assert {"help me", "Help me", "help me.", "Help me.", "Help me!", "help me!"} == set(spellings("Help me!", "en"))
    assert {"請開燈", "请开灯", "请开灯。", "請開燈。"} == set(spellings("請開燈", "zh"))
    assert list(spellings("…", "en"))  # nothing but a mark, kept
    assert spoken("Help  me!") == spoken("help me") != spoken("help")
    assert spoken("請開燈。") == spoken("请开灯")


def test_a_list_is_read_with_marks_of_windows_and_each_phrase_once(tmp_path: Path) -> None:
    path = tmp_path / "phrases.txt"
    path.write_bytes("\ufeffHelp me!\r\n\r\n  #1   please \r\nhelp me\r\n请开灯\r\n請開燈".encode())
    assert read_phrases(path) == ("Help me!", "#1 please", "请开灯")


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, ManifestError, "cannot be read"),
        (b"", DataError, "one phrase a line"),
        (b"\n ... \n", DataError, "one phrase a line"),
        ("请开灯\n我想喝水".encode("gbk"), ManifestError, "GBK"),
    ],
)
def test_a_bad_list_is_refused_with_what_to_do(
    tmp_path: Path, content: bytes | None, error: type[Exception], said: str
) -> None:
    path = tmp_path / "phrases.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=said) as caught:
        read_phrases(path)
    assert str(path) in str(caught.value)


def test_a_phrase_too_long_for_the_model_is_named(tokenizer: LabelTokenizer) -> None:
    with pytest.raises(DataError, match="a long story"):
        PhraseHelp(("no", "a long story " * 60)).trie(tokenizer, "en")


def test_ten_thousand_phrases_are_read_prepared_and_searched_in_seconds(
    whisper: Whisper, tokenizer: LabelTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "phrases.txt"
    path.write_text("\n".join(f"call number {i} now" for i in range(10_000)), encoding="utf-8")
    began = time.process_time()
    help = PhraseHelp(read_phrases(path), only=True, threshold=0.0)
    (choice,) = answers(whisper, tokenizer, help, 1)
    assert len(help.phrases) == 10_000 and choice.phrase in help.phrases
    assert time.process_time() - began < 60
    assert help.trie(tokenizer, "en") is help.trie(tokenizer, "en")


def test_a_dysarthric_speaker_is_understood_better_with_the_list(shared: Path, real_model: Path) -> None:
    from resonance.data.audio import read_audio
    from resonance.data.batches import batch_features
    from resonance.transcribe.torch_engine import decode, load_recognizer

    folder = shared / "data" / "torgo"
    rows = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["speaker"] == "F01" and " " not in row["text"]]
    help = PhraseHelp(tuple({spoken(row["text"]): row["text"] for row in rows}.values()), only=True, threshold=0.0)
    rows = rows[:8]
    recognizer = load_recognizer(str(real_model), audio_context="auto")
    features = batch_features(
        [read_audio(folder / row["audio"]) for row in rows], recognizer.context, recognizer.whisper.n_mels
    )
    model, tokenizer = recognizer.whisper.model, LabelTokenizer(recognizer.whisper.tokenizer, True, "en")
    ids = decode(model, features, [tokenizer.prompt("en")] * len(rows)).tolist()
    free = [
        tokenizer.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in ids
    ]
    with torch.inference_mode():
        hidden = model.model.encoder(features).last_hidden_state
    given = list(zip(free, ids, strict=True))
    chosen = [choice.text for choice in apply(model, hidden, ["en"] * len(rows), given, tokenizer, help)]

    def right(texts: list[str]) -> int:
        return sum(spoken(text) == spoken(row["text"]) for text, row in zip(texts, rows, strict=True))

    assert right(chosen) > right(free)
