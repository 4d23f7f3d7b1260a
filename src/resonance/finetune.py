"""The main path: recordings in, adapter folder out. Read it from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, set_seed

from resonance.config import TrainConfig, batch_warning, effective_batch
from resonance.config_io import dump_yaml
from resonance.data.augment import Augmentation
from resonance.data.batches import AudioContext, ClipDataset, Collator
from resonance.data.tokens import IGNORED_LABEL, LabelTokenizer
from resonance.data.writing import write_manifest
from resonance.errors import Interrupted, OutOfMemoryError, RunFolderError
from resonance.evaluate.metrics import score
from resonance.evaluate.normalize import normalizer_for
from resonance.messages import _
from resonance.model import adapters, lora, runs
from resonance.model.load import Whisper, choose_device, load_whisper, quiet_libraries
from resonance.model.precision import DTYPES, training_precision
from resonance.train import progress, resume
from resonance.train.arguments import best_metric, training_arguments
from resonance.train.result import save_result, versions
from resonance.train.rows import Rows, check_labels, fingerprint, guess_language, read_rows, single_language
from resonance.train.trainer import WhisperTrainer
from resonance.units import WINDOW_SECONDS


def finetune(config: TrainConfig, console: Console) -> Path:
    """Train as `config` says and return the adapter (or model) folder.

    Everything that can be wrong with settings, recordings and transcripts is found before training starts, and nothing
    that another run left behind is overwritten.
    """
    with runs.claim(config.output_dir, resume=config.resume) as run:
        resume.check_settings(config, run)
        if run.result and resume.nothing_left(config, run):
            console.print(_("All steps of this training are done: there is nothing to continue."), soft_wrap=True)
            return run.result
        rows = read_rows(config, console)
        resume.check_rows(rows, run)
        language = config.language or guess_language([*rows.train, *rows.held_out])
        # Rows may name their own; None means several, which are told apart when transcribing.
        only = single_language([*rows.train, *rows.held_out], language)
        whisper = load(config, choose_device("cpu" if config.extra.get("use_cpu") else "auto"))
        tokenizer = LabelTokenizer(
            whisper.tokenizer, whisper.multilingual, language, config.task, whisper.max_label_tokens
        )
        check_labels([*rows.train, *rows.held_out], tokenizer)

        set_seed(config.seed)
        model = choose_weights(whisper, config)
        context = AudioContext(config.audio_context, config.audio_margin, whisper.window_positions)
        trainer = build_trainer(config, run, rows, whisper, model, tokenizer, context, only)
        announce(config, rows, only, model, trainer, console)
        dump_yaml(config, run.config)
        write_manifest(run.train_rows, rows.train)
        if rows.held_out:
            write_manifest(run.held_out_rows, rows.held_out)
        train(trainer, run, console)

        info = describe(config, rows, whisper, trainer, only)
        name = "adapter" if info.kind == "lora" else "model"
        with quiet_libraries():
            return save_result(run.path / name, whisper, trainer.model, info)


def load(config: TrainConfig, device: torch.device) -> Whisper:
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

    callbacks = progress.callbacks(run, config)
    if config.early_stopping_patience and rows.held_out:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    return WhisperTrainer(
        model=model,
        args=training_arguments(
            config, run.checkpoints, precision, metric=metric if rows.held_out else None, train_rows=len(rows.train)
        ),
        train_dataset=ClipDataset(
            rows.train, tokenizer, augmentation=augmentation, timestamp_fraction=config.timestamp_fraction
        ),
        eval_dataset=ClipDataset(rows.held_out, tokenizer) if rows.held_out else None,
        data_collator=Collator(context, whisper.n_mels, eos),
        compute_metrics=metrics,
        callbacks=callbacks,
        train_durations=[row.duration or 0.0 for row in rows.train],
        prompt_length=len(tokenizer.prompt(tokenizer.language)),
        num_beams=config.generation_num_beams,
        max_length=config.generation_max_length,
        label_smoothing=config.label_smoothing_factor,
        keep_checkpoints=config.save_total_limit,
    )


def announce(
    config: TrainConfig, rows: Rows, language: str | None, model: Any, trainer: WhisperTrainer, console: Console
) -> None:
    """What is about to be trained, on what, and how."""
    trainable, total = lora.trainable_share(model)
    devices = trainer.args.world_size
    lines = [
        _("Recordings: {train} to train on ({hours:.2f} h), {held_out} held out · language {language}").format(
            train=len(rows.train), hours=rows.hours, held_out=len(rows.held_out), language=language or _("several")
        ),
        _("Model: {name} on {device}; {trainable:,} of {total:,} parameters are trained ({share:.2%})").format(
            name=config.model_name_or_path,
            device=trainer.args.device,
            trainable=trainable,
            total=total,
            share=trainable / total,
        ),
        _("Effective batch: {batch} = {per_device} per device x {steps} accumulated x {devices} device(s)").format(
            batch=effective_batch(config, devices),
            per_device=config.per_device_train_batch_size,
            steps=config.gradient_accumulation_steps,
            devices=devices,
        ),
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    warning = batch_warning(config, devices)
    if warning:
        console.print(warning, style="yellow", soft_wrap=True)
    if not rows.held_out:
        console.print(_("Nothing is held out: how good the result is will not be known."), style="yellow")


def train(trainer: WhisperTrainer, run: runs.RunFolder, console: Console) -> None:
    """Run the loop from the last complete checkpoint. Raises Interrupted, with everything saved, on a signal."""
    latest = run.latest_checkpoint()
    line = progress.ProgressLine(console, trainer.metric)
    stop = progress.StopOnSignal()
    for callback in (resume.NewIntervals(), line, stop):
        trainer.add_callback(callback)
    with stop.installed(), quiet_libraries():
        try:
            if latest and resume.all_steps_done(trainer, latest):
                resume.finish(trainer, latest)
            else:
                trainer.train(resume_from_checkpoint=str(latest) if latest else None)
        except progress.StopNow:
            pass  # the signal came while evaluating; the step before it is done
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                _(
                    "The GPU has too little memory for these settings. Continue with --resume and half of "
                    "--per_device_train_batch_size with twice the --gradient_accumulation_steps, which trains the same, or "
                    "with --gradient_checkpointing. If that is not enough, begin again in another --output_dir with "
                    "--use_8bit, a smaller --max_audio_len or a smaller model."
                )
            ) from error
        except OSError as error:  # `events.jsonl`, TensorBoard
            raise RunFolderError(
                _(
                    "The log in {folder} could not be written: {reason}. Free some space, then continue from the last "
                    "checkpoint with --resume."
                ).format(folder=run.path, reason=error.strerror or error)
            ) from error
        finally:
            line.stop()
        if stop.received is not None:
            saved = trainer.save_now()
            raise Interrupted(
                _("Stopped at step {step}. {folder} is saved; continue with --resume.").format(
                    step=trainer.state.global_step, folder=saved
                ),
                stop.received,
            )


def describe(
    config: TrainConfig, rows: Rows, whisper: Whisper, trainer: WhisperTrainer, language: str | None
) -> adapters.Info:
    """What `resonance.json` says of the result."""
    durations = [row.duration or 0.0 for row in rows.train]
    return adapters.Info(
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
            "train_rows": len(rows.train),
            "eval_rows": len(rows.held_out),
            "hours": round(rows.hours, 4),
            "longest_clip_seconds": max(durations),
            "fingerprint": fingerprint(rows.train),
        },
        settings=config.model_dump(mode="json"),
        versions=versions(),
        created=adapters.now(),
    )
