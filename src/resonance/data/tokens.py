"""Decoder inputs and labels, built token by token.

The collator that most Whisper projects copy strips the first label when it equals `tokenizer.bos_token_id`. In Whisper
that is `<|endoftext|>`, so `<|startoftranscript|>` is never stripped and the model is trained on it twice. Here both
sequences are written out:

    decoder input   <|startoftranscript|> <|en|>  <|transcribe|> <|notimestamps|> text …
    label           -100                  -100    -100           text …           <|endoftext|>

The loss stays on what the decoder has to answer. Language, task and timestamp mode are given to it, in training as in
transcription; on phrases of two or three tokens they would be half of the loss. Where recordings are in several
languages, the model has to tell the language by itself when it transcribes: then it answers `<|en|>` too.

English-only models (`.en`) have no language and task tokens. Ids differ between Whisper's versions, so every special
token is looked up by its string.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resonance.data.manifest import Segment, Utterance
from resonance.errors import DataError
from resonance.messages import _
from resonance.units import MAX_LABEL_TOKENS, TIMESTAMP_STEP_SECONDS, WINDOW_SECONDS

IGNORED_LABEL = -100  # the index that torch's cross entropy leaves out

# Whisper writes a space before the first word in languages that separate words by spaces, and none in these.
UNSPACED_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})


@dataclass(frozen=True, slots=True)
class TokenPair:
    """What the decoder reads and what it should answer, position by position; equally long."""

    decoder_input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class LabelTokenizer:
    """Turns text into token ids for one model.

    `tokenizer` is a `WhisperTokenizer`; `multilingual` is False for `.en` models; `language` and `task` are used where an
    utterance does not say its own language. With `learns_language` the language token is a label as well.
    """

    tokenizer: Any
    multilingual: bool
    language: str | None
    task: str = "transcribe"
    max_label_tokens: int = MAX_LABEL_TOKENS
    learns_language: bool = False

    def find(self, token: str) -> int | None:
        """Id of a special token such as `<|zh|>`; None when the model has no such token."""
        index: int | None = self.tokenizer.convert_tokens_to_ids(token)
        return None if index == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token else index

    def special(self, token: str) -> int:
        """Id of a special token such as `<|zh|>`. Raises DataError when the model has no such token."""
        index = self.find(token)
        if index is None:
            raise DataError(
                _("The model's tokenizer has no token {token}. Choose another --language, or another model.").format(
                    token=token
                )
            )
        return index

    def prompt(self, language: str | None, *, timestamps: bool = False) -> list[int]:
        """The ids that decoding starts from. Without a language, a multilingual model is asked for English."""
        ids = [self.special("<|startoftranscript|>")]
        if self.multilingual:
            ids += [self.special(f"<|{language or self.language or 'en'}|>"), self.special(f"<|{self.task}|>")]
        if not timestamps:
            ids.append(self.special("<|notimestamps|>"))
        return ids

    def previous(self, text: str | None) -> list[int]:
        """What was said before, as a prefix of a prompt: at most half of what the decoder holds, as in openai/whisper.

        What looks like a special token in it is spelled out, never obeyed.
        """
        if not text:
            return []
        ids = self._spelled(" " + text.strip())
        return [self.special("<|startofprev|>"), *ids[-(self.max_label_tokens // 2 - 1) :]]

    def text_ids(self, text: str, language: str | None) -> list[int]:
        """Ids of plain text. What looks like a special token in a transcript is spelled out, never obeyed."""
        text = text.strip()
        if not text:
            return []
        if (language or self.language) not in UNSPACED_LANGUAGES:
            text = " " + text
        return self._spelled(text)

    def _spelled(self, text: str) -> list[int]:
        # `split_special_tokens` does not reach timestamps, which are not special in OpenAI's tokenizers; a cut does.
        parts = re.split(r"(?<=<)(?=\|)", text)
        return [i for part in parts for i in self.tokenizer(part, add_special_tokens=False).input_ids]

    def timed_ids(self, segments: Sequence[Segment], language: str | None) -> list[int]:
        """Ids of segments, each between its start and end timestamp; times are rounded to multiples of 0.02 s."""
        first = self.special("<|0.00|>")
        ids: list[int] = []
        for segment in segments:
            start, end = (first + round(t / TIMESTAMP_STEP_SECONDS) for t in (segment.start, segment.end))
            ids += [start, *self.text_ids(segment.text, language), end]
        return ids

    def encode(self, utterance: Utterance, *, timestamps: bool = False) -> TokenPair:
        """Decoder inputs and labels of one utterance, with timestamps where asked for and its segments are known.

        Raises DataError when the label is longer than the decoder can hold.
        """
        timestamps = timestamps and bool(utterance.segments) and utterance.segments[-1].end <= WINDOW_SECONDS
        prompt = self.prompt(utterance.language, timestamps=timestamps)
        body = (
            self.timed_ids(utterance.segments, utterance.language)
            if timestamps
            else self.text_ids(utterance.text, utterance.language)
        )
        ids = prompt + body
        if len(ids) > self.max_label_tokens:
            raise DataError(
                _(
                    "Row {row} ({audio}): the text is {found} tokens long with its special tokens; the model holds {most}. "
                    "Cut the recording into shorter ones."
                ).format(row=utterance.row, audio=utterance.audio, found=len(ids), most=self.max_label_tokens)
            )
        answer = [*body, self.special("<|endoftext|>")]
        given = [IGNORED_LABEL] * (len(prompt) - 1)
        if self.learns_language and self.multilingual:
            given[0] = prompt[1]
        return TokenPair(ids, given + answer)

    def count(self, text: str, language: str | None = None) -> int:
        """Tokens that a label with this text takes, special tokens included."""
        return len(self.prompt(language)) + len(self.text_ids(text, language))
