"""The PyTorch engine for many people: a batch in which every row has its own adapter, language, prompt and beams.

What a row becomes does not depend on the others: each is encoded at the audio context that it would have alone, its decoder
hears nothing of what fills up shorter rows, and nothing is decided by vote. The encoder computes at full speed on one clip; what
a batch saves is in the decoder, where clips of different contexts meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from resonance.data.audio_context import AudioContext
from resonance.data.batches import features_at
from resonance.errors import DataError, ModelError
from resonance.messages import _
from resonance.model import adapters
from resonance.model.builtin import folder_of
from resonance.model.load import Whisper, choose_device, load_whisper
from resonance.model.lora_weights import LoadedAdapter
from resonance.model.mixing import Mixture, make_mixable
from resonance.transcribe import clip_lengths
from resonance.transcribe.answers import (
    WRITES_TIMES,
    Heard,
    answers,
    detect_languages,
    label_tokenizer,
    timestamp_share,
)
from resonance.transcribe.decoding import encode
from resonance.transcribe.recognizer import DecodeSettings, Transcript
from resonance.units import SAMPLE_RATE

# Phrases, sentences, everything: 6, 15 and 30 s. The decoder's keys and values of what fills up a row are computed for nothing;
# batches that are fuller for it save more (16 clients, phrases of 2 to 4 s).
BATCH_POSITIONS = (300, 750, 1500)


@dataclass(frozen=True, slots=True)
class Row:
    """One clip to transcribe."""

    audio: np.ndarray  # float32 [samples] at 16 kHz
    adapter: LoadedAdapter | None  # None: the base model
    settings: DecodeSettings


@dataclass(slots=True)
class MixedRecognizer:
    """A Whisper checkpoint whose batches may mix adapters. Belongs to one thread, but for what only asks."""

    whisper: Whisper
    mixture: Mixture
    linear_shapes: dict[str, tuple[int, int]]  # what an adapter may update: name to (in, out)
    base_info: adapters.Info | None = None  # of a base that was itself tuned by Resonance; None: a stock model

    @property
    def name(self) -> str:
        return self.whisper.name

    @property
    def fingerprint(self) -> str:
        """Of the base model's weights."""
        return self.whisper.fingerprint

    @property
    def device(self) -> torch.device:
        found: torch.device = self.whisper.model.device
        return found

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.whisper.model.dtype
        return found

    def positions(self, samples: int, adapter: LoadedAdapter | None) -> int:
        """Encoder positions for a clip of so many samples at 16 kHz."""
        return self._context(adapter).positions(samples / SAMPLE_RATE)

    def batch_positions(self, samples: int, adapter: LoadedAdapter | None) -> int:
        """The same rounded up to one of few: clips for which it is equal are best decoded together."""
        own = self.positions(samples, adapter)
        return min(next((size for size in BATCH_POSITIONS if size >= own), own), self.whisper.window_positions)

    def best_clip_seconds(self, adapter: LoadedAdapter | None) -> float:
        """The longest clip that is decoded well at once."""
        return clip_lengths.best_clip_seconds(self._info(adapter), self._context(adapter))

    def personal(self, adapter: LoadedAdapter | None) -> bool:
        """Whether it was tuned for somebody whom a voice-activity detector may not hear."""
        return self._info(adapter) is not None

    def check(self, settings: DecodeSettings, adapter: LoadedAdapter | None) -> None:
        """Raise DataError or ModelError for settings that no clip can be decoded with: an unknown language, a phrase that
        is too long for the model."""
        task, language = self._task(settings, adapter), self._language(settings, adapter)
        if not self.whisper.multilingual and (task == "translate" or language not in (None, "en")):
            raise DataError(
                _("{name} understands English only, and writes it as it is said. Serve a multilingual model.").format(
                    name=self.name
                )
            )
        tokenizer = label_tokenizer(self.whisper, task)
        tokenizer.prompt(language)
        if settings.phrases:
            settings.phrases.trie(tokenizer, language)
        detects = getattr(self.whisper.model.generation_config, "lang_to_id", None) or not self.whisper.multilingual
        if language is None and not detects:
            raise ModelError(
                _("{name} cannot tell which language is spoken. Say it with the request.").format(name=self.name)
            )

    def tokens(self, text: str) -> list[int]:
        """Ids of the tokens of a text, without special ones."""
        return list(self.whisper.tokenizer.encode(text, add_special_tokens=False))

    def transcribe(self, rows: Sequence[Row]) -> list[Transcript]:
        """Transcripts in the order of the rows."""
        if not rows:
            return []
        # Next to each other, rows of the same context and of the same adapter go through the layers together.
        lengths = [self.positions(len(row.audio), row.adapter) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (lengths[i], id(rows[i].adapter)))
        found = dict(zip(order, self._transcribe([rows[i] for i in order], [lengths[i] for i in order]), strict=True))
        return [found[i] for i in range(len(rows))]

    def _transcribe(self, rows: list[Row], lengths: list[int]) -> list[Transcript]:
        voices = [row.adapter for row in rows]
        seconds = [len(row.audio) / SAMPLE_RATE for row in rows]
        found: dict[int, Transcript] = {}
        with torch.inference_mode():
            hidden = self._encode(rows, lengths)
            languages = self._languages(hidden, rows, lengths)

            def heard(some: Sequence[int], task: str) -> Heard:
                index = torch.tensor(list(some), device=hidden.device)
                longest = max(lengths[i] for i in some)

                def speaking(part: Sequence[int]) -> AbstractContextManager[None]:
                    return self.mixture.speaking([voices[some[i]] for i in part])

                return Heard(
                    self.whisper,
                    hidden[index, :longest],
                    [seconds[i] for i in some],
                    [languages[i] for i in some],
                    task,
                    speaking,
                    [lengths[i] for i in some],
                )

            for (settings, task, _length), same in grouped(map(self._how, rows, lengths)).items():
                share = timestamp_share(heard(same, task), settings)
                writes = [False] * len(same) if share is None else (share > WRITES_TIMES).tolist()
                for timed in (False, True):
                    some = [row for row, its in zip(same, writes, strict=True) if its == timed]
                    if some:
                        found.update(zip(some, answers(heard(some, task), settings, timed=timed), strict=True))
        return [found[i] for i in range(len(rows))]

    def _encode(self, rows: Sequence[Row], lengths: Sequence[int]) -> torch.Tensor:
        """[rows, positions, d_model], zero behind the positions of each row."""
        parts = []
        for length, same in grouped(lengths).items():
            features = features_at([rows[i].audio for i in same], length, self.whisper.n_mels)
            with self.mixture.speaking([rows[i].adapter for i in same]):
                hidden = encode(self.whisper.model, features)
            parts.append(torch.nn.functional.pad(hidden, (0, 0, 0, max(lengths) - length)))
        return torch.cat(parts)  # the rows come sorted by length

    def _how(self, row: Row, length: int) -> tuple[DecodeSettings, str, int | None]:
        """What rows that are decoded in one go have in common. Languages are in the prompts, which are equally long.

        Beams and phrases go through transformers' decoder, which hears whatever fills up.
        """
        alike = length if row.settings.num_beams > 1 or row.settings.phrases else None
        return replace(row.settings, language=None, task=None), self._task(row.settings, row.adapter), alike

    def _languages(self, hidden: torch.Tensor, rows: Sequence[Row], lengths: Sequence[int]) -> list[str | None]:
        """Of each row, found out with its own adapter where nobody says it."""
        if not self.whisper.multilingual:
            return [None] * len(rows)
        languages = [self._language(row.settings, row.adapter) for row in rows]
        unknown = [i for i, language in enumerate(languages) if language is None]
        if unknown:
            with self.mixture.speaking([rows[i].adapter for i in unknown]):
                index = torch.tensor(unknown, device=hidden.device)
                heard = detect_languages(self.whisper, hidden[index], [lengths[i] for i in unknown])
            for i, language in zip(unknown, heard, strict=True):
                languages[i] = language
        return languages

    def _info(self, adapter: LoadedAdapter | None) -> adapters.Info | None:
        return adapter.info if adapter else self.base_info

    def _context(self, adapter: LoadedAdapter | None) -> AudioContext:
        return clip_lengths.choose_context(self._info(adapter), None, self.whisper.window_positions)

    def _language(self, settings: DecodeSettings, adapter: LoadedAdapter | None) -> str | None:
        info = self._info(adapter)
        return settings.language or (info.language if info else None)

    def _task(self, settings: DecodeSettings, adapter: LoadedAdapter | None) -> str:
        info = self._info(adapter)
        return settings.task or (info.task if info else "transcribe")


def grouped(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """The indices of equal keys together, in the order in which they first come."""
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return groups


def load_mixed(
    model: str, *, device: Literal["auto", "cuda", "cpu"] = "auto", cache_dir: Path | None = None
) -> MixedRecognizer:
    """A Whisper checkpoint by folder or hub name, or a model that was fully fine-tuned.

    Raises ModelError for an adapter, which belongs into the folder of adapters.
    """
    from resonance.model.precision import inference_dtype

    folder = adapters.find(Path(folder_of(model)).expanduser())
    info = adapters.read_info(folder) if folder and (folder / adapters.INFO_FILE).is_file() else None
    if folder and (info is None or info.kind == "lora"):
        raise ModelError(
            _(
                "{folder} is an adapter. Serve its base model, {base}, and put the adapter into the folder of adapters."
            ).format(folder=folder, base=info.base_model if info else "?")
        )
    where = choose_device(device)
    whisper = load_whisper(str(folder or model), device=where, dtype=inference_dtype(where), cache_dir=cache_dir)
    mixture, shapes = make_mixable(whisper.model)
    return MixedRecognizer(whisper, mixture, shapes, info)
