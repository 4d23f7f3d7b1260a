"""Resonance (共鸣) fine-tunes OpenAI Whisper on a person's or a team's own recordings and puts the result to work."""

import logging

# transformers and PEFT import bitsandbytes, which on processors with AVX512-BF16 recommends a package that fetches code
# from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
