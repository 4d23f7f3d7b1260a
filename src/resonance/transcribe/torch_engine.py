"""The PyTorch engine: live LoRA adapters, at the audio context they were trained with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from resonance.data.audio_context import AudioContext
from resonance.data.batches import batch_features
from resonance.errors import ModelError
from resonance.messages import _
from resonance.model import adapters
from resonance.model.builtin import folder_of
from resonance.model.load import Whisper, choose_device, load_whisper
from resonance.model.lora import quiet_peft
from resonance.transcribe import clip_lengths
from resonance.transcribe.answers import WRITES_TIMES, Heard, answers, detect_languages, timestamp_share
from resonance.transcribe.decoding import encode, unwrap
from resonance.transcribe.recognizer import DecodeSettings, Transcript
from resonance.units import SAMPLE_RATE, WINDOW_POSITIONS


@dataclass(slots=True)
class TorchRecognizer:
    """A Whisper checkpoint with at most one adapter."""

    whisper: Whisper
    context: AudioContext
    info: adapters.Info | None = None  # of the adapter or fine-tuned model; None for a stock model
    base_context: AudioContext | None = None  # what the base under an adapter was trained with; None: its whole window

    @property
    def name(self) -> str:
        return self.whisper.name

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
        features = batch_features(clips, self.context, self.whisper.n_mels)
        with torch.inference_mode():
            hidden = encode(unwrap(self.whisper.model), features)
            heard = Heard(
                self.whisper,
                hidden,
                [len(clip) / SAMPLE_RATE for clip in clips],
                self._languages(hidden, settings),
                settings.task or (self.info.task if self.info else "transcribe"),
            )
            share = timestamp_share(heard, settings)
            return answers(heard, settings, timed=share is not None and bool(share.median() > WRITES_TIMES))

    def _languages(self, hidden: torch.Tensor, settings: DecodeSettings) -> list[str | None]:
        language = settings.language or (self.info.language if self.info else None)
        if not self.whisper.multilingual:
            return [None] * len(hidden)
        if language:
            return [language] * len(hidden)
        return list(detect_languages(self.whisper, hidden))

    def spellings(self) -> dict[str, str]:
        """British to American spellings, where the model's tokenizer brings them (Whisper's normalizer.json)."""
        return dict(getattr(self.whisper.tokenizer, "english_spelling_normalizer", None) or {})

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """The base model without the adapter, at the base's own context, for as long as the block lasts."""
        if self.info is None or self.info.kind != "lora":
            raise ValueError("only a recogniser with an adapter has a base inside it")
        tuned = self.context, self.info
        self.context = self.base_context or AudioContext("full", 0.0, self.context.window_positions)
        self.info = None
        try:
            with self.whisper.model.disable_adapter():
                yield
        finally:
            self.context, self.info = tuned


def load_recognizer(
    model_path: str,
    *,
    base_model: str | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    audio_context: Literal["auto", "full"] | float | None = None,
    cache_dir: Path | None = None,
) -> TorchRecognizer:
    """An adapter folder, a run folder, a fine-tuned model folder, or any Whisper checkpoint by folder or hub name.

    An adapter is put on the base named in it (or on `base_model`) and refused when the weights differ. The audio context
    is the one it was trained with, unless another is given.
    """
    from resonance.model.precision import inference_dtype

    where = choose_device(device)
    dtype = inference_dtype(where)
    folder = adapters.find(Path(folder_of(model_path)).expanduser())
    if folder is None:
        if (Path(model_path) / "events.jsonl").is_file():
            raise ModelError(
                _(
                    "{path} is a run folder without a result: its training has not finished. Continue it with --resume."
                ).format(path=model_path)
            )
        whisper = load_whisper(model_path, device=where, dtype=dtype, cache_dir=cache_dir)
        return TorchRecognizer(whisper, clip_lengths.choose_context(None, audio_context, whisper.window_positions))
    info = adapters.read_info(folder)
    # Refused, where it leaves no room for speech, before gigabytes are read.
    clip_lengths.choose_context(info, audio_context, WINDOW_POSITIONS)
    if info.kind == "full":
        whisper = load_whisper(str(folder), device=where, dtype=dtype, cache_dir=cache_dir)
        return TorchRecognizer(
            whisper, clip_lengths.choose_context(info, audio_context, whisper.window_positions), info
        )
    adapters.check_complete(folder)
    base_name = base_model or info.base_model
    assert base_name is not None  # an adapter has one
    try:
        whisper = load_whisper(base_name, device=where, dtype=dtype, cache_dir=cache_dir)
    except ModelError as error:
        raise ModelError(
            _(
                "The adapter {folder} needs its base model {base}:\n{reason}\nGive the base's place with --base_model."
            ).format(folder=folder, base=base_name, reason=error)
        ) from error
    adapters.check_base(info, folder, base_name, whisper.fingerprint)
    tuned = Whisper(
        str(folder), attach(whisper.model, folder), whisper.tokenizer, whisper.feature_extractor, whisper.fingerprint
    )
    own = adapters.own_info(base_name)
    base_context = AudioContext(own.audio_context, own.audio_margin, whisper.window_positions) if own else None
    return TorchRecognizer(
        tuned, clip_lengths.choose_context(info, audio_context, whisper.window_positions), info, base_context
    )


def attach(model: Any, folder: Path) -> Any:
    """`model` with the LoRA adapter of `folder`, in eval mode. Raises AdapterError when the files are damaged."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    from resonance.errors import AdapterError

    try:
        with quiet_peft():
            tuned = PeftModel.from_pretrained(model, str(folder)).eval()
            wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
            strays = wanted ^ set(weights.keys())
    except Exception as error:  # PEFT and safetensors raise many kinds for a damaged file
        raise AdapterError(
            _("The adapter {folder} cannot be read: {reason}. Copy the folder again.").format(
                folder=folder, reason=error
            )
        ) from error
    # PEFT only warns, and what has no weights would answer as the base model in the adapter's name.
    if strays:
        raise AdapterError(
            _(
                "The adapter {folder} does not fit together: {count} of its weights are missing or belong to no layer of the "
                "model (such as {name}). Copy the folder again."
            ).format(folder=folder, count=len(strays), name=min(strays))
        )
    return tuned
