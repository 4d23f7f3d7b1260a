"""What the model understands of phrases and voices that were kept out of its training."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jiwer
import numpy as np
import torch
from recipes.nano import phrases, speech

from resonance.data.audio_context import AudioContext
from resonance.data.batches import batch_features
from resonance.data.tokens import LabelTokenizer
from resonance.transcribe.torch_engine import decode

Condition = Literal["clean", "room and noise", "noise at 10 dB"]


@dataclass(frozen=True, slots=True)
class Spoken:
    language: str
    text: str
    audio: np.ndarray  # float32 [samples] at 16 kHz


@functools.cache
def held_out(language: Literal["en", "zh"], condition: Condition, count: int) -> tuple[Spoken, ...]:
    """`count` held-out phrases, each by a held-out voice. Always the same."""
    random = np.random.default_rng((7, len(language + condition), language == "en"))
    clips = []
    for _ in range(count):
        text = phrases.draw(language, random, "held out")
        voice = speech.draw_voice(random, speech.HELD_OUT)
        said = speech.say(text, language, voice)
        audio = speech.record([said], random, clean=condition != "room and noise").audio
        if condition == "noise at 10 dB":
            audio = speech.add_noise(audio, 10, float(np.mean(audio**2)), random)
        clips.append(Spoken(language, text, audio))
    return tuple(clips)


@dataclass(frozen=True, slots=True)
class Score:
    exact: int
    clips: int
    errors: int
    characters: int

    @property
    def cer(self) -> float:
        return self.errors / max(self.characters, 1)


def transcribe(
    model: Any, tokenizer: LabelTokenizer, clips: list[Spoken], context: AudioContext, batch_size: int = 20
) -> list[str]:
    """The model's answer to each clip, in the order given."""
    order = sorted(range(len(clips)), key=lambda i: len(clips[i].audio))
    answers = [""] * len(clips)
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        features = batch_features([clips[i].audio for i in part], context, 80)
        ids = decode(model, features, [tokenizer.prompt(clips[i].language) for i in part])
        for i, row in zip(part, ids.tolist(), strict=True):
            answers[i] = tokenizer.tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def score(model: Any, tokenizer: LabelTokenizer, clips: list[Spoken], context: AudioContext) -> Score:
    """Character errors (spaces left out) and phrases that are exactly right."""
    model.eval()
    with torch.inference_mode():
        answers = transcribe(model, tokenizer, clips, context)
    model.train()
    exact = errors = characters = 0
    for clip, answer in zip(clips, answers, strict=True):
        wanted, found = clip.text.replace(" ", ""), answer.replace(" ", "")
        exact += clip.text == answer
        characters += len(wanted)
        if wanted:
            counts = jiwer.process_characters(wanted, found)
            errors += counts.substitutions + counts.deletions + counts.insertions
        else:
            errors += len(found)
    return Score(exact, len(clips), errors, characters)
