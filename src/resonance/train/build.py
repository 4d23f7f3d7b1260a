"""From settings to a trainer: the base model, the weights that are trained, rows, metrics and callbacks put together."""

from __future__ import annotations

from typing import Any

import torch

from resonance.config import TrainConfig
from resonance.data.audio_context import AudioContext
from resonance.data.augment import Augmentation
from resonance.data.batches import ClipDataset, ClipMaker, Collator
from resonance.data.clip_stream import ClipStream
from resonance.data.feature_cache import FeatureCache
from resonance.data.tokens import IGNORED_LABEL, LabelTokenizer
from resonance.errors import RunFolderError
from resonance.evaluate.metrics import score
from resonance.evaluate.normalize import normalizer_for
from resonance.messages import _
from resonance.model import lora, runs
from resonance.model.load import Whisper, load_whisper
from resonance.model.precision import DTYPES, training_precision
from resonance.ranks import Ranks
from resonance.train import progress
from resonance.train.arguments import best_metric, training_arguments
from resonance.train.resume import EarlyStopping
from resonance.train.rows import Rows
from resonance.train.streaming import StreamLoader, layout_of
from resonance.train.trainer import WhisperTrainer
from resonance.units import WINDOW_SECONDS


def load_base(config: TrainConfig, device: torch.device) -> Whisper:
    """The base model in the precision it is trained in. Weights that are trained stay in float32 under autocast."""
    precision = training_precision(config.precision, device)
    return load_whisper(
        config.model_name_or_path,
        device=device,
        dtype=DTYPES[precision] if config.finetuning == "lora" else torch.float32,
        quantization=config.quantization,
        cache_dir=config.cache_dir,
    )


def choose_weights(whisper: Whisper, config: TrainConfig) -> Any:
    """The model with the weights marked that are trained."""
    model = whisper.model
    model.config.use_cache = False  # no use while training, and it forbids gradient checkpointing
    if config.finetuning == "lora":
        return lora.add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.target_modules,
            quantized=config.quantization != "none",
        )
    lora.set_trainable(model, config.finetuning)
    return model


def build_trainer(
    config: TrainConfig,
    run: runs.RunFolder,
    rows: Rows,
    whisper: Whisper,
    model: Any,
    tokenizer: LabelTokenizer,
    context: AudioContext,
    language: str | None,
    mine: Ranks,
) -> WhisperTrainer:
    """Rows, collator, arguments, metrics and callbacks put together."""
    augmentation = Augmentation(
        speed=config.speed_perturbation,
        max_seconds=context.length - context.margin_seconds if isinstance(context.length, float) else WINDOW_SECONDS,
        gain_db=config.gain_db,
        mask_time_prob=config.mask_time_prob if config.apply_spec_augment else 0.0,
        mask_time_length=config.mask_time_length,
        mask_feature_prob=config.mask_feature_prob if config.apply_spec_augment else 0.0,
        mask_feature_length=config.mask_feature_length,
    )
    cache = feature_cache(config, run, whisper.n_mels)
    metric = best_metric(config, normalizer_for(language).unit)
    precision = training_precision(config.precision, whisper.model.device)
    eos = whisper.tokenizer.eos_token_id

    def metrics(prediction: Any) -> dict[str, float]:
        """Scores of generated ids [rows, tokens] against label ids [rows, tokens], both padded with -100."""

        def texts(ids: Any) -> list[str]:
            ids[ids == IGNORED_LABEL] = eos
            decoded: list[str] = whisper.tokenizer.batch_decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return [text.strip() for text in decoded]

        references, hypotheses = texts(prediction.label_ids), texts(prediction.predictions)
        scores = score(list(zip(references, hypotheses, strict=True)), language)
        names = ("wer", "cer", "mer", "exact_phrase_accuracy", "repetition_rate")
        return {name: rate.value for name in names if (rate := getattr(scores, name)).value is not None} | {
            "utterances": len(references)
        }

    args = training_arguments(
        config,
        run.checkpoints,
        precision,
        metric=metric if rows.held_out else None,
        train_rows=len(rows.train),
        on_cpu=whisper.model.device.type == "cpu",
        mine=mine,
    )
    collator = Collator(context, whisper.n_mels, eos)
    train_dataset: ClipDataset | ClipStream
    stream = None
    if rows.stream:
        make = ClipMaker(tokenizer, augmentation, config.timestamp_fraction)
        layout = layout_of(config, rank=args.process_index, ranks=args.world_size)
        train_dataset = ClipStream(
            rows.stream.source, make, collator, rows.stream.choice, layout, skip=config.skip_broken
        )
        stream = StreamLoader(train_dataset, rows.stream.fingerprint)
    else:
        train_dataset = ClipDataset(
            rows.train,
            tokenizer,
            augmentation=augmentation,
            timestamp_fraction=config.timestamp_fraction,
            cache=cache,
        )
    callbacks = progress.callbacks(run, config, mine)
    if config.early_stopping_patience and rows.held_out:
        callbacks.append(EarlyStopping(config.early_stopping_patience))
    return WhisperTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=ClipDataset(rows.held_out, tokenizer, cache=cache) if rows.held_out else None,
        data_collator=collator,
        compute_metrics=metrics,
        callbacks=callbacks,
        train_durations=[] if stream else [row.duration or 0.0 for row in rows.train],
        prompt_length=len(tokenizer.prompt(tokenizer.language)),
        num_beams=config.generation_num_beams,
        max_length=config.generation_max_length,
        label_smoothing=config.label_smoothing_factor,
        keep_checkpoints=config.save_total_limit,
        stream=stream,
    )


def feature_cache(config: TrainConfig, run: runs.RunFolder, n_mels: int) -> FeatureCache | None:
    """Where features are kept, if they are. Raises RunFolderError where that folder cannot be written."""
    if config.feature_cache == "none":
        return None
    folder = config.feature_cache_dir or run.features
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            _("Features cannot be kept in {folder}: {reason}. Choose another --feature_cache_dir.").format(
                folder=folder, reason=error.strerror or error
            )
        ) from error
    return FeatureCache(folder, n_mels)
