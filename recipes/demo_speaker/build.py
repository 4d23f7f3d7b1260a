"""Record the demo speaker: python recipes/demo_speaker/build.py [--out FOLDER]

Writes about 120 recordings of a simulated voice as a user's folder holds them: `audio/`, `labels.json` with all of them,
`train.json` with the 60 to train on and `test.json` with those that are held out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
from recipes.demo_speaker import manner  # noqa: E402
from recipes.nano import speech  # noqa: E402

from resonance.units import SAMPLE_RATE  # noqa: E402

SEED = 3
# Recorded up to three times, the last take of four in five of them for the test. The words of NEW are all in here, in other phrases.
TRAINED = (
    "我想喝水|请帮我打开窗户|我要上厕所|妈妈在哪里|我左腿疼|今天我很累|请关灯|给我眼镜|我想回家|请给我毛巾|打开电视|"
    "我很饿|叫护士|我要吃药|手机在哪里|我想吃苹果|爸爸什么时候回来|我右手麻|把被子给我|谢谢医生|我要坐轮椅|不要关门|"
    "i want to drink water|please call my sister|my left leg hurts|open the window please|turn off the light|"
    "i'm very tired|give me my glasses|where is my phone|i want to go home|close the door|my right hand is cold|"
    "the soup is too hot|i would like a cup of tea|call the doctor now|please turn on the radio|i'm hungry|help me get up|"
    "thank you anna"
)
# Recorded once, never trained.
NEW = (
    "请帮我关灯|我想吃药|爸爸在哪里|我右腿疼|今天我很饿|请给我苹果|叫医生|我要回家|妈妈什么时候回来|我左手麻|把毛巾给我|"
    "谢谢护士|不要关电视|眼镜在哪里|我想坐轮椅|请打开门|"
    "please call the doctor|turn off the radio|my right leg hurts|open the door please|close the window|where is my sister|"
    "the tea is too hot|i'm very cold|turn on the light|i want to go to the doctor|my left hand hurts|give me a cup of tea"
)
TRAINING = 60  # recordings


def plan() -> list[tuple[str, int, str]]:
    """Every recording: its text, its take (1, 2 …) and its set."""
    trained = TRAINED.split("|")
    again = [text for i, text in enumerate(trained) if i % 5]
    sets = {
        "train": [*trained, *trained[::2][: TRAINING - len(trained)]],
        "test: trained phrase": again,
        "test: new phrase": NEW.split("|"),
    }
    takes: dict[str, int] = {}
    rows = []
    for part, texts in sets.items():
        for text in texts:
            takes[text] = takes.get(text, 0) + 1
            rows.append((text, takes[text], part))
    return sorted(rows)


def build(folder: Path, bit_rate_level: float) -> None:
    audio_folder = folder / "audio"
    if audio_folder.exists():
        shutil.rmtree(audio_folder)
    audio_folder.mkdir(parents=True)
    random = np.random.default_rng(SEED)
    rows = []
    for text, take, part in plan():
        language = "en" if text.isascii() else "zh"
        spoken = manner.speak(text, language, random)
        audio = speech.record([spoken], random, clean=True).audio
        audio = speech.add_noise(audio, float(random.uniform(22, 32)), float(np.mean(audio**2)), random)
        audio = speech.set_level(audio, float(random.uniform(-30, -20)), random)
        name = f"{text.replace(' ', '_')}_{take}.opus"
        soundfile.write(
            audio_folder / name, audio, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=bit_rate_level
        )
        rows.append({"audio": f"audio/{name}", "text": text, "language": language, "speaker": "demo", "set": part})
    _write(folder / "labels.json", rows)
    _write(folder / "train.json", [row for row in rows if row["set"] == "train"])
    _write(folder / "test.json", [row for row in rows if row["set"] != "train"])
    size = sum(file.stat().st_size for file in audio_folder.iterdir())
    print(f"{len(rows)} recordings, {size / 1e6:.2f} MB, in {folder}")


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "resonance" / "demo_speaker")
    parser.add_argument("--compression", type=float, default=0.9, help="0 (large files) to 1 (small ones)")
    given = parser.parse_args()
    build(given.out, given.compression)


if __name__ == "__main__":
    main()
