"""A whole model for the programs of Hugging Face, and the side files that all formats share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from resonance.data.textfile import write_text_atomic
from resonance.model.load import Whisper, quiet_libraries

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write_hf(folder: Path, whisper: Whisper, quantization: str) -> None:
    """Weights as safetensors, configuration, generation settings and side files. The model is left in the new precision.

    Converted weight by weight: the model is never there twice.
    """
    model = whisper.model.to(DTYPES[quantization])
    prepare_generation(model)
    with quiet_libraries():
        model.save_pretrained(str(folder))
    write_side_files(folder, whisper)


def prepare_generation(model: Any) -> None:
    """Keep the language ids, alignment heads and suppressed tokens: marked as made from the model's configuration, as a model
    made from one is, they vanish when transformers loads the file."""
    model.generation_config._from_model_config = False


def write_side_files(folder: Path, whisper: Whisper) -> None:
    """Tokenizer and feature extractor in all the files that readers ask for.

    transformers 5 alone writes no preprocessor_config.json with a processor, and no vocab.json, merges.txt,
    added_tokens.json, special_tokens_map.json: CTranslate2, faster-whisper and whisper.cpp's converter ask for some of them.
    """
    tokenizer: Any = whisper.tokenizer
    tokenizer.save_pretrained(str(folder))
    tokenizer.save_vocabulary(str(folder))  # vocab.json, merges.txt, normalizer.json
    if not (folder / "normalizer.json").is_file():  # the spellings are not with every checkpoint
        write_json(folder / "normalizer.json", {})
    whisper.feature_extractor.save_pretrained(str(folder))
    added = tokenizer.get_added_vocab()
    write_json(folder / "added_tokens.json", dict(sorted(added.items(), key=lambda item: item[1])))
    special: dict[str, Any] = {
        name: str(getattr(tokenizer, name) or "<|endoftext|>")
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    others = set(tokenizer.all_special_tokens) - set(special.values())
    special["additional_special_tokens"] = sorted(others, key=tokenizer.convert_tokens_to_ids)
    write_json(folder / "special_tokens_map.json", special)


def write_json(path: Path, value: Any) -> None:
    write_text_atomic(path, [json.dumps(value, ensure_ascii=False, indent=1), "\n"])
