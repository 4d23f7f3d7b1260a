"""Constants of Whisper's front end, each with its unit. Numbers are derived from numbers.

Source: openai/whisper `audio.py` and the `WhisperFeatureExtractor` of transformers.
"""

from __future__ import annotations

SAMPLE_RATE = 16_000  # samples per second
N_FFT = 400  # samples in one analysis window (25 ms)
HOP_LENGTH = 160  # samples between frames (10 ms)
FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH  # 100 log-mel frames
FRAMES_PER_POSITION = 2  # the encoder's second convolution has stride 2
POSITIONS_PER_SECOND = FRAMES_PER_SECOND // FRAMES_PER_POSITION  # 50 encoder positions
SAMPLES_PER_POSITION = HOP_LENGTH * FRAMES_PER_POSITION  # 320
WINDOW_SECONDS = 30.0  # what Whisper was trained to read at once
WINDOW_FRAMES = int(WINDOW_SECONDS * FRAMES_PER_SECOND)  # 3000
WINDOW_POSITIONS = int(WINDOW_SECONDS * POSITIONS_PER_SECOND)  # 1500
MAX_LABEL_TOKENS = 448  # decoder positions (`max_target_positions`), prompt and special tokens included
# Audio whose encoder outputs for 30 s are held in memory before training: 150 MB for large-v3 with its features. More than
# the 600 s of the speaker in docs/results.md was not tried.
ALIGNED_SECONDS = 1000.0
TIMESTAMP_STEP_SECONDS = 0.02  # one timestamp token per encoder position

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30
