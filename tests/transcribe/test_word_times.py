"""When words are said: the path through the attention, and what becomes of its times."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from resonance.data.audio_context import AudioContext
from resonance.data.batches import batch_features
from resonance.model.load import load_whisper
from resonance.transcribe.decoding import encode
from resonance.transcribe.recognizer import TimedText, Word
from resonance.transcribe.segments import follows_speech, place_words, sentences, split_at_times, spread
from resonance.transcribe.word_times import alignment_heads, best_path, token_starts


def cheapest(cost: np.ndarray) -> float:
    """Of all paths, by trying each."""
    rows, columns = cost.shape
    if rows == 1 or columns == 1:
        return float(cost.sum())
    ways = [cost[1:, 1:], cost[1:, :], cost[:, 1:]]
    return float(cost[0, 0]) + min(cheapest(way) for way in ways)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (3, 5), (5, 3), (4, 4)])
def test_the_path_is_the_cheapest_of_all(shape: tuple[int, int]) -> None:
    cost = np.random.default_rng(sum(shape)).normal(size=shape)
    rows, columns = best_path(cost)
    assert (rows[0], columns[0]) == (0, 0) and (rows[-1], columns[-1]) == (shape[0] - 1, shape[1] - 1)
    steps = set(zip(np.diff(rows).tolist(), np.diff(columns).tolist(), strict=True))
    assert steps <= {(0, 1), (1, 0), (1, 1)}
    assert cost[rows, columns].sum() == pytest.approx(cheapest(cost))


def test_times_are_those_of_transformers(tiny_model: Path) -> None:
    """Its `_extract_token_timestamps`, which pads to 30 s, on the same weights and the same text."""
    whisper = load_whisper(str(tiny_model), device=torch.device("cpu"))
    model = whisper.model
    model.set_attn_implementation("eager")
    audio = np.random.default_rng(0).normal(0, 0.1, 3 * 16_000).astype(np.float32)
    features = batch_features([audio], AudioContext("full", 0.0), whisper.n_mels)
    prompt = whisper.tokenizer("<|startoftranscript|><|en|><|transcribe|><|notimestamps|>", add_special_tokens=False)
    text = [65, 66, 67, 70, 80, 90, 100, 101]
    heads = [[1, 0], [1, 1], [0, 1]]
    model.generation_config.alignment_heads = heads
    with torch.inference_mode():
        hidden = encode(model, features)
        (ours,) = token_starts(model, hidden, [prompt.input_ids], [text], [3.0])
        out = model(
            encoder_outputs=(hidden,),
            decoder_input_ids=torch.tensor([[*prompt.input_ids, *text]]),
            output_attentions=True,
        )
    from transformers.models.whisper.generation_whisper import _dynamic_time_warping, _median_filter

    weights = torch.stack([out.cross_attentions[layer][0, head] for layer, head in heads])[:, :, :150]
    weights = weights / weights.sum(-1, keepdim=True)  # as if nothing were behind the clip
    spread, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
    weights = _median_filter((weights - mean) / spread, 7).mean(0)[len(prompt.input_ids) - 1 :]
    rows, columns = _dynamic_time_warping(-weights.double().numpy())
    starts = columns[np.pad(np.diff(rows), (1, 0), constant_values=1).astype(bool)] / 50
    assert ours == pytest.approx(starts.tolist())
    assert len(ours) == len(text) + 1


def test_heads_that_the_checkpoint_names_are_used_only_where_it_has_them(tiny_model: Path) -> None:
    model = load_whisper(str(tiny_model), device=torch.device("cpu")).model
    model.generation_config.alignment_heads = [[1, 1]]
    assert alignment_heads(model) == [(1, 1)]
    for missing in (None, [[7, 0]]):
        model.generation_config.alignment_heads = missing
        heads = model.config.decoder_attention_heads
        assert alignment_heads(model) == [(1, head) for head in range(heads)]


def placed(starts: list[float], tokens: list[int], seconds: float = 10.0) -> list[tuple[float, float]]:
    words = [(f" w{i}", count, 0.9) for i, count in enumerate(tokens)]
    return [(word.start, word.end) for word in place_words(words, starts, seconds)]


def test_words_take_the_times_of_their_tokens() -> None:
    assert placed([0.5, 0.7, 0.9, 1.2, 1.4], [2, 1, 1]) == [(0.5, 0.9), (0.9, 1.2), (1.2, 1.4)]


def test_silence_before_the_first_and_after_the_last_word_is_no_part_of_them() -> None:
    (first, _middle, last) = placed([0.0, 3.0, 3.3, 9.9], [1, 1, 1])
    assert first[1] == 3.0 and first[0] > 1.5
    assert last[0] == 3.3 and last[1] < 5.0


def test_times_never_go_back_or_leave_the_clip() -> None:
    marks = list(itertools.chain(*placed([0.4, 0.2, 0.9, 5.0, 7.0], [1, 1, 1, 1], seconds=2.0)))
    assert marks == sorted(marks) and marks[-1] <= 2.0


def test_a_sentence_ends_at_its_mark_or_at_a_pause() -> None:
    words = [("One", 0.0), (" two.", 0.5), (" Three", 1.0), (" four", 1.5), (" five", 4.0)]
    texts = [s.text for s in sentences([Word(start, start + 0.4, text, 0.9) for text, start in words])]
    assert texts == ["One two.", "Three four", "five"]
    assert list(sentences([])) == []


def test_times_that_fall_together_are_spread_over_the_speech_by_the_length_of_the_texts() -> None:
    words = (Word(1.9, 1.9, " ab", 0.9), Word(1.9, 1.9, " cdefg", 0.9))
    segments = [TimedText(1.9, 1.9, "ab cdefg", 0.9, words), TimedText(1.9, 1.9, "ijklmnop")]
    assert not follows_speech(segments, 2.0)
    first, second = spread(segments, 1.0, 3.0)
    assert (first.start, first.end) == (1.0, 2.0) and (second.start, second.end) == (2.0, 3.0)
    assert [(word.start, word.end) for word in first.words] == [
        (1.0, pytest.approx(4 / 3)),
        (pytest.approx(4 / 3), 2.0),
    ]
    assert follows_speech([first, second], 2.0)
    said = [TimedText(0.5, 1.5, "One."), TimedText(9.0, 10.0, "Two.")]
    assert follows_speech(said, 2.5)  # of ten seconds; the pause between them is no speech


FIRST = 1000  # the id of <|0.00|>


@pytest.mark.parametrize(
    ("ids", "parts", "until"),
    [
        ([1000, 1, 2, 1050, 1050, 3, 1100], [(0.0, 1.0), (1.0, 2.0)], None),  # one timestamp at the end: complete
        ([1000, 1, 2, 1050, 1050], [(0.0, 1.0)], 1.0),  # two: the next sentence was cut off
        ([1000, 1, 2, 1050, 1060, 3], [(0.0, 1.0), (1.2, 5.0)], 1.2),  # in the middle of a sentence
        ([1000, 1, 2], [(0.0, 5.0)], None),  # the window is one sentence: there is nowhere to cut
        ([1, 2], [(0.0, 5.0)], None),
        ([1000, 1, 1900, 1900, 2, 1950], [(0.0, 5.0), (5.0, 5.0)], None),  # beyond the end of the clip
        ([], [], None),
    ],
)
def test_timestamps_part_the_text_and_say_where_it_is_complete(
    ids: list[int], parts: list[tuple[float, float]], until: float | None
) -> None:
    found, complete_until = split_at_times(ids, [-0.1] * len(ids), FIRST, 5.0)
    assert [(part.start, part.end) for part in found] == parts
    assert complete_until == until
    assert [token for part in found for token in part.ids] == [token for token in ids if token < FIRST]
    assert all(len(part.log_probs) == len(part.ids) for part in found)
