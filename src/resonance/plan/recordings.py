"""What the plan has to know of the recordings: how many, how long, how long their labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from resonance.config import TrainConfig
from resonance.data.manifest import Utterance
from resonance.data.sources import looks_streamed
from resonance.train.rows import Rows, read_rows
from resonance.units import MAX_LABEL_TOKENS

PROMPT_TOKENS = 4  # <|startoftranscript|>, language, task, <|notimestamps|>
# Where the model's tokenizer is not at hand: tokens in one letter, measured with the multilingual vocabulary (51,865 tokens) on
# 838 transcripts of TORGO (0.27) and on AISHELL-1 and HSK sentences (1.22 and 1.16).
TOKENS_PER_LETTER, TOKENS_PER_CHINESE = 0.27, 1.2
SAMPLED = 200
MOST_CLIPS = 1_000_000  # of a stream: more plan nothing else
LONG_SHARE = 0.02  # recordings that may be longer than what is called usual


@dataclass(frozen=True)
class Recordings:
    """Lengths of the rows to train on and to measure on."""

    train_seconds: tuple[float, ...]  # ascending
    held_out: int
    label_tokens: tuple[int, ...]  # ascending, prompt included
    counted: bool  # False: the label lengths are estimated

    @property
    def clips(self) -> int:
        return len(self.train_seconds)

    @functools.cached_property
    def hours(self) -> float:
        return sum(self.train_seconds) / 3600

    @property
    def longest(self) -> float:
        return self.train_seconds[-1]

    @property
    def usual_longest(self) -> float:
        """Seconds that all but a few recordings stay below."""
        return self.train_seconds[int((1 - LONG_SHARE) * (self.clips - 1))]

    @property
    def some_seconds(self) -> tuple[float, ...]:
        """Up to SAMPLED lengths that stand for all."""
        return self.train_seconds[:: max(1, self.clips // SAMPLED)]

    @property
    def longest_label(self) -> int:
        return self.label_tokens[-1]

    @functools.cached_property
    def mean_label(self) -> float:
        return sum(self.label_tokens) / len(self.label_tokens)


def measure(config: TrainConfig, model_folder: Path | None, console: Console) -> Recordings:
    """Read the manifests of `config`, or some of what it streams, as training would. Raises DataError as training would."""
    if stream_reason(config):
        config = config.model_copy(update={"streaming": True})
    return lengths(read_rows(config, console), token_counter(model_folder))


def stream_reason(config: TrainConfig) -> str | None:
    """Why the data has to be streamed; None where it is listed, or where the user decided."""
    settled = config.streaming_is_settled or config.train_file is None
    return None if settled else looks_streamed(config.train_file or "")


def lengths(rows: Rows, count: Callable[[str], int] | None) -> Recordings:
    """`count` gives the tokens of a text; without it they are estimated. Of a stream, some recordings stand for all."""
    clips = min(rows.count or 0, MOST_CLIPS) if rows.stream else 0
    times = max(1, round(clips / len(rows.train)))
    return Recordings(
        tuple(sorted([row.duration or 0.0 for row in rows.train] * times)),
        len(rows.held_out),
        tuple(sorted(label_lengths(rows.train, count or estimated_tokens) * times)),
        counted=count is not None,
    )


def made_up(hours: float, clip_seconds: float) -> Recordings:
    """Recordings of one length, for a plan before there are any: three words a second."""
    clips = max(1, round(hours * 3600 / clip_seconds))
    tokens = min(MAX_LABEL_TOKENS, PROMPT_TOKENS + round(4 * clip_seconds))
    return Recordings((clip_seconds,) * clips, clips // 10, (tokens,) * clips, counted=False)


def label_lengths(rows: Sequence[Utterance], count: Callable[[str], int]) -> list[int]:
    return [min(MAX_LABEL_TOKENS, PROMPT_TOKENS + count(row.text)) for row in rows]


def token_counter(folder: Path | None) -> Callable[[str], int] | None:
    """Counts the tokens of a text with the tokenizer in a checkpoint's folder; None where there is none."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def estimated_tokens(text: str) -> int:
    chinese = sum("\u3040" <= c <= "\u9fff" for c in text)
    return round(chinese * TOKENS_PER_CHINESE + (len(text) - chinese) * TOKENS_PER_LETTER) + 1
