"""A model for CTranslate2, which faster-whisper and our own ct2 engine run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from resonance.errors import MissingExtraError
from resonance.export.hf import DTYPES, prepare_generation, write_side_files
from resonance.messages import _
from resonance.model.load import Whisper
from resonance.transcribe.word_times import alignment_heads


def need_ctranslate2() -> None:
    """Raise MissingExtraError where CTranslate2 is not installed."""
    if importlib.util.find_spec("ctranslate2") is None:
        raise MissingExtraError(_('CTranslate2 is not installed: pip install "resonance-asr[ct2]"'))


def has_faster_whisper(folder: Path) -> bool:
    """Whether faster-whisper is here and takes the model: it knows the special tokens of OpenAI's vocabularies only."""
    if importlib.util.find_spec("faster_whisper") is None:
        return False
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    tokens = len(json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")))
    return tokens in (51_864, 51_865, 51_866) and ("lang_to_id" in generation or tokens == 51_864)


def write_ctranslate2(folder: Path, whisper: Whisper, quantization: str) -> None:
    """`model.bin`, `config.json` with languages, suppressed tokens and alignment heads, the vocabulary and side files.

    CTranslate2's converter wants a folder with the model; this one takes it from memory. The model is of no use afterwards:
    what is rounded is rounded in place (4.8).
    """
    from ctranslate2.converters.converter import Converter
    from ctranslate2.converters.transformers import WhisperLoader

    class Loaded(Converter):  # type: ignore[misc]
        def _load(self) -> Any:
            with torch.no_grad():
                return WhisperLoader()(whisper.model, whisper.tokenizer)

    if quantization in DTYPES:
        whisper.model.to(DTYPES[quantization])  # in place: CTranslate2 would make a second model of it
    # Those of a model whose decoder was made shorter may name layers that are not there any more.
    whisper.model.generation_config.alignment_heads = [list(head) for head in alignment_heads(whisper.model)]
    Loaded().convert(str(folder), quantization=quantization, force=True)
    prepare_generation(whisper.model)
    whisper.model.generation_config.save_pretrained(str(folder))  # our engine reads language ids there
    config = (folder / "config.json").read_bytes()
    write_side_files(folder, whisper)
    assert (folder / "config.json").read_bytes() == config  # CTranslate2's, not transformers'
