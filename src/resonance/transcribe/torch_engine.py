"""The PyTorch engine: live LoRA adapters, at the audio context they were trained with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessorList, WhisperTimeStampLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from resonance.data.audio_context import AudioContext
from resonance.data.batches import batch_features
from resonance.data.tokens import LabelTokenizer
from resonance.errors import ConfigError, ModelError
from resonance.messages import _
from resonance.model import adapters
from resonance.model.builtin import folder_of
from resonance.model.load import Whisper, choose_device, load_whisper
from resonance.model.lora import quiet_peft
from resonance.transcribe.recognizer import DecodeSettings, TimedText, Transcript
from resonance.units import SAMPLE_RATE, TIMESTAMP_STEP_SECONDS

# Fast Mandarin and fast English stay below 15 tokens a second. A repetition loop is cut off there, not at 448 tokens.
TOKENS_PER_SECOND = 20
TOKENS_AT_LEAST = 24


def unwrap(model: Any) -> Any:
    """The WhisperForConditionalGeneration inside a PeftModel, adapters in place; otherwise the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.inference_mode()
def decode(
    model: Any,
    input_features: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int = 1,
    timestamps: bool = False,
    max_length: int | None = None,
) -> torch.Tensor:
    """Token ids [batch, tokens] after each prompt, `<|endoftext|>` behind the shorter ones.

    input_features: [batch, n_mels, frames] at any audio context; prompts: equally long. One window a row, one call of
    the generic generation loop: Whisper's own long-form `generate` would pad every clip to 30 s again.
    """
    whisper = unwrap(model)
    features = input_features.to(whisper.device, whisper.model.encoder.conv1.weight.dtype)
    hidden = whisper.model.encoder(features).last_hidden_state
    return _generate(whisper, hidden, prompts, num_beams, timestamps, max_length)


def _generate(
    whisper: Any,
    hidden: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    num_beams: int,
    timestamps: bool,
    max_length: int | None,
) -> torch.Tensor:
    stock = whisper.generation_config
    prompt = torch.tensor(prompts, device=hidden.device)
    most = int(hidden.shape[1] * TIMESTAMP_STEP_SECONDS * TOKENS_PER_SECOND) + TOKENS_AT_LEAST
    settings = GenerationConfig(
        max_length=min(prompt.shape[1] + most, max_length or whisper.config.max_target_positions),
        num_beams=num_beams,
        do_sample=False,
        eos_token_id=stock.eos_token_id,
        pad_token_id=stock.eos_token_id,
        bos_token_id=stock.bos_token_id,
        decoder_start_token_id=stock.decoder_start_token_id,
        suppress_tokens=getattr(stock, "suppress_tokens", None),
        begin_suppress_tokens=getattr(stock, "begin_suppress_tokens", None),
    )
    processors = LogitsProcessorList()
    if timestamps:
        rules = GenerationConfig(
            no_timestamps_token_id=stock.no_timestamps_token_id,
            eos_token_id=stock.eos_token_id,
            bos_token_id=stock.bos_token_id,
            max_initial_timestamp_index=getattr(stock, "max_initial_timestamp_index", None),
        )
        processors.append(WhisperTimeStampLogitsProcessor(rules, begin_index=prompt.shape[1]))
    sequences: torch.Tensor = GenerationMixin.generate(
        whisper,
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        decoder_input_ids=prompt,
        attention_mask=torch.ones(hidden.shape[:2], device=hidden.device),
        generation_config=settings,
        logits_processor=processors,
    )
    return sequences[:, prompt.shape[1] :]


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
        most = self.context.window_positions
        if isinstance(self.context.length, float):
            most = min(most, self.context.positions(0.0))
        seconds = most * TIMESTAMP_STEP_SECONDS
        return seconds if self.context.length == "full" else seconds - self.context.margin_seconds

    def transcribe(self, clips: Sequence[np.ndarray], settings: DecodeSettings) -> list[Transcript]:
        if not clips:
            return []
        features = batch_features(clips, self.context, self.whisper.n_mels)
        model = unwrap(self.whisper.model)
        with torch.inference_mode():
            features = features.to(model.device, model.model.encoder.conv1.weight.dtype)
            hidden = model.model.encoder(features).last_hidden_state
            languages = self._languages(hidden, settings)
            tokenizer = LabelTokenizer(
                self.whisper.tokenizer,
                self.whisper.multilingual,
                None,
                settings.task or (self.info.task if self.info else "transcribe"),
            )
            asked = settings.times != "none"
            prompts = [tokenizer.prompt(language, timestamps=asked) for language in languages]
            timed = asked and writes_timestamps(model, hidden, prompts, tokenizer.special("<|0.00|>"))
            if asked and not timed:
                prompts = [tokenizer.prompt(language) for language in languages]
            sequences = _generate(model, hidden, prompts, settings.num_beams, timed, None)
        return [
            self._transcript(ids.tolist(), language, len(clip) / SAMPLE_RATE, timed)
            for ids, language, clip in zip(sequences, languages, clips, strict=True)
        ]

    def _languages(self, hidden: torch.Tensor, settings: DecodeSettings) -> list[str | None]:
        language = settings.language or (self.info.language if self.info else None)
        if not self.whisper.multilingual:
            return [None] * len(hidden)
        if language:
            return [language] * len(hidden)
        return list(detect_languages(self.whisper, hidden))

    def _transcript(self, ids: list[int], language: str | None, seconds: float, timestamps: bool) -> Transcript:
        tokenizer = self.whisper.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        if not timestamps:
            return Transcript(text, language)
        first = tokenizer.convert_tokens_to_ids("<|0.00|>")
        return Transcript(text, language, tuple(read_segments(ids, tokenizer, first, seconds)))

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


def writes_timestamps(model: Any, hidden: torch.Tensor, prompts: Sequence[Sequence[int]], first: int) -> bool:
    """Whether the model, asked for times, would begin with one, for most rows of hidden [batch, positions, d_model].

    Trained on texts without times a model forgets them. Forced to write times it then writes noise between them.
    `first`: the id of `<|0.00|>`.
    """
    prompt = torch.tensor(prompts, device=hidden.device)
    logits = model(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), decoder_input_ids=prompt).logits[:, -1]
    share = logits.float().softmax(dim=-1)[:, first:].sum(dim=-1)  # [batch]
    return bool(share.median() > 0.1)


def detect_languages(whisper: Whisper, hidden: torch.Tensor) -> list[str]:
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
    logits = model(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), decoder_input_ids=start).logits[:, -1]
    return [tokens[i].strip("<|>") for i in logits[:, ids].argmax(dim=-1).tolist()]


def read_segments(ids: Sequence[int], tokenizer: Any, first_timestamp: int, seconds: float) -> Iterator[TimedText]:
    """Segments between timestamp tokens, clipped to the clip's own length."""
    start, words = 0.0, list[int]()

    def segment(end: float) -> Iterator[TimedText]:
        text = tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        if text:
            yield TimedText(min(start, seconds), min(max(start, end), seconds), text)

    for token in ids:
        if token < first_timestamp:
            words.append(token)
            continue
        time = (token - first_timestamp) * TIMESTAMP_STEP_SECONDS
        yield from segment(time)
        start, words = time, []
    yield from segment(seconds)


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
        return TorchRecognizer(whisper, AudioContext(audio_context or "full", 0.0, whisper.window_positions))
    info = adapters.read_info(folder)
    context = audio_context or info.audio_context
    if isinstance(context, float) and context <= info.audio_margin:
        raise ConfigError(
            [
                _(
                    "--audio_context {context:g}: the model was trained with {margin:g} seconds of silence behind the speech, "
                    "so nothing would be left for the speech. Give more, or leave --audio_context out."
                ).format(context=context, margin=info.audio_margin)
            ]
        )
    if info.kind == "full":
        whisper = load_whisper(str(folder), device=where, dtype=dtype, cache_dir=cache_dir)
        return TorchRecognizer(whisper, AudioContext(context, info.audio_margin, whisper.window_positions), info)
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
        tuned, AudioContext(context, info.audio_margin, whisper.window_positions), info, base_context
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
