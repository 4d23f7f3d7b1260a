"""`python whisper_lora_inference.py …` as in older notes: `resonance transcribe`, which takes the same flags."""

from __future__ import annotations

import sys

from resonance.cli import run

if __name__ == "__main__":
    sys.exit(run(["transcribe", *sys.argv[1:]]))
