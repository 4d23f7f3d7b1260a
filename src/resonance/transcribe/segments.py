"""From tokens to sentences and words with their times: the same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from resonance.data.tokens import UNSPACED_LANGUAGES
from resonance.transcribe.fallback import Judged
from resonance.transcribe.recognizer import TimedText, Times, Transcript, Word
from resonance.units import TIMESTAMP_STEP_SECONDS

SENTENCE_ENDS = ".?!…。？！؟।"
PAUSE_SECONDS = 1.0  # between two words: a new sentence, where the model writes no times itself
FOLLOWED_SHARE = 0.25  # of the time in which somebody speaks: less is covered only where attention does not follow
LONGEST_WORD_SECONDS = 0.7  # of the median word, as openai/whisper's timing.py has it; twice that is too long for any


@dataclass(frozen=True, slots=True)
class TimedTokens:
    """Text tokens between two timestamps, with the log-probability of each."""

    start: float
    end: float
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]


# Gives the seconds at which each token of texts begins, and the last one ends, for some of the batch's rows.
TokenStarts = Callable[[Sequence[int], Sequence[Sequence[int]]], list[list[float]]]


def transcripts(
    found: Sequence[Judged],
    tokenizer: Any,
    languages: Sequence[str | None],
    seconds: Sequence[float],
    times: Times,
    timed: bool,
    first_timestamp: int | None,
    starts: TokenStarts,
) -> list[Transcript]:
    """What the recogniser answers for what was decoded of clips of so many seconds.

    `timed`: whether the texts have timestamps between them, from the id `first_timestamp` on. Where they have none, or the
    times of words are wanted, `starts` says when tokens are said.
    """
    parts: list[list[TimedTokens]] = []
    complete: list[float | None] = []
    for judged, length in zip(found, seconds, strict=True):
        ids, log_probs = judged.decoded.ids, judged.decoded.log_probs[: len(judged.decoded.ids)]
        if timed and first_timestamp is not None:
            some, until = split_at_times(ids, log_probs, first_timestamp, length)
        else:
            some, until = ([TimedTokens(0.0, length, tuple(ids), tuple(log_probs))] if ids else []), None
        parts.append(some)
        complete.append(until)
    words: dict[int, list[list[Word]]] = {}
    if times == "word" or (times == "segment" and not timed):
        rows = [row for row, some in enumerate(parts) if some]
        texts = [[token for part in parts[row] for token in part.ids] for row in rows]
        for row, at in zip(rows, starts(rows, texts) if rows else [], strict=True):
            words[row] = _words_of_parts(tokenizer, parts[row], at, languages[row], seconds[row])
    answers = []
    for row, judged in enumerate(found):
        said = [word for part in words.get(row, []) for word in part]
        if not timed and said:
            segments = [*sentences(said)]
        elif said:
            segments = [within(join(some), part.end) for some, part in zip(words[row], parts[row], strict=True) if some]
        else:
            segments = [
                TimedText(part.start, part.end, text, confidence(part.log_probs) if part.log_probs else None)
                for part in parts[row]
                if (text := text_of(tokenizer, part.ids))
            ]
        if len(segments) == 1 and times == "none":
            segments = [replace(segments[0], text=judged.text)]  # a phrase as its list spells it
        if times == "segment":
            segments = [replace(segment, words=()) for segment in segments]
        answers.append(
            Transcript(
                judged.text,
                languages[row],
                tuple(
                    replace(
                        segment,
                        repetitive=judged.repetitive,
                        temperature=judged.decoded.temperature,
                        no_speech_probability=judged.decoded.no_speech_probability,
                    )
                    for segment in segments
                ),
                judged.decoded.mean_log_prob,
                judged.decoded.no_speech_probability,
                judged.compression_ratio,
                judged.decoded.temperature,
                timed=timed,
                complete_until=complete[row],
            )
        )
    return answers


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of tokens without special tokens and timestamps."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


def _words_of_parts(
    tokenizer: Any, parts: Sequence[TimedTokens], starts: Sequence[float], language: str | None, seconds: float
) -> list[list[Word]]:
    """The words of each part, placed by the times of all their tokens."""
    grouped = [group_words(tokenizer, part.ids, part.log_probs, language) for part in parts]
    placed = iter(place_words([word for some in grouped for word in some], starts, seconds))
    return [[next(placed) for _word in some] for some in grouped]


def split_at_times(
    ids: Sequence[int], log_probs: Sequence[float], first_timestamp: int, seconds: float
) -> tuple[list[TimedTokens], float | None]:
    """The parts between timestamp tokens, within `seconds`, and up to where the text is complete.

    That is None where it is complete to the end of the clip. Where the last sentence was cut off, the ids end with one
    timestamp behind another, or in the last part: sequential decoding goes on there (openai/whisper, `transcribe.py`).
    """
    parts: list[TimedTokens] = []
    start, words, probs = 0.0, list[int](), list[float]()

    def close(end: float) -> None:
        if words:
            parts.append(TimedTokens(min(start, seconds), min(max(start, end), seconds), tuple(words), tuple(probs)))

    for i, token in enumerate(ids):
        if token < first_timestamp:
            words.append(token)
            probs += log_probs[i : i + 1]
            continue
        time = (token - first_timestamp) * TIMESTAMP_STEP_SECONDS
        close(time)
        start, words, probs = time, [], []
    if words:
        close(seconds)
        return parts, parts[-1].start if len(parts) > 1 else None
    in_pairs = len(ids) > 1 and ids[-2] >= first_timestamp
    return parts, min(start, seconds) if in_pairs and parts else None


def group_words(
    tokenizer: Any, ids: Sequence[int], log_probs: Sequence[float], language: str | None
) -> list[tuple[str, int, float]]:
    """(text with the space before it, tokens, confidence) of each word, or character where words have no spaces."""
    from transformers.models.whisper.tokenization_whisper import _combine_tokens_into_words

    style = "chinese" if language in UNSPACED_LANGUAGES else "english"
    words, _tokens, indices = _combine_tokens_into_words(tokenizer, list(ids), style)
    return [
        (word, len(places), confidence([log_probs[i] for i in places]))
        for word, places in zip(words, indices, strict=True)
        if places
    ]


def confidence(log_probs: Sequence[float]) -> float:
    """0-1: geometric mean of the tokens' probabilities."""
    return float(np.exp(np.mean(log_probs))) if len(log_probs) else 0.0


def place_words(
    words: Sequence[tuple[str, int, float]], token_starts: Sequence[float], seconds: float
) -> tuple[Word, ...]:
    """Words with times, from `group_words` and the time at which each token begins, and the last one ends: one more than
    tokens. Monotonic, within the clip, and no word longer than is said.

    Attention gives the first word the silence before it and the last one that behind (openai/whisper, `timing.py`).
    """
    starts, ends, at = [], [], 0
    for _text, count, _confidence in words:
        starts.append(token_starts[at])
        at += count
        ends.append(token_starts[at])
    spoken = [end - start for start, end in zip(starts, ends, strict=True) if end > start]
    most = 2 * min(float(np.median(spoken)), LONGEST_WORD_SECONDS) if spoken else 0.0
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if most and end - start > most:
            # What follows a pause begins late, what precedes one ends early: only the first is cut at its beginning.
            starts[i], ends[i] = (end - most, end) if i == 0 else (start, start + most)
    placed, before = [], 0.0
    for (text, _count, sure), start, end in zip(words, starts, ends, strict=True):
        start = min(max(start, before), seconds)
        before = min(max(end, start), seconds)
        placed.append(Word(start, before, text, sure))
    return tuple(placed)


def sentences(words: Sequence[Word]) -> Iterator[TimedText]:
    """Words as sentences: a new one after an end mark, or a pause of a second."""
    begin = 0
    for i, word in enumerate(words):
        last = i + 1 == len(words)
        ends = word.text.rstrip().endswith(tuple(SENTENCE_ENDS))
        if last or ends or words[i + 1].start - word.end >= PAUSE_SECONDS:
            yield join(words[begin : i + 1])
            begin = i + 1


def join(words: Sequence[Word]) -> TimedText:
    """Words as one piece of text."""
    sure = [np.log(max(word.confidence, 1e-9)) for word in words]
    text = "".join(word.text for word in words).strip()
    return TimedText(words[0].start, words[-1].end, text, confidence(sure), tuple(words))


def within(segment: TimedText, end: float) -> TimedText:
    """Not beyond the timestamp that the model wrote behind it: sequential decoding goes on there."""
    words = tuple(replace(word, start=min(word.start, end), end=min(word.end, end)) for word in segment.words)
    return replace(segment, start=min(segment.start, end), end=min(segment.end, end), words=words)


def spread(segments: Sequence[TimedText], start: float, end: float) -> tuple[TimedText, ...]:
    """The same texts, with times by their share of the characters between `start` and `end`, where the speech is."""
    total = max(sum(len(segment.text) for segment in segments), 1)
    a_character, at, placed = (end - start) / total, start, []
    for segment in segments:
        until = at + a_character * len(segment.text)
        word_at, words = at, []
        share = (until - at) / max(sum(len(word.text) for word in segment.words), 1)
        for word in segment.words:
            word_end = min(word_at + share * len(word.text), until)
            words.append(replace(word, start=word_at, end=word_end))
            word_at = word_end
        placed.append(replace(segment, start=at, end=until, words=tuple(words)))
        at = until
    return tuple(placed)


def follows_speech(segments: Sequence[TimedText], seconds: float) -> bool:
    """Whether times from attention cover speech of so many seconds. Where no head follows it, they fall together."""
    timed = [piece for segment in segments for piece in (segment.words or (segment,))]
    return sum(piece.end - piece.start for piece in timed) > FOLLOWED_SHARE * seconds


def joined(first: str, second: str) -> str:
    """Two texts as one, with a space between them where the script has spaces."""
    if not first or not second:
        return first or second
    return first + second if _unspaced(first[-1]) and _unspaced(second[0]) else f"{first} {second}"


def _unspaced(character: str) -> bool:
    """Whether words stand without spaces where this character is: Chinese, Japanese and their punctuation."""
    return "\u3000" <= character <= "\u30ff" or "\u4e00" <= character <= "\u9fff" or "\uff00" <= character <= "\uff65"
