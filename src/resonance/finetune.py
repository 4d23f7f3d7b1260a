"""The main path: recordings in, adapter folder out. Read it from top to bottom."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from resonance.config import TrainConfig, alignment_steps, batch_warning, effective_batch
from resonance.config_io import dump_yaml
from resonance.data.audio_context import AudioContext
from resonance.data.stream import strided
from resonance.data.tokens import LabelTokenizer
from resonance.data.writing import write_manifest
from resonance.errors import Interrupted, RunFolderError
from resonance.messages import _
from resonance.model import adapters, lora, runs
from resonance.model.load import Whisper, choose_device, quiet_libraries
from resonance.model.precision import training_precision
from resonance.model.sizes import WhisperShape, shape_from_config
from resonance.plan.command import planned
from resonance.plan_learning import learn
from resonance.progress_bar import progress_bar
from resonance.ranks import Ranks
from resonance.train import alignment, build, ladder, progress, resume, together
from resonance.train.result import describe, save_result
from resonance.train.rows import Rows, check_labels, guess_language, read_rows, rows_in_words, single_language
from resonance.train.stream_rows import write_stream
from resonance.train.trainer import WhisperTrainer


def finetune(config: TrainConfig, console: Console) -> Path:
    """Train as `config` says and return the adapter (or model) folder.

    Everything that can be wrong with settings, recordings and transcripts is found before training starts, and nothing
    that another run left behind is overwritten. Where several processes train together, each calls this: the main one
    speaks and writes.
    """
    with together.joined(config) as mine:
        if not mine.main:
            console = Console(quiet=True)
        begun = together.by_main(mine, lambda: runs.RunFolder(config.output_dir).config.is_file())
        if config.auto and not begun:  # a run that has begun has its plan
            plan = together.by_main(mine, lambda: planned(config, console))
            config = plan.model_copy(update={name: getattr(config, name) for name in together.PATHS})
        with together.claim(config.output_dir, resume=config.resume, mine=mine) as (run, mine):
            return train_until_it_fits(config, run, mine, console)


def train_until_it_fits(config: TrainConfig, run: runs.RunFolder, mine: Ranks, console: Console) -> Path:
    """Train, with smaller settings where memory runs out."""
    with together.agreeing(mine):
        if mine.writes:
            resume.check_checkpoints(run, console)
    together.go_back_to_common(run, mine)
    config = ladder.resumed(config, run, mine)
    with together.agreeing(mine):
        resume.check_settings(config, run, mine.world)
    done = together.by_main(mine, lambda: run.result if resume.nothing_left(config, run) else None)
    if done:
        console.print(_("All steps of this training are done: there is nothing to continue."), soft_wrap=True)
        return done
    with together.agreeing(mine):
        rows = read_rows(config, console, run.clips)
        resume.check_rows(rows, run)
    with together.agreeing(mine):
        together.check_same(mine, config, rows, run)
    if mine.main and not run.latest_checkpoint():
        run.events.unlink(missing_ok=True)  # of a run that left no checkpoint behind
    steps_down = ladder.Ladder(run, console)
    while True:
        try:
            result = train_once(config, rows, run, mine, console)
        except ladder.MemoryFull as full:
            config = steps_down.down(config, rows, full)
            if mine.world > 1:  # the others wait inside the step that failed here
                raise steps_down.for_all(config) from full
        else:
            steps_down.report(config)
            return result
        ladder.release()  # here nothing holds the last attempt any more
        rows = rows.up_to(config.max_audio_len)


def train_once(config: TrainConfig, rows: Rows, run: runs.RunFolder, mine: Ranks, console: Console) -> Path:
    """From rows to the result folder. Raises MemoryFull, with everything saved, where these settings take too much."""
    language = config.language or guess_language([*rows.train, *rows.held_out])
    # Rows may name their own; None means several, which are told apart when transcribing.
    only = single_language([*rows.train, *rows.held_out], language)
    with together.agreeing(mine), ladder.loading(config.model_name_or_path):
        whisper = build.load_base(config, choose_device("cpu" if config.extra.get("use_cpu") else "auto"))
        tokenizer = LabelTokenizer(
            whisper.tokenizer,
            whisper.multilingual,
            language,
            config.task,
            whisper.max_label_tokens,
            learns_language=only is None,
        )
        check_labels([*rows.train, *rows.held_out], tokenizer)

    set_seed(config.seed)
    model = build.choose_weights(whisper, config)
    context = AudioContext(config.audio_context, config.audio_margin, whisper.window_positions)
    with together.agreeing(mine):
        trainer = build.build_trainer(config, run, rows, whisper, model, tokenizer, context, only, mine)
        if trainer.stream:
            # Refused, where it cannot go on, before anything is written.
            trainer.stream.restore(run.latest_checkpoint())
    announce(config, rows, only, model, trainer, console)
    if mine.writes:
        record(config, rows, run)
    shape = shape_from_config(whisper.model.config.to_dict())
    if not run.latest_checkpoint():
        with ladder.watching(shape):
            align(config, rows, whisper, model, context, run.events, mine, console)
    train(trainer, run, shape, console)
    if trainer.stream and trainer.stream.left_out:
        text = _(
            "Not trained on, counted in each pass: {count} recordings that are held out, too long, too short or broken."
        )
        console.print(text.format(count=trainer.stream.left_out), soft_wrap=True)
    learn(config, rows, shape, trainer, run)

    info = describe(config, rows, whisper, trainer, only)
    name = "adapter" if info.kind == "lora" else "model"
    with quiet_libraries():
        weights = trainer.gathered_weights()
        with together.agreeing(mine):
            if mine.writes:
                save_result(run.path / name, whisper, trainer.model, info, weights)
    return run.path / name


def record(config: TrainConfig, rows: Rows, run: runs.RunFolder) -> None:
    """What the run is made of, for resuming it and for measuring its result."""
    dump_yaml(config, run.config)
    if rows.stream:
        write_stream(rows.stream, run)
    else:
        write_manifest(run.train_rows, rows.train)
    if rows.held_out:
        write_manifest(run.held_out_rows, rows.held_out)


def announce(
    config: TrainConfig, rows: Rows, language: str | None, model: Any, trainer: WhisperTrainer, console: Console
) -> None:
    """What is about to be trained, on what, and how."""
    trainable, total = lora.trainable_share(model)
    devices = trainer.args.world_size
    lines = [
        rows_in_words(rows, language or _("several")),
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
    if rows.stream and trainer.stream and strided(rows.stream.source.units, trainer.stream.readers):
        lines.append(
            _(
                "There are fewer parts ({parts}) than processes that read ({readers}): each reads all and keeps its share."
            ).format(parts=len(rows.stream.source.units), readers=trainer.stream.readers)
        )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    warning = batch_warning(config, devices)
    if warning:
        console.print(warning, style="yellow", soft_wrap=True)
    if not rows.held_out:
        console.print(_("Nothing is held out: how good the result is will not be known."), style="yellow")


def align(
    config: TrainConfig,
    rows: Rows,
    whisper: Whisper,
    model: Any,
    context: AudioContext,
    events: Path,
    mine: Ranks,
    console: Console,
) -> None:
    """Fit the encoder at a short audio context to what it gives for 30 s, before it learns this voice from labels."""
    steps = alignment_steps(config)
    own = adapters.own_info(config.model_name_or_path)
    # A base that was itself trained at a short context has nothing to learn from its own answer for 30 s.
    if not steps or not alignment.trainable_encoder(model) or (own and own.audio_context != "full"):
        return
    with progress_bar(console, _("fitting the audio context"), steps) as advance:
        difference = alignment.align_audio_context(
            model,
            rows.train,
            context,
            whisper.n_mels,
            steps=steps,
            batch_size=effective_batch(config, mine.world),
            at_once=config.per_device_train_batch_size,
            learning_rate=alignment.LEARNING_RATE[config.finetuning],
            precision=training_precision(config.precision, whisper.model.device),
            seed=config.seed,
            on_step=lambda: advance(1),
        )
    set_seed(config.seed)
    row = {"step": 0, "context_difference_before": difference.before, "context_difference": difference.after}
    if mine.main:
        progress.append_event(events, row)
    console.print(
        _(
            "Audio context: what the model hears at the length of the recordings differed from what it hears in 30 s by "
            "{before:.1%}, now by {after:.1%}"
        ).format(before=difference.before, after=difference.after),
        highlight=False,
        soft_wrap=True,
    )


def train(trainer: WhisperTrainer, run: runs.RunFolder, shape: WhisperShape, console: Console) -> None:
    """Run the loop from the last complete checkpoint. Raises Interrupted on a signal, MemoryFull where memory runs out;
    everything is saved then."""
    latest, measured = run.latest_checkpoint(), True
    line = progress.ProgressLine(console, trainer.metric)
    stop, start = progress.StopOnSignal(), ladder.StepStart()
    for callback in (resume.NewIntervals(), line, stop, start):
        trainer.add_callback(callback)
    with stop.installed(), quiet_libraries(), ladder.watching(shape, trainer, start):
        try:
            if latest and resume.all_steps_done(trainer, latest):
                resume.finish(trainer, latest)
            else:
                if latest:
                    resume.measure_missed(trainer, latest)
                trainer.train(resume_from_checkpoint=str(latest) if latest else None)
        except progress.StopNow:
            measured = False  # the signal came while evaluating; the step before it is done
        except OSError as error:  # `events.jsonl`, TensorBoard
            raise RunFolderError(
                _(
                    "The log in {folder} could not be written: {reason}. Free some space, then continue from the last "
                    "checkpoint with --resume."
                ).format(folder=run.path, reason=error.strerror or error)
            ) from error
        finally:
            line.stop()
        if stop.agree():
            saved = trainer.save_now()
            if not measured or stop.unmeasured:
                (saved / resume.UNMEASURED_FILE).touch()
            raise Interrupted(
                _("Stopped at step {step}. {folder} is saved; continue with --resume.").format(
                    step=trainer.state.global_step, folder=saved
                ),
                stop.agreed or signal.SIGTERM,
                here=stop.received is not None,
            )
