"""What a list of phrases is worth to people with dysarthria: the same recordings without it, with it, with it alone.

    python benchmarks/phrases.py --model MODEL --data torgo/labels.json

The rows of `--data` with `"dysarthric": true`, speaker by speaker. A speaker's list is their own distinct phrases in that
file, so every recording is of a phrase on it. Then the recording's own phrase is taken off the list, and anything that is
answered with `only` is false. Rejecting is measured at several thresholds, leaning at several weights. The last line is
`gain X.XX`: the share of recordings understood exactly with `only` and no threshold, less that without the list, mean over the
speakers.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import machine
from resonance.data.audio import read_audio
from resonance.data.features import log_mel
from resonance.data.tokens import LabelTokenizer
from resonance.evaluate.metrics import compare, score, share
from resonance.transcribe import phrases
from resonance.transcribe.phrases import PhraseHelp, spoken
from resonance.transcribe.torch_engine import decode as decode_freely
from resonance.transcribe.torch_engine import load_recognizer
from resonance.units import HOP_LENGTH

BATCH = 16
# What the search drops for being far behind the phrase that is then taken off the list would not pass these.
WEIGHTS = (0.25, 0.5, 1.0, 2.0)
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
BEFORE, BEHIND, STEP = 1600, 3200, 3200  # samples of silence around a clip, and what its length is rounded up to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--language", default="en")
    parser.add_argument("--limit", type=int, help="so many recordings of each speaker")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    rows = [row for row in json.loads(given.data.read_text(encoding="utf-8")) if row.get("dysarthric")]
    recognizer = load_recognizer(given.model, audio_context="auto")
    speakers: dict[str, Any] = {}
    everyone: list[dict[str, Any]] = []
    for speaker in sorted({row["speaker"] for row in rows}):
        own = [row for row in rows if row["speaker"] == speaker]
        found = decode(recognizer, own, given.data.parent, given.language, given.limit)
        everyone += found["answers"]
        speakers[speaker] = {**found["facts"], **measure(found["answers"], given.language, recognizer.spellings())}
        show(speaker, speakers[speaker])
    together = measure(everyone, given.language, recognizer.spellings())
    show("all", together)
    exact = {way: np.mean([found[way]["exact"]["value"] for found in speakers.values()]) for way in ("free", "only")}
    gain = float(exact["only"] - exact["free"])
    result = {"settings": machine.settings(given), "speakers": speakers, "all": together, "gain": round(gain, 2)}
    machine.report(result, given.out)
    print(f"gain {gain:.2f}")


def decode(
    recognizer: Any, rows: list[dict[str, Any]], folder: Path, language: str, limit: int | None
) -> dict[str, Any]:
    """Every recording's reference and answers: free, leaning, only; and only, with its own phrase off the list."""
    listed: dict[str, str] = {}
    for row in rows:
        listed.setdefault(spoken(row["text"]), row["text"])
    help = PhraseHelp(tuple(listed.values()))
    only = replace(help, only=True, threshold=0.0)
    model, tokenizer = recognizer.whisper.model, LabelTokenizer(recognizer.whisper.tokenizer, True, language)
    prompt, trie = tokenizer.prompt(language), help.trie(tokenizer, language)
    clips = sorted(((padded(read_audio(folder / row["audio"])), row["text"]) for row in rows[:limit]), key=length)
    end = phrases.end_of_text(model)
    answers: list[dict[str, Any]] = []
    seconds = {"free": 0.0, "phrases": 0.0}
    while clips:
        batch = [clip for clip in clips[:BATCH] if length(clip) == length(clips[0])]
        clips = clips[len(batch) :]
        audio = torch.from_numpy(np.stack([clip for clip, _text in batch]))
        began = time.perf_counter()
        features = log_mel(audio, audio.shape[1] // HOP_LENGTH, recognizer.whisper.n_mels)
        texts = decode_freely(model, features, [prompt] * len(batch)).tolist()
        ids = [[token for token in text if token < end] for text in texts]
        with torch.inference_mode():
            hidden = model.model.encoder(features).last_hidden_state
        decoded = time.perf_counter()
        means = phrases.mean_log_probs(model, hidden, prompt, ids)
        near = phrases.search(model, hidden, prompt, trie)
        seconds["free"] += decoded - began
        seconds["phrases"] += time.perf_counter() - decoded
        for (_clip, text), tokens, mean, found in zip(batch, ids, means, near, strict=True):
            free = tokenizer.tokenizer.decode(tokens, clean_up_tokenization_spaces=False).strip()
            scores = {number: one.mean_log_prob for number, one in found.items()}
            written, true = help.by_key.get(spoken(free)), help.by_key[spoken(text)]
            without = {number: value for number, value in scores.items() if number != true}
            nearest = phrases.choose(scores, mean, written, only)
            off_list = None if written == true else written
            stray = phrases.choose(without, mean, off_list, only)
            leaning = {}
            for weight in WEIGHTS:
                light = replace(help, weight=weight)
                chosen = phrases.choose(scores, mean, written, light), phrases.choose(without, mean, off_list, light)
                leaning[weight] = [free if number is None else help.phrases[number] for number, _score in chosen]
            answers.append(
                {
                    "text": text,
                    "free": free,
                    "leaning": leaning[1.0][0],
                    "by_weight": leaning,
                    "only": "" if nearest[0] is None else help.phrases[nearest[0]],
                    "score": nearest[1],
                    "off_list_score": stray[1],
                }
            )
    facts = {"phrases": len(help.phrases), "seconds": {way: round(value, 1) for way, value in seconds.items()}}
    return {"answers": answers, "facts": facts}


def measure(answers: list[dict[str, Any]], language: str, spellings: dict[str, str]) -> dict[str, Any]:
    """Accuracy in each way, and what a threshold lets through."""
    ways = ("free", "leaning", "only")
    scores = {way: score([(a["text"], a[way]) for a in answers], language, spellings=spellings) for way in ways}
    right = [utterance.exact for utterance in scores["only"].utterances]
    found: dict[str, Any] = {"recordings": len(answers), "normalizer": scores["free"].normalizer}
    for way in ways:
        found[way] = {"exact": asdict(scores[way].exact_phrase_accuracy), "wer": asdict(scores[way].wer)}
    for way in ways[1:]:
        found[way]["exact_gain"] = asdict(compare(scores["free"], scores[way]).exact_phrase_accuracy)
    found["weights"] = []
    for weight in WEIGHTS:
        on, off = (
            score([(a["text"], a["by_weight"][weight][i]) for a in answers], language, spellings=spellings)
            for i in (0, 1)
        )
        exact = {"exact": asdict(on.exact_phrase_accuracy), "exact_off_list": asdict(off.exact_phrase_accuracy)}
        found["weights"].append({"weight": weight, **exact})
    found["rejection"] = [
        {
            "threshold": threshold,
            "right": asdict(
                share(sum(r and a["score"] >= threshold for r, a in zip(right, answers, strict=True)), len(answers))
            ),
            "wrong": asdict(
                share(sum(not r and a["score"] >= threshold for r, a in zip(right, answers, strict=True)), len(answers))
            ),
            "off_list_accepted": asdict(share(sum(a["off_list_score"] >= threshold for a in answers), len(answers))),
        }
        for threshold in THRESHOLDS
    ]
    return found


def show(name: str, found: dict[str, Any]) -> None:
    parts = [
        f"{way} {found[way]['exact']['value']:.3f} (WER {found[way]['wer']['value']:.2f})"
        for way in ("free", "leaning", "only")
    ]
    half = next(row for row in found["rejection"] if row["threshold"] == 0.5)
    print(f"{name:4} {found['recordings']:4} recordings, exact: " + ", ".join(parts), flush=True)
    kinds = ", ".join(f"{kind} {half[kind]['value']:.3f}" for kind in ("right", "wrong", "off_list_accepted"))
    print(f"     only, at 0.5: {kinds}")
    leaning = (
        f"{w['weight']:g} {w['exact']['value']:.3f} {w['exact_off_list']['value']:.3f}" for w in found["weights"]
    )
    print("     weight, exact, exact of what is off the list: " + "; ".join(leaning), flush=True)


def padded(clip: np.ndarray) -> np.ndarray:
    """At full level, with silence around it, as long as a multiple of STEP."""
    clip = clip * (0.9 / max(float(np.abs(clip).max()), 1e-5))
    samples = -(-(BEFORE + len(clip) + BEHIND) // STEP) * STEP
    return np.pad(clip, (BEFORE, samples - BEFORE - len(clip))).astype(np.float32)


def length(clip: tuple[np.ndarray, str]) -> int:
    return len(clip[0])


if __name__ == "__main__":
    main()
