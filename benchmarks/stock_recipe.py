"""The recipe that most projects fine-tune Whisper with, as Hugging Face's "Fine-Tune Whisper" tutorial has it.

Features are prepared before training, as `dataset.map(prepare_dataset)` does, padded to 30 s by WhisperProcessor. The
collator pads the labels, hides the padding from the loss, and drops a leading `bos_token` (which never matches: in Whisper
that is `<|endoftext|>`). Seq2SeqTrainer does the rest. Two things are set in its favour: prepared features lie in memory,
where the tutorial reads them from Arrow files, and gradient checkpointing, which costs it time, is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    set_seed,
)

from resonance.config import TrainConfig
from resonance.data.audio import read_audio
from resonance.data.formats import load_manifest
from resonance.data.manifest import Utterance

LABEL_TOKENS = 448


@dataclass
class PaddingCollator:
    """Batches prepared rows. `label_length` is 448, or None to pad to the longest label of the batch."""

    processor: Any
    label_length: int | None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        tokenizer = self.processor.tokenizer
        batch = self.processor.feature_extractor.pad(
            [{"input_features": row["input_features"]} for row in rows], return_tensors="pt"
        )
        padded = tokenizer.pad(
            [{"input_ids": row["labels"]} for row in rows],
            padding="max_length" if self.label_length else "longest",
            max_length=self.label_length,
            return_tensors="pt",
        )
        labels = padded["input_ids"].masked_fill(padded["attention_mask"].ne(1), -100)
        if (labels[:, 0] == tokenizer.bos_token_id).all():
            labels = labels[:, 1:]
        batch["labels"] = labels
        return batch


def prepare(row: Utterance, processor: Any) -> dict[str, Any]:
    audio = read_audio(row.audio, row.start, row.end)
    features = processor.feature_extractor(audio, sampling_rate=16_000).input_features[0]  # [n_mels, 3000]
    return {"input_features": features, "labels": processor.tokenizer(row.text).input_ids}


def map_all(rows: Sequence[Utterance], processor: Any) -> Any:
    """The features of all rows, as `dataset.map` computes them with its own settings and reads them back from Arrow files."""
    import datasets

    listed = datasets.Dataset.from_list([{"row": i} for i in range(len(rows))])
    return listed.map(lambda entry: prepare(rows[entry["row"]], processor), remove_columns=["row"])


def train(config: TrainConfig, label_length: int | None, *, mapped: bool = False) -> None:
    """Train with the optimiser, batch, steps, workers and precision of `config`. `mapped`: as the tutorial has it."""
    name = config.model_name_or_path
    processor = WhisperProcessor.from_pretrained(name, language=config.language, task=config.task)
    manifest = load_manifest(Path(str(config.train_file)))
    rows = (
        map_all(manifest.utterances, processor) if mapped else [prepare(row, processor) for row in manifest.utterances]
    )
    set_seed(config.seed)
    model: Any = WhisperForConditionalGeneration.from_pretrained(name)
    model.generation_config.language = config.language
    model.generation_config.task = config.task
    if config.finetuning == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(config.target_modules),
            bias="none",
        )
        model = get_peft_model(model, lora)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(config.output_dir),
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        max_steps=config.max_steps,
        optim=config.optim,
        fp16=config.precision == "fp16",
        bf16=config.precision == "bf16",
        use_cpu=bool(config.extra.get("use_cpu")),
        dataloader_num_workers=config.dataloader_num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=config.logging_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=PaddingCollator(processor, label_length),
        processing_class=processor.feature_extractor,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
