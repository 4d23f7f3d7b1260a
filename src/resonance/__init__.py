"""Resonance (共鸣) fine-tunes OpenAI Whisper on a person's or a team's own recordings and puts the result to work."""

import logging
import os

# transformers and PEFT import bitsandbytes, which on processors with AVX512-BF16 recommends a package that fetches code
# from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Where this is set, torch asks for huge pages (see model/allocator.py). It looks once, when it first reserves memory, and that
# is while PEFT is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
