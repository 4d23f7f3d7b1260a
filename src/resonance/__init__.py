"""Resonance (共鸣) fine-tunes OpenAI Whisper on a person's or a team's own recordings and puts the result to work."""

__version__ = "0.1.0"
