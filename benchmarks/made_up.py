"""A model of whisper-tiny's shape and short clips, both made up: benchmarks need no download and no recordings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16_000
TEXT_TOKENS = 50_257  # size of Whisper's byte-pair vocabulary, before `<|endoftext|>`
LANGUAGES = 99


def write_model(folder: Path, *, small: bool = False) -> Path:
    """Write a random checkpoint of whisper-tiny's shape: 39 million weights and a vocabulary of 51,865 tokens, in
    Whisper's layout. Text becomes one token a byte; the tokens that byte pairs would take are there and never occur.

    small: two layers, 64 wide, and without those tokens: for what is about everything but the model.
    """
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.whisper.tokenization_whisper import LANGUAGES as NAMES

    pieces = list(bytes_to_unicode().values())
    if not small:
        pieces += [f"unused{i}" for i in range(TEXT_TOKENS - len(pieces))]
    width, layers = (64, 2) if small else (384, 4)
    specials = ["<|startoftranscript|>", *(f"<|{code}|>" for code in list(NAMES)[:LANGUAGES])]
    tasks = ["<|translate|>", "<|transcribe|>"]
    modes = ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    times = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    tokenizer = WhisperTokenizer(vocab={piece: i for i, piece in enumerate([*pieces, "<|endoftext|>"])}, merges=[])
    tokenizer.add_tokens([*specials, *tasks, *modes, *times], special_tokens=True)
    tokenizer.pad_token = "<|endoftext|>"

    def number(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))

    end = {name: number("<|endoftext|>") for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    start = number("<|startoftranscript|>")
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer),
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=width // 64,
            decoder_attention_heads=width // 64,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            decoder_start_token_id=start,
            **end,
        )
    )
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        no_timestamps_token_id=number("<|notimestamps|>"),
        max_length=448,
        is_multilingual=True,
        lang_to_id={token: number(token) for token in specials[1:]},
        task_to_id={token.strip("<|>"): number(token) for token in tasks},
        **end,
    )
    model.generation_config._from_model_config = False  # True would drop the language ids on reload
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def write_clips(folder: Path, count: int, seconds: float, seed: int) -> Path:
    """Write `count` WAV files of this many seconds and their labels.json, which is returned. A clip is a melody of four
    tones and noise; its text names the tones, so that there is something to learn.
    """
    random = np.random.default_rng(seed)
    names = np.array(list("cdefgabh"))
    (folder / "audio").mkdir(parents=True)
    length = round(seconds * SAMPLE_RATE)
    rows = []
    for i in range(count):
        melody = random.integers(len(names), size=4)
        pitch = np.repeat(220.0 * 2 ** (melody / 12), -(-length // 4))[:length]
        sound = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE) + 0.01 * random.standard_normal(length)
        soundfile.write(folder / "audio" / f"{i:05}.wav", sound, SAMPLE_RATE)
        rows.append({"audio": f"audio/{i:05}.wav", "text": " ".join(names[melody]), "language": "en"})
    labels = folder / "labels.json"
    labels.write_text(json.dumps(rows), encoding="utf-8")
    return labels
