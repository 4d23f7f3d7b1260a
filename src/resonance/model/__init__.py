"""Whisper checkpoints, their adapters, and the audio context they run at."""
