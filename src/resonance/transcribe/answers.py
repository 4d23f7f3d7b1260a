"""From what the encoder made of a batch to a transcript for each clip, whichever adapters its rows go through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from resonance.data.tokens import LabelTokenizer
from resonance.errors import ModelError
from resonance.messages import _
from resonance.model.load import Whisper
from resonance.transcribe import phrases
from resonance.transcribe.decoding import Decoder, Speaking, generate, one_voice, score, unwrap
from resonance.transcribe.fallback import Decoded, Judged, judge, with_fallback
from resonance.transcribe.phrases import PhraseChoice
from resonance.transcribe.recognizer import DecodeSettings, Transcript
from resonance.transcribe.segments import text_of, transcripts
from resonance.transcribe.word_times import token_starts

# A model that writes times begins with one for nearly all clips; one that has forgotten them, for hardly any.
WRITES_TIMES = 0.1


@dataclass(frozen=True, slots=True)
class Heard:
    """A batch after the encoder."""

    whisper: Whisper
    hidden: torch.Tensor  # [rows, positions, d_model]
    seconds: Sequence[float]  # of each clip
    languages: Sequence[str | None]  # of each clip; None: an English-only model
    task: str
    speaking: Speaking = one_voice
    lengths: Sequence[int] | None = None  # positions of each row, where the others only fill up; None: all count

    @property
    def tokenizer(self) -> LabelTokenizer:
        return label_tokenizer(self.whisper, self.task)

    def some(self, rows: Sequence[int]) -> torch.Tensor:
        """The encoder's output of some rows."""
        if list(rows) == list(range(len(self.hidden))):
            return self.hidden
        return self.hidden[torch.tensor(list(rows), device=self.hidden.device)]

    def lengths_of(self, rows: Sequence[int]) -> list[int] | None:
        return None if self.lengths is None else [self.lengths[row] for row in rows]


def label_tokenizer(whisper: Whisper, task: str) -> LabelTokenizer:
    """What turns texts into the tokens of a model. The language is said with each text."""
    return LabelTokenizer(whisper.tokenizer, whisper.multilingual, None, task, whisper.max_label_tokens)


def prompts_of(heard: Heard, settings: DecodeSettings) -> list[list[int]]:
    """What decoding starts from, for each row; equally long."""
    before = heard.tokenizer.previous(settings.prompt)
    return [[*before, *heard.tokenizer.prompt(language)] for language in heard.languages]


def answers(heard: Heard, settings: DecodeSettings, *, timed: bool) -> list[Transcript]:
    """A transcript for each row. `timed`: the model writes the times of segments itself."""
    model = unwrap(heard.whisper.model)
    prompts = prompts_of(heard, settings)
    found = _decode(heard, [prompt[:-1] for prompt in prompts] if timed else prompts, settings, timed)
    chosen: list[PhraseChoice] = []
    if settings.phrases:
        written = [(judged.text, judged.decoded.ids) for judged in found]
        chosen = phrases.apply(
            model, heard.hidden, heard.languages, written, heard.tokenizer, settings.phrases, heard.speaking
        )
        found = with_phrases(heard, prompts, found, chosen, settings)

    def starts(rows: Sequence[int], texts: Sequence[Sequence[int]]) -> list[list[float]]:
        seconds = [heard.seconds[row] for row in rows]
        with heard.speaking(rows):
            return token_starts(
                model, heard.some(rows), [prompts[row] for row in rows], texts, seconds, heard.lengths_of(rows)
            )

    first = heard.tokenizer.find("<|0.00|>") if settings.times != "none" else None
    said = transcripts(
        found, heard.whisper.tokenizer, heard.languages, heard.seconds, settings.times, timed, first, starts
    )
    if chosen:
        return [
            replace(answer, phrase=choice.phrase, phrase_score=choice.score)
            for answer, choice in zip(said, chosen, strict=True)
        ]
    return said


def _decode(heard: Heard, prompts: list[list[int]], settings: DecodeSettings, timed: bool) -> list[Judged]:
    def attempt(rows: Sequence[int], temperature: float) -> list[Decoded]:
        with heard.speaking(rows):
            return generate(
                unwrap(heard.whisper.model),
                heard.some(rows),
                [prompts[row] for row in rows],
                num_beams=settings.num_beams,
                timestamps=timed,
                temperature=temperature,
                max_new_tokens=settings.max_new_tokens,
                scores=settings.scores or settings.times != "none" or len(settings.temperatures) > 1,
                lengths=heard.lengths_of(rows),
            )

    def text(decoded: Decoded) -> str:
        """Timestamps left out, which are not special tokens in OpenAI's tokenizers."""
        return text_of(heard.whisper.tokenizer, decoded.ids)

    return with_fallback(attempt, text, len(heard.hidden), settings)


def with_phrases(
    heard: Heard,
    prompts: Sequence[Sequence[int]],
    found: Sequence[Judged],
    chosen: Sequence[PhraseChoice],
    settings: DecodeSettings,
) -> list[Judged]:
    """What was written freely, with the phrase that was chosen in its place, and the probability that the model gives that."""
    rows = [row for row, choice in enumerate(chosen) if choice.text != found[row].text]
    if not rows:
        return list(found)
    with heard.speaking(rows):
        scored = score(
            unwrap(heard.whisper.model),
            heard.some(rows),
            [prompts[row] for row in rows],
            [chosen[row].ids for row in rows],
            heard.lengths_of(rows),
        )
    answers = list(found)
    for row, decoded in zip(rows, scored, strict=True):
        answers[row] = judge(decoded, chosen[row].text, settings)
    return answers


def timestamp_share(heard: Heard, settings: DecodeSettings) -> torch.Tensor | None:
    """[rows]: how probable it is that the model, asked for times, begins with one. None: times are not asked for or not known.

    Trained on texts without times a model forgets them. Forced to write times it then writes noise between them.
    """
    model = unwrap(heard.whisper.model)
    first = heard.tokenizer.find("<|0.00|>") if settings.times != "none" and not settings.phrases else None
    if first is None or getattr(model.generation_config, "no_timestamps_token_id", None) is None:
        return None
    prompt = torch.tensor([ids[:-1] for ids in prompts_of(heard, settings)], device=heard.hidden.device)
    with heard.speaking(range(len(prompt))):
        decoder = Decoder(model, heard.hidden, prompt.shape[1], heard.lengths)
        return decoder.logits(decoder(prompt)[:, -1]).softmax(dim=-1)[:, first:].sum(dim=-1)


def detect_languages(whisper: Whisper, hidden: torch.Tensor, lengths: Sequence[int] | None = None) -> list[str]:
    """The most probable language of each row of encoder output [batch, positions, d_model]."""
    model = unwrap(whisper.model)
    table: dict[str, int] | None = getattr(model.generation_config, "lang_to_id", None)
    if not table:
        raise ModelError(
            _("{name} does not say which languages it knows, so none can be found out. Give --language.").format(
                name=whisper.name
            )
        )
    tokens, ids = list(table), torch.tensor(list(table.values()), device=hidden.device)
    start = torch.full((len(hidden), 1), model.generation_config.decoder_start_token_id, device=hidden.device)
    decoder = Decoder(model, hidden, 1, lengths)
    logits = decoder.logits(decoder(start)[:, -1])
    return [tokens[i].strip("<|>") for i in logits[:, ids].argmax(dim=-1).tolist()]
