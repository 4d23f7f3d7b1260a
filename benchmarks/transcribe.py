"""Recordings transcribed in a second, beside transformers' ASR pipeline and faster-whisper: same weights, same recordings.

    python benchmarks/transcribe.py
    python benchmarks/transcribe.py --data labels.json

Weights are random, of whisper-tiny's shape, or `--model`'s. Every system writes the same number of tokens for each window
(random weights never end a text), greedily, without times, fallback or silence gates. Phrases of 1-5 s: Resonance at the
length of the recording, as it decodes for a model that was trained so; the others at their 30 s, and as their users call
them: one recording a call, the pipeline also in batches. A long recording: Resonance's windows against faster-whisper's batched
pipeline, both at 30 s, in batches of the same size, writing as many tokens in all. All take turns in `--rounds` rounds, on the same threads; the last line
compares the medians. Loading is not measured.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import machine
import made_up

SHORTEST, LONGEST = 1.0, 5.0  # seconds of a phrase
WINDOW_SECONDS = 30.0
MOST_TOKENS = 220  # of a window: half of what the decoder holds
KINDS = ("float32", "int8")  # weights of CTranslate2


DEMO = machine.REPOSITORY / "src" / "resonance" / "demo_speaker" / "labels.json"


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory() as folder:
        values = measure(given, Path(folder))
    settings = machine.settings(given)
    settings["long_data"] = "/".join(given.long_data.parts[-2:]) if given.long_data else settings["data"]
    machine.report({"settings": settings, **values}, given.out)
    phrases, long = values["phrases"], values["long"]
    print(f"{phrases['clips']} phrases of {phrases['mean_seconds']:.1f} s, {given.tokens} tokens each:")
    for name, found in phrases["systems"].items():
        print(f"  {name}: {found['clips_a_second']:.2f} a second")
    print(
        f"one recording of {long['seconds']:.0f} s, {given.window_tokens} tokens for each of our windows, batches of {given.batch}:"
    )
    for name, found in long["systems"].items():
        print(f"  {name}: {found['times_real_time']:.1f} times real time")
    print(f"one phrase from a warm recogniser: {values['one_phrase_ms']}")
    print(
        f"ratio {phrases['ratio_pipeline']:.2f} pipeline, {phrases['ratio_faster_whisper']:.2f} faster-whisper, ",
        end="",
    )
    print(f"{long['ratio_faster_whisper']:.2f} long")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Whisper checkpoint; left out, one of whisper-tiny's shape is made up")
    parser.add_argument("--data", type=Path, default=DEMO, help="recordings; left out, those of `resonance demo`")
    parser.add_argument("--clips", type=int, default=32, help="phrases at most")
    parser.add_argument("--tokens", type=int, default=12, help="tokens written for a phrase")
    parser.add_argument("--long_data", type=Path, help="recordings that make up the long one; left out, the phrases")
    parser.add_argument("--long_seconds", type=float, default=240.0, help="length of the long recording")
    parser.add_argument("--window_tokens", type=int, default=60, help="tokens that Resonance writes for a window of it")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    return parser.parse_args()


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    torch.set_num_threads(given.threads)
    model = Path(given.model) if given.model else made_up.write_model(folder / "model")
    checkpoint = endless(model, folder / "endless")
    clips = phrases(given)
    long = long_recording(given, folder, clips)
    engines = our_engines(checkpoint, folder)
    systems = {
        **{f"Resonance, {name}": ours(engine, clips, given) for name, engine in engines["auto"].items()},
        **pipelines(checkpoint, clips, given),
        **faster_whisper_calls(engines["folder"], clips, given),
    }
    one = [clips[len(clips) // 2]]
    return {
        "phrases": {
            "clips": len(clips),
            "mean_seconds": round(float(np.mean([len(clip) for clip in clips])) / made_up.SAMPLE_RATE, 3),
            **compared(in_turn(systems, given.rounds), len(clips)),
        },
        "long": {"seconds": given.long_seconds, **long_values(engines, long, given)},
        "one_phrase_ms": {
            "seconds": round(len(one[0]) / made_up.SAMPLE_RATE, 2),
            **{name: round(1000 * latency(ours(engine, one, given)), 1) for name, engine in engines["auto"].items()},
        },
    }


def endless(model: Path, folder: Path) -> Path:
    """The checkpoint, made to write on: so that every system writes as many tokens as it is asked for."""
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    whisper = WhisperForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    tokenizer = WhisperTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or "<|endoftext|>"  # the pipeline batches with nothing else
    config = whisper.generation_config
    config._from_model_config = False
    end = config.eos_token_id
    specials = list(range(end, whisper.config.vocab_size))  # a special token is not written in the middle of a text
    config.suppress_tokens = sorted({*(config.suppress_tokens or []), *specials})
    config.begin_suppress_tokens = None
    whisper.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor.from_pretrained(model).save_pretrained(folder)
    return folder


def phrases(given: argparse.Namespace) -> list[np.ndarray]:
    """Phrases of 1-5 s: recordings of `--data`, evenly over its length."""
    from resonance.data.audio import read_audio
    from resonance.data.check import probe_durations
    from resonance.data.formats import load_manifest

    rows = probe_durations(load_manifest(given.data).utterances)
    rows = [row for row in rows if SHORTEST <= (row.duration or 0.0) <= LONGEST]
    step = max(1, len(rows) // given.clips)
    return [read_audio(row.audio, row.start, row.end) for row in rows[::step][: given.clips]]


def long_recording(given: argparse.Namespace, folder: Path, clips: list[np.ndarray]) -> Path:
    """Recordings one after another with half a second between them, until it is long enough."""
    from resonance.data.audio import read_audio, write_wav
    from resonance.data.formats import load_manifest

    if given.long_data:
        clips = [read_audio(row.audio, row.start, row.end) for row in load_manifest(given.long_data).utterances]
    gap = np.zeros(made_up.SAMPLE_RATE // 2, np.float32)
    wanted = round(given.long_seconds * made_up.SAMPLE_RATE)
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < wanted:
        parts += [clips[len(parts) // 2 % len(clips)], gap]
    path = folder / "long.wav"
    write_wav(path, np.concatenate(parts)[:wanted])
    return path


def our_engines(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """PyTorch and CTranslate2 in 32 and 8 bits, at the length of the recording and at 30 s; and CTranslate2's folder."""
    from ctranslate2.converters import TransformersConverter

    from resonance.transcribe.ct2_engine import load_ct2_recognizer
    from resonance.transcribe.torch_engine import load_recognizer

    files = ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"]
    found: dict[str, Any] = {"folder": {kind: folder / f"ctranslate2-{kind}" for kind in KINDS}}
    for kind, converted in found["folder"].items():
        TransformersConverter(str(checkpoint), copy_files=files).convert(str(converted), quantization=kind)
    for context in ("auto", "full"):
        found[context] = {"PyTorch": load_recognizer(str(checkpoint), device="cpu", audio_context=context)}
        for kind, converted in found["folder"].items():
            engine = load_ct2_recognizer(str(converted), device="cpu", audio_context=context)
            found[context][f"CTranslate2 {kind}"] = engine
    return found


def ours(recognizer: Any, clips: list[np.ndarray], given: argparse.Namespace) -> Callable[[], None]:
    """All clips, in batches of like length."""
    from resonance.transcribe.recognizer import DecodeSettings

    settings = DecodeSettings(language="en", max_new_tokens=given.tokens)
    order = sorted(range(len(clips)), key=lambda i: len(clips[i]))

    def run() -> None:
        for first in range(0, len(order), given.batch):
            recognizer.transcribe([clips[i] for i in order[first : first + given.batch]], settings)

    return run


def pipelines(checkpoint: Path, clips: list[np.ndarray], given: argparse.Namespace) -> dict[str, Callable[[], None]]:
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    recognise = pipeline("automatic-speech-recognition", model=str(checkpoint), device="cpu")
    length = {"max_new_tokens": given.tokens, "min_new_tokens": given.tokens}
    options = {"language": "en", "task": "transcribe", "num_beams": 1, **length}

    def run(batch_size: int) -> None:
        given_clips = ({"raw": clip, "sampling_rate": made_up.SAMPLE_RATE} for clip in clips)
        assert len(list(recognise(given_clips, batch_size=batch_size, generate_kwargs=options))) == len(clips)

    return {
        "transformers pipeline, one by one": lambda: run(1),
        f"transformers pipeline, batches of {given.batch}": lambda: run(given.batch),
    }


def faster_whisper_options(tokens: int, prompt: int) -> dict[str, Any]:
    return {
        "language": "en",
        "beam_size": 1,
        "temperature": 0.0,
        "without_timestamps": True,
        "compression_ratio_threshold": None,
        "log_prob_threshold": None,
        "no_speech_threshold": None,
        # Its limit counts the prompt too, of which CTranslate2 then writes half (4.8).
        "max_new_tokens": 2 * tokens - prompt,
    }


def counted_prompt(model: Any, clip: np.ndarray, tokens: int) -> int:
    """Tokens of the prompt as faster-whisper has it: 4 with OpenAI's vocabulary."""
    for prompt in range(5):
        segments, _info = model.transcribe(clip, **faster_whisper_options(tokens, prompt))
        if sum(len(segment.tokens) for segment in segments) == tokens:
            return prompt
    raise AssertionError(f"faster-whisper cannot be made to write {tokens} tokens")


def faster_whisper_calls(
    converted: dict[str, Path], clips: list[np.ndarray], given: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    from faster_whisper import WhisperModel

    def run(model: Any, prompt: int) -> None:
        for clip in clips:
            segments, _info = model.transcribe(
                clip, condition_on_previous_text=False, **faster_whisper_options(given.tokens, prompt)
            )
            written = sum(len(segment.tokens) for segment in segments)
            assert written == given.tokens, f"faster-whisper wrote {written} tokens, not {given.tokens}"

    found = {}
    for kind, place in converted.items():
        model = WhisperModel(str(place), device="cpu", cpu_threads=given.threads)
        prompt = counted_prompt(model, clips[0], given.tokens)
        found[f"faster-whisper {kind}"] = lambda model=model, prompt=prompt: run(model, prompt)
    return found


def long_values(engines: dict[str, Any], recording: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The long recording, at 30 s a window. faster-whisper leaves out what its detector finds silent and packs the rest into
    fewer windows: it is given more tokens for each, so that both write the same number in all.
    """
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    from resonance.data.audio import iter_blocks
    from resonance.transcribe.files import Span, transcribe_files
    from resonance.transcribe.longform import windows
    from resonance.transcribe.recognizer import DecodeSettings

    settings = DecodeSettings(language="en", max_new_tokens=given.window_tokens)
    count = sum(1 for _window in windows(iter_blocks(recording), WINDOW_SECONDS))

    def our(recognizer: Any) -> Callable[[], None]:
        def run() -> None:
            (result,) = transcribe_files(recognizer, [Span(recording)], settings, batch_size=given.batch)
            assert result.error is None and result.text

        return run

    prompt = 0

    def segments_of(pipeline: Any, tokens: int) -> list[Any]:
        segments, _info = pipeline.transcribe(
            str(recording), batch_size=given.batch, **faster_whisper_options(tokens, prompt)
        )
        return list(segments)

    def theirs(pipeline: Any, tokens: int) -> Callable[[], None]:
        def run() -> None:
            assert sum(len(segment.tokens) for segment in segments_of(pipeline, tokens)) >= count * given.window_tokens

        return run

    systems = {}
    their_windows, tokens = 0, 0
    for kind, place in engines["folder"].items():
        model = WhisperModel(str(place), device="cpu", cpu_threads=given.threads)
        prompt = counted_prompt(model, made_up_noise(), given.window_tokens)
        pipeline = BatchedInferencePipeline(model)
        their_windows = their_windows or len(segments_of(pipeline, given.window_tokens))
        tokens = -(-count * given.window_tokens // their_windows)
        assert tokens <= MOST_TOKENS, f"{tokens} tokens a window: give fewer --window_tokens"
        systems[f"faster-whisper {kind}, batched"] = theirs(pipeline, tokens)
        systems[f"Resonance, CTranslate2 {kind}"] = our(engines["full"][f"CTranslate2 {kind}"])
    systems["Resonance, PyTorch"] = our(engines["full"]["PyTorch"])
    seconds = in_turn(systems, given.rounds)
    found = {
        name: {
            "seconds": [round(one, 3) for one in some],
            "times_real_time": round(given.long_seconds / statistics.median(some), 2),
        }
        for name, some in seconds.items()
    }
    ratios = {
        kind: round(
            found[f"Resonance, CTranslate2 {kind}"]["times_real_time"]
            / found[f"faster-whisper {kind}, batched"]["times_real_time"],
            3,
        )
        for kind in KINDS
    }
    return {
        "windows": {"Resonance": count, "faster-whisper": their_windows},
        "tokens_a_window": {"Resonance": given.window_tokens, "faster-whisper": tokens},
        "systems": found,
        "ratio_faster_whisper_by_weights": ratios,
        "ratio_faster_whisper": min(ratios.values()),
    }


def made_up_noise() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, made_up.SAMPLE_RATE).astype(np.float32)


def in_turn(systems: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, after one that is not counted. Each round begins with another system."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    names = list(systems)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            systems[name]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compared(seconds: dict[str, list[float]], clips: int) -> dict[str, Any]:
    """Phrases a second, and the ratios with 32-bit weights on both sides, or 8-bit ones."""
    found = {
        name: {
            "seconds": [round(one, 3) for one in some],
            "clips_a_second": round(clips / statistics.median(some), 3),
        }
        for name, some in seconds.items()
    }
    speed = {name: value["clips_a_second"] for name, value in found.items()}
    by_kind = {
        kind: round(speed[f"Resonance, CTranslate2 {kind}"] / speed[f"faster-whisper {kind}"], 3) for kind in KINDS
    }
    pipelines_speed = {name: value for name, value in speed.items() if name.startswith("transformers")}
    return {
        "systems": found,
        "ratio_pipeline_torch": {
            name: round(speed["Resonance, PyTorch"] / value, 3) for name, value in pipelines_speed.items()
        },
        "ratio_faster_whisper_by_weights": by_kind,
        # Against the faster of the pipeline's two ways, with weights of 32 bits; against faster-whisper the lower of the two.
        "ratio_pipeline": round(
            max(speed["Resonance, PyTorch"], speed["Resonance, CTranslate2 float32"]) / max(pipelines_speed.values()), 3
        ),
        "ratio_faster_whisper": min(by_kind.values()),
    }


def latency(call: Callable[[], None], calls: int = 11) -> float:
    """Seconds of the median call."""
    found = []
    for _call in range(calls):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


if __name__ == "__main__":
    main()
