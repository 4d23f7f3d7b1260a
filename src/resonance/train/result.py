"""The folder that training leaves behind: weights, tokenizer, feature extractor, `resonance.json` and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from resonance.config import TrainConfig
from resonance.errors import RunFolderError
from resonance.evaluate.normalize import normalizer_for
from resonance.messages import _
from resonance.model.adapters import INFO_FILE, Info, now
from resonance.model.load import Whisper
from resonance.model.runs import write_failure
from resonance.train.rows import Rows, fingerprint
from resonance.train.trainer import WhisperTrainer


def save_result(folder: Path, whisper: Whisper, model: Any, info: Info, weights: dict[str, Any] | None = None) -> Path:
    """Write the result to `folder`, which appears complete or not at all. An older result is kept under another name.

    `weights`: of the model, where it does not hold them itself.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if info.kind == "lora":
            # False: PEFT would otherwise ask the model hub whether the vocabulary was changed.
            model.save_pretrained(str(temporary), save_embedding_layers=False, state_dict=weights)
        else:
            # True would make transformers drop the language ids and alignment heads on reload.
            model.generation_config._from_model_config = False
            model.save_pretrained(str(temporary), state_dict=weights)
        save_side_files(temporary, whisper)
        (temporary / "README.md").write_text(model_card(info), encoding="utf-8")
        (temporary / INFO_FILE).write_text(
            json.dumps(info.model_dump(mode="json"), indent=2, ensure_ascii=False), encoding="utf-8"
        )
        if folder.exists():
            number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.{n}").exists())
            folder.rename(folder.with_name(f"{folder.name}.{number}"))
        temporary.rename(folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = write_failure(error)
        if reason is None:
            raise
        raise RunFolderError(
            _(
                "The result could not be written to {folder}: {reason}. The checkpoints are kept: free some space and run "
                "the same command with --resume."
            ).format(folder=folder, reason=reason)
        ) from error
    return folder


def save_side_files(folder: Path, whisper: Whisper) -> None:
    """Tokenizer and feature extractor in all the files that converters ask for (transformers 5 leaves some out)."""
    whisper.tokenizer.save_pretrained(str(folder))
    whisper.tokenizer.save_vocabulary(str(folder))
    whisper.feature_extractor.save_pretrained(str(folder))


def versions() -> dict[str, str]:
    """Versions of what shaped the weights."""
    return {name: metadata.version(name) for name in ("resonance-asr", "torch", "transformers", "peft")}


def model_card(info: Info) -> str:
    """A README for whoever receives the folder."""
    scores: Mapping[str, Any] = info.scores
    rows = "".join(f"| {name} | {value:.4f} |\n" for name, value in scores.items() if isinstance(value, float))
    return f"""---
library_name: {"peft" if info.kind == "lora" else "transformers"}
base_model: {info.base_model}
tags: [whisper, resonance]
---
# {"LoRA adapter" if info.kind == "lora" else "Fine-tuned model"} for {info.base_model}

Trained with Resonance on {trained_on(info)}. Language: {info.language}.
Audio context: {info.audio_context}, margin {info.audio_margin} s.

    resonance transcribe --model_path . --audio_path recording.wav

Scores on {scores.get("utterances", 0)} held-out recordings, normaliser {info.normalizer}:

| score | value |
|---|---|
{rows}"""


def trained_on(info: Info) -> str:
    rows, hours = info.data["train_rows"], info.data["hours"]
    return "a stream of recordings" if hours is None else f"{rows} recordings ({hours:.2f} hours)"


def describe(config: TrainConfig, rows: Rows, whisper: Whisper, trainer: WhisperTrainer, language: str | None) -> Info:
    """What `resonance.json` says of the result."""
    durations = [row.duration or 0.0 for row in rows.train]
    return Info(
        kind="lora" if config.finetuning == "lora" else "full",
        base_model=config.model_name_or_path,
        base_fingerprint=whisper.fingerprint,
        language=language if whisper.multilingual else "en",
        task=config.task,
        audio_context=config.audio_context,
        audio_margin=config.audio_margin,
        normalizer=normalizer_for(language).name,
        scores=trainer.kept_scores(),
        data={
            "train_rows": rows.count,
            "eval_rows": len(rows.held_out),
            "hours": None if rows.hours is None else round(rows.hours, 4),
            "longest_clip_seconds": max(durations),
            "fingerprint": rows.stream.fingerprint if rows.stream else fingerprint(rows.train),
        },
        settings=config.model_dump(mode="json"),
        versions=versions(),
        created=now(),
    )
