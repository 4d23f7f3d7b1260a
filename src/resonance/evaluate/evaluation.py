"""Base against tuned on recordings that training never saw: transcribe with both, score, write the report.

A stock model has no base and is scored alone.
"""

from __future__ import annotations

import filecmp
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import soundfile
from rich.console import Console

from resonance.config_recognizer import EvaluateConfig
from resonance.data.audio import read_audio
from resonance.data.check import probe_durations
from resonance.data.formats import load_manifest
from resonance.data.manifest import Utterance
from resonance.data.rows import MAX_LISTED
from resonance.data.split import sentence_key
from resonance.data.textfile import write_text_atomic
from resonance.errors import ConfigError, DataError
from resonance.evaluate.metrics import measure
from resonance.evaluate.normalize import normalizer_for
from resonance.evaluate.report import write_report
from resonance.evaluate.results import EvaluationReport, Row, group_rows, report_json, worst_rows
from resonance.languages import language_code
from resonance.messages import _
from resonance.model import adapters, runs
from resonance.progress_bar import progress_bar
from resonance.transcribe.files import Span, transcribe_files
from resonance.transcribe.recognizer import DecodeSettings, Recognizer
from resonance.transcribe.sinks import check_writable
from resonance.transcribe.torch_engine import TorchRecognizer, load_recognizer
from resonance.units import SAMPLE_RATE

WORST = 10  # clips that can be listened to in the report
WORST_SECONDS = 30.0  # of each


def evaluate(
    config: EvaluateConfig, console: Console, known_base: dict[DecodeSettings, list[str]] | None = None
) -> tuple[EvaluationReport, Path]:
    """Score the model of `config`, beside its base if it has one. Returns the report and the folder it was written to.

    `report.html` and `report.json` are written together at the end. Raises DataError for rows that cannot be read or that
    were trained on. `known_base` keeps what the base understood, for calls on the same rows and base.
    """
    place = Path(config.model_path).resolve()
    run = runs.containing(place)
    folder = config.output_dir or (run.path if run else None) or Path("evaluation")
    check_writable(folder / "report.html")
    test, train = read_rows(config, run)
    recognizer = load_recognizer(
        config.model_path, base_model=config.base_model, device=config.device, audio_context=config.audio_context
    )
    info = recognizer.info
    language = config.language or (info.language if info else None) or only_language(test)
    # Given to the base too, which does not know by itself what the adapter was trained for.
    settings = DecodeSettings(language, config.task or (info.task if info else None), config.num_beams)
    base_model = (config.base_model or info.base_model) if info else None
    tuned = texts(
        recognizer, test, settings, config.batch_size, console, _("tuned model") if base_model else _("model")
    )
    known_base = {} if known_base is None else known_base
    if base_model and settings not in known_base:
        known_base[settings] = base_texts(recognizer, base_model, config, test, settings, console)
    base = known_base.get(settings)

    normalizer = normalizer_for(language, recognizer.spellings())
    references = [row.text for row in test]
    tuned_results = measure(list(zip(references, tuned, strict=True)), normalizer)
    base_results = measure(list(zip(references, base, strict=True)), normalizer) if base else [None] * len(test)
    seen = None if train is None else {sentence_key(row.text) for row in train}
    rows = [
        Row(
            audio=utterance.audio,
            reference=utterance.text,
            base_text=base[i] if base else None,
            tuned_text=tuned[i],
            base=base_results[i],
            tuned=tuned_results[i],
            seen=None if seen is None else sentence_key(utterance.text) in seen,
            speaker=utterance.speaker,
        )
        for i, utterance in enumerate(test)
    ]
    groups = group_rows(rows, normalizer, config.seed, config.bootstrap_samples)
    for i in worst_rows(rows, groups[0].tuned.main_metric, WORST):
        rows[i] = replace(rows[i], wav=clip_as_wav(test[i]))
    report = EvaluationReport(
        title=_("How well {name} is understood").format(name=run.path.name if run else place.name),
        base_model=(info.base_model or base_model) if info else None,
        tuned_model=config.model_path,
        language=language,
        created=adapters.now(),
        groups=groups,
        rows=tuple(rows),
        events=runs.read_events(run.events) if run else [],
        settings=info.settings if info else {},
        versions={n: metadata.version(n) for n in ("resonance-asr", "torch", "transformers", "peft", "jiwer")},
        notes=provenance(info, run, test, train) if info else (),
    )
    write_report(folder / "report.html", report)
    write_text_atomic(folder / "report.json", [json.dumps(report_json(report), ensure_ascii=False, indent=1)])
    return report, folder


def read_rows(config: EvaluateConfig, run: runs.RunFolder | None) -> tuple[list[Utterance], list[Utterance] | None]:
    """(rows to score, rows trained on). Left out, they are those that the run wrote down; None if they are not known."""
    if config.test_file or config.json_file:
        source = config.test_file or config.dataset_dir
        assert source is not None  # the configuration asks for one of the two
        manifest = load_manifest(source, dataset_dir=config.dataset_dir, json_file=config.json_file)
    elif run and run.held_out_rows.is_file():
        manifest = load_manifest(run.held_out_rows)
    else:
        raise ConfigError([_("--test_file is needed: recordings and transcripts that were kept out of training.")])
    train_file = config.train_file or (run.train_rows if run and run.train_rows.is_file() else None)
    train = load_manifest(train_file, dataset_dir=config.dataset_dir).utterances if train_file else None
    test = probe_durations(manifest.utterances)
    overlap = trained_on(test, train or [])
    if overlap:
        raise DataError(
            _(
                "{count} of the recordings to score were trained on (first: row {row}, {audio}). Scores on them mean "
                "nothing: take them out of --test_file."
            ).format(count=len(overlap), row=overlap[0].row, audio=overlap[0].audio)
        )
    return test[: config.max_eval_samples], train


def only_language(rows: Sequence[Utterance]) -> str | None:
    """The language that all rows name; None when they name several or none."""
    named = {row.language for row in rows}
    try:
        return language_code(str(named.pop())) if len(named) == 1 else None
    except ValueError:
        return None


def trained_on(test: Sequence[Utterance], train: Sequence[Utterance]) -> list[Utterance]:
    """The rows of `test` that are in `train`: the same file, or a copy of it with the same text."""
    places = {(row.audio, row.start) for row in train}
    by_text: dict[str, list[Utterance]] = {}
    for row in train:
        by_text.setdefault(sentence_key(row.text), []).append(row)

    def copied(row: Utterance) -> bool:
        return any(
            row.start == other.start
            and Path(other.audio).is_file()
            and filecmp.cmp(row.audio, other.audio, shallow=False)
            for other in by_text.get(sentence_key(row.text), [])
        )

    return [row for row in test if (row.audio, row.start) in places or copied(row)]


def provenance(
    info: adapters.Info, run: runs.RunFolder | None, test: Sequence[Utterance], train: Sequence[Utterance] | None
) -> tuple[str, ...]:
    """What the reader must know of the recordings that were scored."""
    notes = []
    if train is None:
        notes.append(
            _(
                "What the model was trained on is not known here, so nobody checked that these recordings were kept out of "
                "it. Give --train_file to check."
            )
        )
    held_out = load_manifest(run.held_out_rows).utterances if run and run.held_out_rows.is_file() else []
    chosen_on = {(row.audio, row.start) for row in held_out}
    if info.settings.get("load_best_model_at_end") and any((row.audio, row.start) in chosen_on for row in test):
        notes.append(
            _(
                "The best checkpoint of the training was chosen on these same recordings, so the numbers after it are a "
                "little better than other recordings would give."
            )
        )
    return tuple(notes)


def base_texts(
    recognizer: TorchRecognizer,
    base_model: str,
    config: EvaluateConfig,
    test: Sequence[Utterance],
    settings: DecodeSettings,
    console: Console,
) -> list[str]:
    """What the base model understands, as it comes: at its own context, which is 30 s for stock models."""
    if recognizer.info and recognizer.info.kind == "lora":
        with recognizer.as_base():
            return texts(recognizer, test, settings, config.batch_size, console, _("base model"))
    base = load_recognizer(base_model, device=config.device)
    return texts(base, test, settings, config.batch_size, console, _("base model"))


def texts(
    recognizer: Recognizer,
    rows: Sequence[Utterance],
    settings: DecodeSettings,
    batch_size: int,
    console: Console,
    name: str,
) -> list[str]:
    """Transcripts of rows, in their order."""
    spans = [Span(Path(row.audio), row.start, row.end) for row in rows]
    with progress_bar(console, name, len(rows)) as advance:
        results = list(
            transcribe_files(
                recognizer, spans, settings, batch_size=batch_size, progress=lambda files, _seconds: advance(files)
            )
        )
    failed = [
        _("row {row}: {error}").format(row=row.row, error=result.error)
        for row, result in zip(rows, results, strict=True)
        if result.error is not None
    ]
    if failed:
        more = [_("… and {count} more").format(count=len(failed) - MAX_LISTED)] if len(failed) > MAX_LISTED else []
        raise DataError("\n".join(failed[:MAX_LISTED] + more))
    return [result.text for result in results]


def clip_as_wav(row: Utterance) -> bytes:
    """The first seconds of a recording as a 16-bit WAV file."""
    end = row.start + min(row.duration or WORST_SECONDS, WORST_SECONDS)
    memory = io.BytesIO()
    soundfile.write(memory, read_audio(row.audio, row.start, end), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return memory.getvalue()
