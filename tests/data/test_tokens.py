"""Decoder inputs and labels, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import WhisperTokenizer

from resonance.data.manifest import Segment, Utterance
from resonance.data.tokens import IGNORED_LABEL, LabelTokenizer
from resonance.errors import DataError

SEGMENTS = (Segment(0.0, 0.52, "one"), Segment(0.64, 1.3, "two"))


def utterance(text: str, *, language: str | None = None, segments: tuple[Segment, ...] = ()) -> Utterance:
    return Utterance("audio/clip 7.wav", text, row=7, language=language, segments=segments)


def labels(
    folder: Path, *, multilingual: bool = True, language: str | None = "en", **settings: object
) -> LabelTokenizer:
    return LabelTokenizer(WhisperTokenizer.from_pretrained(folder), multilingual, language, **settings)  # type: ignore[arg-type]


def spelled(tokenizer: LabelTokenizer, ids: list[int]) -> list[str]:
    return ["-" if i == IGNORED_LABEL else tokenizer.tokenizer.convert_ids_to_tokens(i) for i in ids]


@pytest.mark.parametrize(
    ("language", "task", "prompt", "text"),
    [
        ("en", "transcribe", ["<|en|>", "<|transcribe|>"], ["Ġ", "h", "i"]),
        ("de", "translate", ["<|de|>", "<|translate|>"], ["Ġ", "h", "i"]),
        ("zh", "transcribe", ["<|zh|>", "<|transcribe|>"], ["h", "i"]),  # written without spaces: none before the first
    ],
)
def test_a_multilingual_model_is_given_language_task_and_mode_and_answers_the_text(
    tiny_model: Path, language: str, task: str, prompt: list[str], text: list[str]
) -> None:
    tokenizer = labels(tiny_model, task=task)
    pair = tokenizer.encode(utterance(" hi\n", language=language))
    assert spelled(tokenizer, pair.decoder_input_ids) == ["<|startoftranscript|>", *prompt, "<|notimestamps|>", *text]
    assert spelled(tokenizer, pair.labels) == ["-", "-", "-", *text, "<|endoftext|>"]


def test_where_recordings_are_in_several_languages_the_model_learns_to_tell_which(
    tiny_model: Path, english_model: Path
) -> None:
    tokenizer = labels(tiny_model, language=None, learns_language=True)
    pair = tokenizer.encode(utterance("hi", language="zh"))
    # Neither the task nor the mode: nobody leaves those to the model.
    assert spelled(tokenizer, pair.labels) == ["<|zh|>", "-", "-", "h", "i", "<|endoftext|>"]
    without = labels(english_model, multilingual=False, language=None, learns_language=True)
    assert spelled(without, without.encode(utterance("hi")).labels) == ["-", "Ġ", "h", "i", "<|endoftext|>"]


def test_an_english_only_model_has_no_language_and_task_tokens(english_model: Path) -> None:
    tokenizer = labels(english_model, multilingual=False, language=None)
    pair = tokenizer.encode(utterance("hi"))
    assert spelled(tokenizer, pair.decoder_input_ids) == ["<|startoftranscript|>", "<|notimestamps|>", "Ġ", "h", "i"]
    assert spelled(tokenizer, pair.labels) == ["-", "Ġ", "h", "i", "<|endoftext|>"]


def test_timestamps_stand_around_each_segment_in_steps_of_two_hundredths(tiny_model: Path) -> None:
    tokenizer = labels(tiny_model)
    row = utterance("one two", segments=SEGMENTS)
    pair = tokenizer.encode(row, timestamps=True)
    body = ["<|0.00|>", "Ġ", "o", "n", "e", "<|0.52|>", "<|0.64|>", "Ġ", "t", "w", "o", "<|1.30|>"]
    assert spelled(tokenizer, pair.decoder_input_ids) == ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", *body]
    assert spelled(tokenizer, pair.labels) == ["-", "-", *body, "<|endoftext|>"]
    # Without times of its own, or beyond 30 s, a row is trained without timestamps.
    late = utterance("one two", segments=(*SEGMENTS, Segment(29.0, 30.5, "three")))
    for untimed in (utterance("one two"), late):
        assert "<|notimestamps|>" in spelled(tokenizer, tokenizer.encode(untimed, timestamps=True).decoder_input_ids)


def test_the_start_token_is_not_learnt_twice_as_with_the_copied_collator(tiny_model: Path) -> None:
    tokenizer = labels(tiny_model)
    start = tokenizer.special("<|startoftranscript|>")
    pair = tokenizer.encode(utterance("hi"))
    assert pair.decoder_input_ids.count(start) == 1
    assert start not in pair.labels

    # What most projects copy: ids with the prompt as labels; the first is dropped if it equals bos_token_id, which in
    # Whisper is <|endoftext|>. The model then shifts them to the right behind a second start token.
    stock = tokenizer.tokenizer("hi").input_ids
    copied = stock[1:] if stock[0] == tokenizer.tokenizer.bos_token_id else stock
    assert [start, *copied[:-1]].count(start) == 2


def test_what_looks_like_a_special_token_in_a_transcript_is_spelled_out(tiny_model: Path) -> None:
    typed = "<|endoftext|> a<|0.00|>b <|en|><|startofprev|> <<|30.00|>|>"
    tokenizer = labels(tiny_model)
    first_special = tokenizer.special("<|endoftext|>")
    pair = tokenizer.encode(utterance(typed))
    text = pair.decoder_input_ids[4:]
    assert max(text) < first_special
    assert tokenizer.tokenizer.backend_tokenizer.decode(text) == " " + typed
    # transformers' own switch lets timestamps through.
    obeyed = tokenizer.tokenizer(typed, add_special_tokens=False, split_special_tokens=True).input_ids
    assert max(obeyed) > first_special


def test_a_real_tokenizer_never_obeys_what_is_typed(real_model: Path) -> None:
    typed = "the <|0.00|> token, <|endoftext|>, <|zh|> and <|notimestamps|>"
    tokenizer = labels(real_model)
    ids = tokenizer.text_ids(typed, "en")
    assert max(ids) < tokenizer.special("<|endoftext|>")
    assert tokenizer.tokenizer.backend_tokenizer.decode(ids) == " " + typed
    plain = tokenizer.tokenizer(" turn on the light", add_special_tokens=False).input_ids
    assert tokenizer.text_ids("turn on the light", "en") == plain


def test_a_prompt_is_text_after_a_space_and_is_never_obeyed(tiny_model: Path) -> None:
    tokenizer = labels(tiny_model)
    plain = tokenizer.tokenizer(" hello there", add_special_tokens=False).input_ids
    assert tokenizer.previous(" hello there\n") == [tokenizer.special("<|startofprev|>"), *plain]
    typed = "<|startoftranscript|><|zh|><|0.00|> hi"
    first, *ids = tokenizer.previous(typed)
    assert first == tokenizer.special("<|startofprev|>") and max(ids) < tokenizer.special("<|endoftext|>")
    assert tokenizer.tokenizer.backend_tokenizer.decode(ids) == " " + typed
    assert tokenizer.previous(None) == tokenizer.previous("") == []


def test_a_label_longer_than_the_decoder_is_refused_with_row_and_file(tiny_model: Path) -> None:
    tokenizer = labels(tiny_model, language="zh")
    fits = utterance("a" * 444)
    assert len(tokenizer.encode(fits).decoder_input_ids) == 448 == tokenizer.count(fits.text)
    with pytest.raises(DataError) as error:
        tokenizer.encode(utterance("a" * 445))
    assert "Row 7 (audio/clip 7.wav)" in str(error.value)
    assert "449 tokens" in str(error.value) and "448" in str(error.value)


def test_silence_is_answered_with_the_end_token_alone(tiny_model: Path) -> None:
    tokenizer = labels(tiny_model)
    assert spelled(tokenizer, tokenizer.encode(utterance("  ")).labels) == ["-", "-", "-", "<|endoftext|>"]


def test_a_language_that_the_model_does_not_know_is_named(tiny_model: Path) -> None:
    with pytest.raises(DataError, match=r"<\|fr\|>.*--language"):
        labels(tiny_model).encode(utterance("salut", language="fr"))
