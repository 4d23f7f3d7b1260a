"""The PyTorch engine: live LoRA adapters, at the audio context they were trained with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from resonance.data.audio_context import AudioContext
from resonance.data.batches import batch_features
from resonance.data.tokens import LabelTokenizer
from resonance.errors import ModelError
from resonance.messages import _
from resonance.model import adapters
from resonance.model.builtin import folder_of
from resonance.model.load import Whisper, choose_device, load_whisper
from resonance.model.lora import quiet_peft
from resonance.transcribe import clip_lengths, phrases
from resonance.transcribe.decoding import Decoder, encode, generate, score, unwrap
from resonance.transcribe.fallback import Decoded, Judged, judge, with_fallback
from resonance.transcribe.phrases import PhraseChoice
from resonance.transcribe.recognizer import DecodeSettings, Transcript
from resonance.transcribe.segments import text_of, transcripts
from resonance.transcribe.word_times import token_starts
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
        model = unwrap(self.whisper.model)
        with torch.inference_mode():
            hidden = encode(model, features)
            languages = self._languages(hidden, settings)
            tokenizer = LabelTokenizer(
                self.whisper.tokenizer,
                self.whisper.multilingual,
                None,
                settings.task or (self.info.task if self.info else "transcribe"),
                self.whisper.max_label_tokens,
            )
            before = tokenizer.previous(settings.prompt)
            prompts = [[*before, *tokenizer.prompt(language)] for language in languages]
            first = tokenizer.find("<|0.00|>") if settings.times != "none" else None
            timed = (
                first is not None
                and not settings.phrases
                and getattr(model.generation_config, "no_timestamps_token_id", None) is not None
                and writes_timestamps(model, hidden, [prompt[:-1] for prompt in prompts], first)
            )
            asked = [prompt[:-1] for prompt in prompts] if timed else prompts
            found = self._decode(model, hidden, asked, settings, timed)
            chosen: list[PhraseChoice] = []
            if settings.phrases:
                written = [(judged.text, judged.decoded.ids) for judged in found]
                chosen = phrases.apply(model, hidden, languages, written, tokenizer, settings.phrases)
                found = with_phrases(model, hidden, prompts, found, chosen, settings)
            seconds = [len(clip) / SAMPLE_RATE for clip in clips]

            def starts(rows: Sequence[int], texts: Sequence[Sequence[int]]) -> list[list[float]]:
                index = torch.tensor(list(rows), device=hidden.device)
                lengths = [seconds[row] for row in rows]
                return token_starts(model, hidden[index], [prompts[row] for row in rows], texts, lengths)

            answers = transcripts(
                found, self.whisper.tokenizer, languages, seconds, settings.times, timed, first, starts
            )
        if chosen:
            return [
                replace(answer, phrase=choice.phrase, phrase_score=choice.score)
                for answer, choice in zip(answers, chosen, strict=True)
            ]
        return answers

    def _decode(
        self, model: Any, hidden: torch.Tensor, prompts: list[list[int]], settings: DecodeSettings, timed: bool
    ) -> list[Judged]:
        def attempt(rows: Sequence[int], temperature: float) -> list[Decoded]:
            some = hidden if len(rows) == len(hidden) else hidden[torch.tensor(list(rows), device=hidden.device)]
            return generate(
                model,
                some,
                [prompts[row] for row in rows],
                num_beams=settings.num_beams,
                timestamps=timed,
                temperature=temperature,
                max_new_tokens=settings.max_new_tokens,
                scores=settings.scores or settings.times != "none" or len(settings.temperatures) > 1,
            )

        return with_fallback(attempt, self._text, len(hidden), settings)

    def _text(self, decoded: Decoded) -> str:
        """Timestamps left out, which are not special tokens in OpenAI's tokenizers."""
        return text_of(self.whisper.tokenizer, decoded.ids)

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


def with_phrases(
    model: Any,
    hidden: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    found: Sequence[Judged],
    chosen: Sequence[PhraseChoice],
    settings: DecodeSettings,
) -> list[Judged]:
    """What was written freely, with the phrase that was chosen in its place, and the probability that the model gives that."""
    rows = [row for row, choice in enumerate(chosen) if choice.text != found[row].text]
    if not rows:
        return list(found)
    index = torch.tensor(rows, device=hidden.device)
    scored = score(model, hidden[index], [prompts[row] for row in rows], [chosen[row].ids for row in rows])
    answers = list(found)
    for row, decoded in zip(rows, scored, strict=True):
        answers[row] = judge(decoded, chosen[row].text, settings)
    return answers


def writes_timestamps(model: Any, hidden: torch.Tensor, prompts: Sequence[Sequence[int]], first: int) -> bool:
    """Whether the model, asked for times, would begin with one, for most rows of hidden [batch, positions, d_model].

    Trained on texts without times a model forgets them. Forced to write times it then writes noise between them.
    `first`: the id of `<|0.00|>`.
    """
    prompt = torch.tensor(prompts, device=hidden.device)
    decoder = Decoder(model, hidden, prompt.shape[1])
    share = decoder.logits(decoder(prompt)[:, -1]).softmax(dim=-1)[:, first:].sum(dim=-1)  # [batch]
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
    decoder = Decoder(model, hidden, 1)
    logits = decoder.logits(decoder(start)[:, -1])
    return [tokens[i].strip("<|>") for i in logits[:, ids].argmax(dim=-1).tolist()]


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
