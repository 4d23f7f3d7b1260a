"""Measure a checkpoint of this recipe and write its model card: python recipes/nano/card.py FOLDER"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from recipes.nano import phrases, score, speech  # noqa: E402

from resonance.data.audio_context import AudioContext  # noqa: E402
from resonance.data.batches import batch_features  # noqa: E402
from resonance.data.tokens import LabelTokenizer  # noqa: E402
from resonance.model.load import load_whisper  # noqa: E402
from resonance.transcribe.torch_engine import detect_languages  # noqa: E402

CLIPS = 100
AUTO, FULL = AudioContext("auto", 0.6), AudioContext("full", 0.0)
CONDITIONS: tuple[score.Condition, ...] = ("clean", "room and noise", "noise at 10 dB")
NAMES = {"en": "English", "zh": "Mandarin"}

CARD = """---
license: mit
language: [en, zh]
pipeline_tag: automatic-speech-recognition
---

# resonance/nano

A Whisper checkpoint of {parameters:.1f} million parameters ({megabytes:.1f} MB, float16), trained from nothing on synthetic speech for
Resonance. It exists so that training, evaluation and transcription can be tried,
shown and tested without a network.

**Not for real use.** It has never heard a person. It knows daily phrases made of {words} English words and {characters} Chinese
characters, said by a speech synthesiser, and writes whatever it hears as such words. For your own recordings start from
`openai/whisper-small`.

## What it is

`WhisperForConditionalGeneration`: {encoder_layers} encoder and {decoder_layers} decoder layers, {width} wide, 80 mel bins, a window of 30 s that may be cut
to the length of the audio (`--audio_context auto`). Byte-level BPE with {tokens} tokens; Whisper's special tokens for English,
Mandarin, transcribing and times. It answers silence and noise with no text.

## What it was trained on

Speech of eSpeak NG ({voices} voice variants, 8 accents of English, Mandarin; rate, pitch, range and size of the voice at random)
over phrases of a grammar, with made-up rooms, noise of 5-40 dB, levels and bands, about {clips_trained} clips ({minutes} minutes on two processor cores). Phrases are in lower case, without punctuation. No recording
of a person and no other model was used. The recipe is `recipes/nano/`. eSpeak NG (GPL 3) is a tool of the recipe; no part of it is
in the weights' files.

## Scores

Phrases and voice variants that were kept out of training, {count} clips each; greedy, the language given. CER: characters wrong,
spaces left out. Exact: phrases entirely right.

| language | condition | context | CER | exact |
|---|---|---|---|---|
{rows}

Silence and noise: no text in {silent} of {silences} clips. Language found without being told: {found} of {looked_at} clips.

## Limits

Synthetic voices only; words outside the grammar come out as words inside it; it learnt
from one phrase at a time, rarely two, and from nothing longer than about 12 s. Scores on synthetic speech say nothing about people.

## Licence

MIT, as all of Resonance.
"""


def measure(folder: Path) -> dict[str, Any]:
    whisper = load_whisper(str(folder), device=torch.device("cpu"))
    labels = LabelTokenizer(whisper.tokenizer, True, None)
    rows, right, looked_at = [], 0, 0
    for language in ("en", "zh"):
        for condition in CONDITIONS:
            clips = list(score.held_out(language, condition, CLIPS))
            for name, context in (("auto", AUTO), ("full", FULL)):
                if name == "full" and condition != "room and noise":
                    continue
                found = score.score(whisper.model.eval(), labels, clips, context)
                rows.append(
                    f"| {NAMES[language]} | {condition} | {name} | {100 * found.cer:.1f} % ({found.errors}/{found.characters}) "
                    f"| {100 * found.exact / found.clips:.0f} % ({found.exact}/{found.clips}) |"
                )
                print(rows[-1], flush=True)
        whisper.model.eval()
        for clip in score.held_out(language, "room and noise", CLIPS)[:100]:
            with torch.inference_mode():
                hidden = whisper.model.model.encoder(batch_features([clip.audio], AUTO, 80)).last_hidden_state
                right += detect_languages(whisper, hidden) == [language]
            looked_at += 1
    random = np.random.default_rng(11)
    nothing = [
        score.Spoken("en" if i % 2 else "zh", "", speech.nothing_said(float(random.uniform(0.4, 5)), random))
        for i in range(100)
    ]
    silent = score.score(whisper.model, labels, nothing, AUTO).exact
    config = whisper.model.config
    words, characters = phrases.vocabulary()
    return {
        "parameters": sum(p.numel() for p in whisper.model.parameters()) / 1e6,
        "megabytes": (folder / "model.safetensors").stat().st_size / 1e6,
        "words": len(words),
        "characters": len(characters),
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "width": config.d_model,
        "tokens": f"{config.vocab_size:,}",
        "voices": len(speech.TRAINED),
        "count": CLIPS,
        "rows": "\n".join(rows),
        "silent": silent,
        "silences": len(nothing),
        "found": right,
        "looked_at": looked_at,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument(
        "--clips", default="many", help="how many clips it was trained on, as the log of the training says"
    )
    parser.add_argument("--minutes", default="many", help="how long that took")
    given = parser.parse_args()
    text = CARD.format(**measure(given.folder), clips_trained=given.clips, minutes=given.minutes)
    (given.folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
