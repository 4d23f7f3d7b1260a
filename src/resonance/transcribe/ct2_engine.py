"""The CTranslate2 engine: models that `resonance export --to ctranslate2` wrote, in 8 bits if wanted.

CTranslate2's encoder takes fewer frames than 30 s have as they are (4.8: measured, the texts are PyTorch's), so a model hears
here what it was trained to hear.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import WhisperTokenizer

from resonance.data.audio_context import AudioContext
from resonance.data.batches import batch_features
from resonance.data.tokens import LabelTokenizer
from resonance.errors import ConfigError, MissingExtraError, ModelError
from resonance.messages import _
from resonance.model import adapters, exports
from resonance.model.load import MULTILINGUAL_TOKENS, quiet_libraries
from resonance.transcribe import clip_lengths, decoding
from resonance.transcribe.fallback import Decoded, Judged, with_fallback
from resonance.transcribe.recognizer import DecodeSettings, Transcript
from resonance.transcribe.segments import text_of, transcripts
from resonance.units import (
    FRAMES_PER_POSITION,
    MAX_LABEL_TOKENS,
    POSITIONS_PER_SECOND,
    SAMPLE_RATE,
    TIMESTAMP_STEP_SECONDS,
    WINDOW_POSITIONS,
)

LEAST_PROBABILITY = 1e-9


@dataclass(slots=True)
class Ct2Recognizer:
    """A Whisper of CTranslate2."""

    folder: Path
    model: Any  # ctranslate2.models.Whisper
    tokenizer: WhisperTokenizer
    multilingual: bool
    context: AudioContext
    info: adapters.Info | None  # of a fine-tuned model; None for a stock model
    writes_timestamps: bool  # whether it gives times when it is asked for them

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def max_clip_seconds(self) -> float:
        return clip_lengths.max_clip_seconds(self.context)

    @property
    def best_clip_seconds(self) -> float:
        return clip_lengths.best_clip_seconds(self.info, self.context)

    @property
    def personal(self) -> bool:
        return self.info is not None

    def transcribe(self, clips: Sequence[np.ndarray], settings: DecodeSettings) -> list[Transcript]:
        if not clips:
            return []
        if settings.phrases:
            raise ConfigError([_("phrases needs the engine torch: CTranslate2 cannot lean towards phrases.")])
        features = batch_features(clips, self.context, self.model.n_mels).numpy()
        hidden = np.array(self.model.encode(storage(features), to_cpu=True))  # [batch, positions, d_model]
        languages = self._languages(hidden, settings)
        tokenizer = LabelTokenizer(
            self.tokenizer,
            self.multilingual,
            None,
            settings.task or (self.info.task if self.info else "transcribe"),
        )
        prompts = [tokenizer.prompt(language) for language in languages]
        timed = settings.times != "none" and self.writes_timestamps
        before = tokenizer.previous(settings.prompt)
        asked = [[*before, *(prompt[:-1] if timed else prompt)] for prompt in prompts]
        found = self._decode(hidden, asked, settings)
        seconds = [len(clip) / SAMPLE_RATE for clip in clips]
        first = tokenizer.special("<|0.00|>") if settings.times != "none" else None
        aligned = _Aligned(self.model, hidden, prompts, seconds)
        if settings.times != "none":
            assert first is not None
            found = aligned.with_probabilities(found, first)
        return transcripts(found, self.tokenizer, languages, seconds, settings.times, timed, first, aligned.starts)

    def _decode(self, hidden: np.ndarray, prompts: list[list[int]], settings: DecodeSettings) -> list[Judged]:
        import ctranslate2

        most = int(hidden.shape[1] * TIMESTAMP_STEP_SECONDS * decoding.TOKENS_PER_SECOND) + decoding.TOKENS_AT_LEAST
        prompt_length = len(prompts[0])
        new = min(settings.max_new_tokens or most, MAX_LABEL_TOKENS - prompt_length)

        def attempt(rows: Sequence[int], temperature: float) -> list[Decoded]:
            ctranslate2.set_random_seed(0)
            results = self.model.generate(
                storage(hidden[list(rows)]),
                [prompts[row] for row in rows],
                beam_size=1 if temperature else settings.num_beams,
                # It writes at most half of it, and at most it without all of the prompt but one (4.8, measured).
                max_length=max(2 * new, new + prompt_length - 1),
                sampling_topk=0 if temperature else 1,
                sampling_temperature=temperature or 1.0,
                return_scores=True,
                return_no_speech_prob=True,
            )
            return [decoded(result, temperature, new) for result in results]

        return with_fallback(attempt, lambda found: text_of(self.tokenizer, found.ids), len(hidden), settings)

    def _languages(self, hidden: np.ndarray, settings: DecodeSettings) -> list[str | None]:
        language = settings.language or (self.info.language if self.info else None)
        if not self.multilingual:
            return [None] * len(hidden)
        if language:
            return [language] * len(hidden)
        if not self.model.is_multilingual:  # CTranslate2 goes by the size of OpenAI's vocabularies
            raise ModelError(
                _("{name} does not say which languages it knows, so none can be found out. Give --language.").format(
                    name=self.name
                )
            )
        return [found[0][0].strip("<|>") for found in self.model.detect_language(storage(hidden))]

    def spellings(self) -> dict[str, str]:
        """British to American spellings, where the model's tokenizer brings them (Whisper's normalizer.json)."""
        return dict(getattr(self.tokenizer, "english_spelling_normalizer", None) or {})


@dataclass(slots=True)
class _Aligned:
    """Which positions of the audio each token listens to, and how probable it is there, by CTranslate2's own alignment."""

    model: Any
    hidden: np.ndarray
    prompts: list[list[int]]
    seconds: list[float]

    def __call__(self, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> list[Any]:
        """CTranslate2's results for some rows. It takes one prompt, without `<|notimestamps|>`, for all of a call."""
        found: dict[int, Any] = {}
        for prompt in sorted({tuple(self.prompts[row][:-1]) for row in rows}):
            some = [i for i, row in enumerate(rows) if tuple(self.prompts[row][:-1]) == prompt]
            results = self.model.align(
                storage(self.hidden[[rows[i] for i in some]]),
                list(prompt),
                [list(texts[i]) for i in some],
                [FRAMES_PER_POSITION * self._positions(rows[i]) for i in some],
            )
            found.update(zip(some, results, strict=True))
        return [found[i] for i in range(len(rows))]

    def _positions(self, row: int) -> int:
        return min(max(round(self.seconds[row] * POSITIONS_PER_SECOND), 1), int(self.hidden.shape[1]))

    def starts(self, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Seconds at which each token of each text begins, and the last one ends: one more than tokens."""
        answers = []
        for text, result in zip(texts, self(rows, texts), strict=True):
            at: dict[int, int] = {}
            for token, position in result.alignments:
                at.setdefault(token, position)
            answers.append([at[token] / POSITIONS_PER_SECOND for token in range(len(text) + 1)])
        return answers

    def with_probabilities(self, found: Sequence[Judged], first_timestamp: int) -> list[Judged]:
        """The same with the log-probability of each text token: generating, CTranslate2 gives only their mean."""
        texts = [[token for token in judged.decoded.ids if token < first_timestamp] for judged in found]
        rows = [row for row, text in enumerate(texts) if text]
        results = dict(zip(rows, self(rows, [texts[row] for row in rows]), strict=True)) if rows else {}
        return [
            replace(judged, decoded=with_log_probs(judged.decoded, results[row].text_token_probs, first_timestamp))
            if row in results
            else judged
            for row, judged in enumerate(found)
        ]


def storage(values: np.ndarray) -> Any:
    """A StorageView of CTranslate2 for an array. It keeps the array's memory, so the array has to be contiguous."""
    import ctranslate2

    return ctranslate2.StorageView.from_array(np.ascontiguousarray(values))


def decoded(result: Any, temperature: float, most: int) -> Decoded:
    """From a WhisperGenerationResult of at most so many tokens. Its score is the sum over the tokens, and the end where there
    is one, by the number of tokens without the end."""
    ids = list(result.sequences_ids[0])
    counted = len(ids) + (len(ids) < most)
    mean = result.scores[0] * max(len(ids), 1) / counted
    return Decoded(ids, [mean] * counted, result.no_speech_prob, temperature)


def with_log_probs(found: Decoded, probabilities: Sequence[float], first_timestamp: int) -> Decoded:
    """Those of the text tokens put in their places; the mean stays what it was, by the timestamps and the end."""
    log_probs = list(found.log_probs)
    places = [i for i, token in enumerate(found.ids) if token < first_timestamp]
    for place, probability in zip(places, probabilities, strict=True):
        log_probs[place] = float(np.log(max(probability, LEAST_PROBABILITY)))
    others = sorted(set(range(len(log_probs))) - set(places))
    left = sum(found.log_probs) - sum(log_probs[i] for i in places)
    for i in others:
        log_probs[i] = left / len(others)
    return replace(found, log_probs=log_probs)


def load_ct2_recognizer(
    model_path: str,
    *,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    audio_context: Literal["auto", "full"] | float | None = None,
) -> Ct2Recognizer:
    """The model of a folder for CTranslate2, as `resonance export` or CTranslate2's own converter writes it.

    Raises MissingExtraError where CTranslate2 is not installed, ModelError where files are missing or damaged.
    """
    try:
        import ctranslate2
    except ImportError:
        raise MissingExtraError(_('CTranslate2 is not installed: pip install "resonance-asr[ct2]"')) from None
    folder = Path(model_path).expanduser()
    exports.check_ctranslate2(folder)
    record = exports.read_record(folder)
    info = adapters.read_info(folder) if (folder / adapters.INFO_FILE).is_file() else None
    ctranslate2.set_log_level(logging.ERROR)  # it warns of numbers that the processor has not, and takes others
    if device == "auto":
        device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    try:
        with quiet_libraries():
            tokenizer = WhisperTokenizer.from_pretrained(str(folder))
        model = ctranslate2.models.Whisper(
            str(folder), device=device, compute_type="default", intra_threads=torch.get_num_threads()
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            _("{folder} cannot be loaded by CTranslate2: {reason}. Export it again.").format(
                folder=folder, reason=str(error).strip()
            )
        ) from error
    return Ct2Recognizer(
        folder,
        model,
        tokenizer,
        is_multilingual(folder, tokenizer),
        clip_lengths.choose_context(info, audio_context, WINDOW_POSITIONS),
        info,
        record.writes_timestamps if record else True,
    )


def is_multilingual(folder: Path, tokenizer: WhisperTokenizer) -> bool:
    """False for `.en` models. The vocabulary decides where the generation settings are not there or say nothing."""
    try:
        flag = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("is_multilingual")
    except (OSError, ValueError):
        flag = None
    return bool(flag) if flag is not None else bool(len(tokenizer) >= MULTILINGUAL_TOKENS)
