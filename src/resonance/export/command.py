"""`resonance export`, top to bottom: load, transcribe, merge, write, load again, transcribe, compare, put in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from rich.console import Console

from resonance.config_export import ExportConfig
from resonance.data.audio_context import AudioContext
from resonance.errors import ConfigError, ExportError, ModelError
from resonance.export import ctranslate2, ggml, hf
from resonance.export.check import BATCH, Clip, Comparison, choose_clips, faster_whisper_texts, transcribe
from resonance.export.merge import folder_size, is_tied, merge, parameter_count
from resonance.export.place import beside, check_place, check_space
from resonance.export.usage import context_notes, usage
from resonance.messages import _
from resonance.model import adapters, exports, runs
from resonance.model.builtin import folder_of
from resonance.transcribe.decoding import TOKENS_AT_LEAST, TOKENS_PER_SECOND, unwrap
from resonance.transcribe.recognizer import DecodeSettings, Recognizer
from resonance.transcribe.torch_engine import TorchRecognizer, load_recognizer
from resonance.units import MEBIBYTE, SAMPLE_RATE, WINDOW_SECONDS

BITS = {"float32": 32, "int16": 16, "f16": 16, "float16": 16, "bfloat16": 16}
BITS_IN_8 = 10  # scales, and what stays in more bits
SIDE_FILES = 16 * MEBIBYTE


@dataclass(frozen=True, slots=True)
class Original:
    """What the model to export makes of the clips."""

    texts: list[str]
    languages: list[str | None]
    texts_at_30_s: list[str]  # where other programs will let the model hear as much
    writes_timestamps: bool
    seconds: float  # it took for `texts`


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export came to."""

    folder: Path
    size: int  # bytes
    record: exports.Record
    notes: list[str]  # what is to be known of it
    commands: list[str]  # that use it


def export(config: ExportConfig, console: Console) -> Exported:
    """Write the model of `config` in the format it asks for, in a folder that appears when it has passed its check.

    Raises ExportError where the texts of the export differ from the original's by more than is allowed, or the format has no
    room for the model; RunFolderError where the folder is taken or cannot be written.
    """
    folder = place_of(config)
    run = runs.containing(Path(folder_of(config.model_path)).expanduser().resolve())
    clips, clips_from = choose_clips(config, run)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    say(
        _("Exporting {model} for {to} in {numbers}").format(
            model=config.model_path, to=config.to, numbers=config.quantized
        )
    )
    source = load_recognizer(config.model_path, base_model=config.base_model, device="cpu")
    if config.to == "ggml":
        ggml.check_fits(unwrap(source.whisper.model), is_tied(source.whisper.model))
    check_space(folder, parameter_count(source.whisper.model) * BITS.get(config.quantized, BITS_IN_8) / 8 + SIDE_FILES)
    say(_("Check: {count} recordings, {source}").format(count=len(clips), source=clips_from))
    settings = DecodeSettings(config.language)
    original = heard(source, clips, settings, config)
    info, context = source.info, source.context
    with beside(folder) as temporary:
        merge(source)
        file = write(config, temporary, source)
        if info:
            hf.write_json(
                temporary / adapters.INFO_FILE, info.model_copy(update={"kind": "full"}).model_dump(mode="json")
            )
        transcripts, seconds = transcribe(load_again(config, temporary, file, source), clips, settings)
        own = Comparison(clips, original.texts, [transcript.text for transcript in transcripts])
        say(own.verdict())
        elsewhere = in_faster_whisper(config, temporary, clips, original, info)
        if elsewhere:
            say(_("In faster-whisper, given 30 s: {verdict}").format(verdict=elsewhere.verdict()))
        for comparison in (own, *([elsewhere] if elsewhere else [])):
            if comparison.mean > config.allowed_difference:
                raise failure(comparison, config.allowed_difference)
        others = usual_faster_whisper(temporary, clips, original, info) if elsewhere else None
        record = exports.Record(
            format=config.to,
            quantization=config.quantized,
            source=config.model_path,
            source_fingerprint=exports.source_fingerprint(config.model_path),
            base_model=info.base_model if info else None,
            writes_timestamps=original.writes_timestamps,
            clips=len(clips),
            difference=round(own.mean, 5),
            max_difference=config.allowed_difference,
            difference_in_faster_whisper=None if others is None else round(others.mean, 5),
            audio_seconds=round(sum(len(clip.audio) for clip in clips) / SAMPLE_RATE, 2),
            seconds={"torch": round(original.seconds, 3)}
            | ({"ct2": round(seconds, 3)} if config.to == "ctranslate2" else {}),
            versions=versions(config.to),
            created=adapters.now(),
        )
        hf.write_json(temporary / exports.RECORD_FILE, record.model_dump(mode="json"))
        notes = context_notes(record, info, context)
        commands = usage(record, info, context, folder / file.relative_to(temporary))
        (temporary / "README.md").write_text(page(record, notes, commands), encoding="utf-8")
        size = folder_size(temporary)
    return Exported(folder, size, record, notes, commands)


def place_of(config: ExportConfig) -> Path:
    """The folder to write, looked at before any work begins. Raises what `export` does, and ConfigError."""
    if config.to == "ctranslate2":
        ctranslate2.need_ctranslate2()
    source = Path(folder_of(config.model_path)).expanduser()
    record = exports.read_record(source)
    if record and record.format != "hf":
        raise ModelError(
            _("{folder} is itself an export for {format}. It was made from {source}: export that.").format(
                folder=source, format=record.format, source=record.source
            )
        )
    folder = config.output_dir or exports.default_folder(config.model_path, config.to)
    if folder is None:
        raise ConfigError([_("--output_dir is needed: {path} lies in no run folder.").format(path=config.model_path)])
    check_place(folder, config.overwrite)
    return folder


def heard(source: TorchRecognizer, clips: Sequence[Clip], settings: DecodeSettings, config: ExportConfig) -> Original:
    """What the original makes of the clips, before it is changed."""
    transcripts, seconds = transcribe(source, clips, settings)
    texts, languages = [t.text for t in transcripts], [t.language for t in transcripts]
    at_30_s = texts
    if config.to == "ctranslate2" and source.context.length != "full":
        wide = replace(source, context=AudioContext("full", 0.0, source.context.window_positions))
        at_30_s = [t.text for t in transcribe(wide, clips, settings)[0]]
    return Original(texts, languages, at_30_s, gives_times(source, clips[-BATCH:], settings), seconds)


def gives_times(source: TorchRecognizer, clips: Sequence[Clip], settings: DecodeSettings) -> bool:
    """Whether the model, asked for times, writes them: an engine that cannot look at its first guesses is told so."""
    most = int(source.max_clip_seconds * SAMPLE_RATE)
    asked = replace(settings, times="segment", max_new_tokens=1)
    return source.transcribe([clip.audio[:most] for clip in clips], asked)[0].timed


def write(config: ExportConfig, folder: Path, source: TorchRecognizer) -> Path:
    """Write the merged model. Returns what programs are given: the folder, or the one file."""
    if config.to == "hf":
        hf.write_hf(folder, source.whisper, config.quantized)
        return folder
    if config.to == "ctranslate2":
        ctranslate2.write_ctranslate2(folder, source.whisper, config.quantized)
        return folder
    file = folder / f"ggml-model-{config.quantized}.bin"
    ggml.write_ggml(file, source.whisper, config.quantized)
    return file


def load_again(config: ExportConfig, folder: Path, file: Path, source: TorchRecognizer) -> Recognizer:
    """A recogniser with what was written. `source` is of no use afterwards: its memory goes to the export."""
    if config.to == "ggml":
        ggml.load_tensors(file, source.whisper.model)
        return source
    source.whisper.model.to("meta")
    if config.to == "hf":
        return load_recognizer(str(folder), device="cpu")
    from resonance.transcribe.ct2_engine import load_ct2_recognizer

    return load_ct2_recognizer(str(folder), device="cpu")


def in_faster_whisper(
    config: ExportConfig, folder: Path, clips: Sequence[Clip], original: Original, info: adapters.Info | None
) -> Comparison | None:
    """What faster-whisper makes of an export for CTranslate2, beside the original where both hear 30 s. None where it is not
    installed, or cannot run the model because its vocabulary is none of OpenAI's."""
    if config.to != "ctranslate2" or not ctranslate2.has_faster_whisper(folder):
        return None
    texts = faster_whisper_texts(folder, clips, original.languages, task_of(info), most_new_tokens(), silence=True)
    return Comparison(clips, original.texts_at_30_s, texts)


def usual_faster_whisper(
    folder: Path, clips: Sequence[Clip], original: Original, info: adapters.Info | None
) -> Comparison:
    """The same as people call it, beside the original at its own context. What differs here is not the export's fault."""
    texts = faster_whisper_texts(folder, clips, original.languages, task_of(info), most_new_tokens(), silence=False)
    return Comparison(clips, original.texts, texts)


def task_of(info: adapters.Info | None) -> str:
    return info.task if info else "transcribe"


def most_new_tokens() -> int:
    """Tokens that our engines write at most in 30 s."""
    return int(WINDOW_SECONDS * TOKENS_PER_SECOND) + TOKENS_AT_LEAST


def failure(comparison: Comparison, allowed: float) -> ExportError:
    """What is told of an export whose texts are not the original's."""
    lines = [
        _(
            "The exported model does not understand what the original does: {share:.1%} of the characters differ, {allowed:.1%} are allowed."
        ).format(share=comparison.mean, allowed=allowed),
        *(f"  {line}" for line in comparison.worst()),
        _("Nothing was kept. Try a --quantization with more bits, or allow more with --max_difference."),
    ]
    return ExportError("\n".join(lines))


def page(record: exports.Record, notes: Sequence[str], commands: Sequence[str]) -> str:
    """A README for whoever receives the folder."""
    lines = [f"# {Path(record.source).name} · {record.format} · {record.quantization}", ""]
    lines += [_("Exported by Resonance from {source}.").format(source=record.source), *notes, ""]
    return "\n".join([*lines, *(f"    {command}" for command in commands), ""])


def versions(to: exports.Format) -> dict[str, str]:
    """Versions of what shaped the files."""
    names = ["resonance-asr", "torch", "transformers", *(["ctranslate2"] if to == "ctranslate2" else [])]
    return {name: metadata.version(name) for name in names}
