"""Training batches made on the fly, endless and seeded: nothing is stored."""

from __future__ import annotations

import dataclasses
import queue
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from recipes.nano import phrases, speech

from resonance.data.audio_context import AudioContext
from resonance.data.batches import Clip, Collator
from resonance.data.manifest import Segment, Utterance
from resonance.data.tokens import IGNORED_LABEL, LabelTokenizer, TokenPair
from resonance.units import FRAMES_PER_POSITION, POSITIONS_PER_SECOND, SAMPLE_RATE, SAMPLES_PER_POSITION, WINDOW_SECONDS

SOUNDS = 254  # eSpeak NG's names of sounds, about 130 here, are numbered by a hash; a fifth of them share a number
NOWHERE = -1.0  # the place of a label that is not said: an end, a time
POOL = 120  # clips that are sorted by length before they are cut into batches
NOTHING_SAID, TWO_PHRASES, TIMED, LONG_CONTEXT = 0.03, 0.07, 0.12, 0.05  # shares of clips, and of batches
LONG_BATCH_SECONDS = 90.0  # the sum of the contexts in a batch of clips in long contexts


class Lesson(NamedTuple):
    """A clip, which sound each of its encoder positions lies in, and about where each label is said."""

    clip: Clip
    sounds: torch.Tensor  # int64 [positions], below SOUNDS
    places: torch.Tensor  # float32 [tokens, 2], seconds


class Batches:
    """Batches of about `batch_seconds` of context in all. `tokenizer` decides whether the language is learnt.

    `progress` is a shared tensor [1] that the training sets from 0 to 1: the first clips are short, single phrases;
    long contexts come when short ones are understood.
    """

    def __init__(self, tokenizer: LabelTokenizer, progress: torch.Tensor, batch_seconds: float) -> None:
        self.tokenizer = tokenizer
        self.progress = progress
        self.batch_seconds = batch_seconds

    def made_by(self, workers: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Endless, from so many processes.

        eSpeak NG may crash on a phrase; another process with another seed then takes over.
        """
        context = multiprocessing.get_context("spawn")
        ready = context.Queue(maxsize=8)
        started = 0
        running: list[Any] = []
        while True:
            running = [process for process in running if process.is_alive()]
            while len(running) < workers:
                process = context.Process(target=_fill, args=(self, ready, (seed, started)), daemon=True)
                process.start()
                running.append(process)
                started += 1
            try:
                batch = ready.get(timeout=5)
            except queue.Empty:
                continue
            yield {name: torch.from_numpy(array) for name, array in batch.items()}

    def endless(self, seed: tuple[int, int]) -> Iterator[dict[str, torch.Tensor]]:
        random = np.random.default_rng(seed)
        while True:
            progress = float(self.progress[0])
            clips = sorted(
                (self.lesson(random, progress) for _ in range(POOL)), key=lambda lesson: len(lesson.clip.audio)
            )
            batches = list(self.cut(clips, random, progress))
            for index in random.permutation(len(batches)):
                yield batches[index]

    def cut(
        self, clips: list[Lesson], random: np.random.Generator, progress: float
    ) -> Iterator[dict[str, torch.Tensor]]:
        while clips:
            margin = 0.2 + 1.3 * float(random.random()) ** 2  # seconds; 0.6 on average, which is the product's
            context, budget = AudioContext("auto", margin), self.batch_seconds
            if progress > 0.55 and random.random() < LONG_CONTEXT:
                full = random.random() < 0.5
                seconds = WINDOW_SECONDS if full else float(random.uniform(8, 25))
                context, budget = AudioContext("full" if full else seconds, 0.0), LONG_BATCH_SECONDS
            count = 1
            while count < len(clips) and (count + 1) * _seconds(clips[count].clip, context) <= budget:
                count += 1
            taken, clips = clips[:count], clips[count:]
            batch = Collator(context, 80, self.tokenizer.special("<|endoftext|>"))([lesson.clip for lesson in taken])
            positions = batch["input_features"].shape[-1] // FRAMES_PER_POSITION
            batch["sounds"] = torch.full((count, positions), IGNORED_LABEL)
            batch["places"] = torch.full((*batch["labels"].shape, 2), NOWHERE)
            for row, lesson in enumerate(taken):
                batch["sounds"][row, : len(lesson.sounds)] = lesson.sounds[:positions]
                batch["places"][row, : len(lesson.places)] = lesson.places
            yield batch

    def lesson(self, random: np.random.Generator, progress: float) -> Lesson:
        language = "en" if random.random() < 0.5 else "zh"
        if random.random() < NOTHING_SAID:
            audio = speech.nothing_said(float(random.uniform(0.4, 5)), random)
            # Nobody spoke a language here, so none is learnt.
            tokens = dataclasses.replace(self.tokenizer, learns_language=False).encode(
                Utterance("", "", 0, language=language)
            )
            return Lesson(Clip(audio, tokens, None, 0), sound_of_positions((), len(audio)), self.places(tokens, (), ()))
        voice = speech.draw_voice(random)
        count = 2 if progress > 0.45 and random.random() < TWO_PHRASES else 1
        texts = [phrases.draw(language, random, most=3 if progress < 0.18 else None) for _ in range(count)]
        clean = random.random() < (0.6 if progress < 0.18 else 0.3)
        recording = speech.record([speech.say(text, language, voice) for text in texts], random, clean=clean)
        segments = tuple(Segment(*time, text) for time, text in zip(recording.phrases, texts, strict=True))
        whole = (" " if language == "en" else "").join(texts)
        timed = progress > 0.45 and random.random() < TIMED
        tokens = self.tokenizer.encode(Utterance("", whole, 0, language=language, segments=segments), timestamps=timed)
        return Lesson(
            Clip(recording.audio, tokens, None, 0),
            sound_of_positions(recording.sounds, len(recording.audio)),
            self.places(tokens, [self.tokenizer.text_ids(text, language) for text in texts], recording.phrases),
        )

    def places(
        self, tokens: TokenPair, texts: Sequence[list[int]], times: Sequence[tuple[float, float]]
    ) -> torch.Tensor:
        """About where each label is said: float32 [tokens, 2], first and last second, NOWHERE for what is not said.

        A token takes its letters' share of its phrase, a Chinese character as much as three letters.
        """
        places = torch.full((len(tokens.labels), 2), NOWHERE)
        end = self.tokenizer.special("<|endoftext|>")
        said = [i for i, label in enumerate(tokens.labels) if 0 <= label < end]
        if len(said) != sum(map(len, texts)):
            return places
        at = iter(said)
        for ids, (start, stop) in zip(texts, times, strict=True):
            letters = [
                max(1, len(token.encode()) // 2) for token in self.tokenizer.tokenizer.batch_decode([[i] for i in ids])
            ]
            ends = np.cumsum(letters) / sum(letters)
            for last, share in zip(ends, letters, strict=True):
                first = last - share / sum(letters)
                places[next(at)] = torch.tensor([start + first * (stop - start), start + last * (stop - start)])
        return places


def sound_of_positions(sounds: Sequence[tuple[float, str]], samples: int) -> torch.Tensor:
    """int64 [positions]: a number below SOUNDS for the sound at the middle of each position; 0 is silence."""
    ids = torch.zeros(samples // SAMPLES_PER_POSITION, dtype=torch.int64)
    for seconds, name in sounds:  # each until the next begins
        plain = name.strip("',")
        silent = plain[:1] in ("", "_", "(")
        ids[max(0, round(seconds * POSITIONS_PER_SECOND)) :] = (
            0 if silent else 1 + zlib.crc32(plain.encode()) % (SOUNDS - 1)
        )
    return ids


def _fill(batches: Batches, ready: Any, seed: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    for batch in batches.endless(seed):
        ready.put({name: tensor.numpy() for name, tensor in batch.items()})


def _seconds(clip: Clip, context: AudioContext) -> float:
    return context.positions(len(clip.audio) / SAMPLE_RATE) / POSITIONS_PER_SECOND
