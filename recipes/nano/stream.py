"""Training batches made on the fly, endless and seeded: nothing is stored."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from recipes.nano import phrases, speech

from resonance.data.batches import AudioContext, Clip, Collator
from resonance.data.manifest import Segment, Utterance
from resonance.data.tokens import IGNORED_LABEL, LabelTokenizer, TokenPair
from resonance.units import SAMPLE_RATE, WINDOW_SECONDS

POOL = 120  # clips that are sorted by length before they are cut into batches
NOTHING_SAID, TWO_PHRASES, TIMED, LONG_CONTEXT = 0.03, 0.1, 0.2, 0.05  # shares of clips, and of batches
LONG_BATCH_SECONDS = 120.0  # the sum of the contexts in a batch of clips in long contexts


class Batches:
    """Batches of about `batch_seconds` of context in all.

    `progress` is a shared tensor [1] that the training sets from 0 to 1: the first clips are short, single phrases;
    long contexts come when short ones are understood.
    """

    def __init__(self, tokenizer: LabelTokenizer, progress: torch.Tensor, batch_seconds: float) -> None:
        self.tokenizer = tokenizer
        self.progress = progress
        self.batch_seconds = batch_seconds

    def made_by(self, workers: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Endless, from so many processes.

        eSpeak NG crashes about once in ten thousand phrases; another process with another seed then takes over.
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
            clips = sorted((self.clip(random, progress) for _ in range(POOL)), key=lambda clip: len(clip.audio))
            batches = list(self.cut(clips, random, progress))
            for index in random.permutation(len(batches)):
                yield batches[index]

    def cut(self, clips: list[Clip], random: np.random.Generator, progress: float) -> Iterator[dict[str, torch.Tensor]]:
        while clips:
            margin = float(random.uniform(0.2, 1.5))
            context, budget = AudioContext("auto", margin), self.batch_seconds
            if progress > 0.35 and random.random() < LONG_CONTEXT:
                full = random.random() < 0.5
                seconds = WINDOW_SECONDS if full else float(random.uniform(8, 25))
                context, budget = AudioContext("full" if full else seconds, 0.0), LONG_BATCH_SECONDS
            count = 1
            while count < len(clips) and (count + 1) * _seconds(clips[count], context) <= budget:
                count += 1
            taken, clips = clips[:count], clips[count:]
            yield Collator(context, 80, self.tokenizer.special("<|endoftext|>"))(taken)

    def clip(self, random: np.random.Generator, progress: float) -> Clip:
        language = "en" if random.random() < 0.5 else "zh"
        if random.random() < NOTHING_SAID:
            audio = speech.nothing_said(float(random.uniform(0.4, 5)), random)
            return Clip(audio, self.tokenizer.encode(Utterance("", "", 0, language=language)), None, 0)
        voice = speech.draw_voice(random)
        count = 2 if progress > 0.2 and random.random() < TWO_PHRASES else 1
        texts = [phrases.draw(language, random, most=4 if progress < 0.08 else None) for _ in range(count)]
        audio, times = speech.record(
            [speech.say(text, language, voice) for text in texts],
            random,
            clean=random.random() < (0.6 if progress < 0.1 else 0.15),
        )
        segments = tuple(Segment(*time, text) for time, text in zip(times, texts, strict=True))
        whole = (" " if language == "en" else "").join(texts)
        timed = progress > 0.2 and random.random() < TIMED
        tokens = self.tokenizer.encode(Utterance("", whole, 0, language=language, segments=segments), timestamps=timed)
        return Clip(audio, with_language(tokens), None, 0)


def _fill(batches: Batches, ready: Any, seed: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    for batch in batches.endless(seed):
        ready.put({name: tensor.numpy() for name, tensor in batch.items()})


def with_language(tokens: TokenPair) -> TokenPair:
    """The product gives the language to the decoder; this model has to learn to name it first, for when none is given."""
    assert tokens.labels[0] == IGNORED_LABEL
    return TokenPair(tokens.decoder_input_ids, [tokens.decoder_input_ids[1], *tokens.labels[1:]])


def _seconds(clip: Clip, context: AudioContext) -> float:
    return context.positions(len(clip.audio) / SAMPLE_RATE) / 50
