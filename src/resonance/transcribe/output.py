"""`resonance transcribe`: texts on stdout or in files, progress on stderr, failures in the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resonance.config_recognizer import TranscribeConfig
from resonance.config_types import OutputFormat
from resonance.messages import _
from resonance.ranks import Ranks, ranks
from resonance.transcribe.destinations import asked_times, chosen_formats, refuse_many_in_one
from resonance.transcribe.files import LongAudio, Span, transcribe_files
from resonance.transcribe.formats import SUBTITLES
from resonance.transcribe.inputs import list_audio
from resonance.transcribe.progress import TranscribingProgress
from resonance.transcribe.recognizer import DecodeSettings, Times
from resonance.transcribe.record import settings_of
from resonance.transcribe.rows import row_of
from resonance.transcribe.script import script_converter
from resonance.transcribe.sinks import Folder, Screen, SharedFile, Sink
from resonance.transcribe.subtitles import Layout

if TYPE_CHECKING:
    from resonance.transcribe.phrases import PhraseHelp


def transcribe_to_output(config: TranscribeConfig) -> int:
    """Transcribe what `config` names. Returns the exit code: 1 when a file could not be transcribed.

    Of several processes each transcribes its share, and the one that finishes last answers for all.
    """
    mine = ranks()
    formats = chosen_formats(config)
    times = asked_times(config, formats)
    recordings = list_audio(config.audio_path, config.audio_list)
    refuse_many_in_one(config, formats, len(recordings), mine.world)
    sink = open_sink(config, recordings, formats, times, mine)
    try:
        if left := sink.left():
            transcribe_into(sink, left, config, formats, times, mine)
        return 1 if sink.finish() else 0
    finally:
        sink.close()


def open_sink(
    config: TranscribeConfig, recordings: Sequence[Path], formats: Sequence[OutputFormat], times: Times, mine: Ranks
) -> Sink:
    """Where the texts go. Raises DataError now, not after hours of work, when they cannot go there."""
    layout = Layout(
        config.max_line_length, config.max_line_count, config.max_subtitle_seconds, txt_segments=config.times != "none"
    )
    kept: SharedFile | Folder
    if config.output_file:
        kept = SharedFile(recordings, config.output_file, formats, layout, mine)
    elif config.output_dir:
        kept = Folder(recordings, config.output_dir, formats, layout, mine)
    else:
        return Screen(recordings, formats[0] if formats else None, layout)
    laid_out = bool(config.output_dir and set(SUBTITLES) & set(formats))
    if config.output_dir and "txt" in formats:
        times = config.times  # its lines are segments only where they were asked for
    try:
        kept.claim(settings_of(config, times, layout=laid_out), overwrite=config.overwrite)
    except BaseException:
        kept.close()
        raise
    return kept


def transcribe_into(
    sink: Sink,
    recordings: Sequence[Path],
    config: TranscribeConfig,
    formats: Sequence[OutputFormat],
    times: Times,
    mine: Ranks,
) -> None:
    """Rows of all recordings, each as it is finished. One that cannot be read is said on stderr and stops no other."""
    from resonance.transcribe.engines import load_recognizer_for

    settings = decode_settings(config, times, scores=bool({"json", "jsonl"} & set(formats)))
    long_audio = LongAudio(
        config.longform,
        config.max_window_seconds,
        config.skip_nonspeech,
        config.no_speech_threshold,
        config.condition_on_previous_text,
    )
    use_own_gpu(mine)
    recognizer = load_recognizer_for(config)
    in_script = script_converter(config.script)
    progress = TranscribingProgress(recordings, shown=mine.main)
    spans = [Span(path) for path in recordings]
    try:
        for result in transcribe_files(
            recognizer,
            spans,
            settings,
            batch_size=config.batch_size,
            long_audio=long_audio,
            progress=progress.advance,
        ):
            progress.clear()
            sink.add(row_of(in_script(result), times))
            if result.error is not None:
                progress.say(_("Error: {message}").format(message=result.error))
    finally:
        progress.clear()


def decode_settings(config: TranscribeConfig, times: Times, *, scores: bool) -> DecodeSettings:
    """How to decode. Scores are known anyway but for beams, unless a text is to be judged by them."""
    step = config.temperature_increment_on_fallback
    higher = [round(step * i, 6) for i in range(1, int(1 / step + 1e-6) + 1)] if step else []
    return DecodeSettings(
        config.language,
        config.task,
        config.num_beams,
        times,
        scores=scores or config.skip_nonspeech,
        temperatures=(0.0, *higher),
        compression_ratio_threshold=config.compression_ratio_threshold,
        log_prob_threshold=config.log_prob_threshold,
        no_speech_threshold=config.no_speech_threshold,
        phrases=phrase_help(config),
    )


def phrase_help(config: TranscribeConfig) -> PhraseHelp | None:
    """What this person says, where a list is given."""
    if config.phrases is None:
        return None
    from resonance.transcribe.phrases import PhraseHelp, read_phrases

    return PhraseHelp(
        read_phrases(config.phrases), config.phrases_weight, config.phrases_only, config.phrases_threshold
    )


def use_own_gpu(mine: Ranks) -> None:
    """Each of several processes on a machine computes on another GPU, as far as there are some."""
    import torch

    if mine.launched and torch.cuda.is_available():
        torch.cuda.set_device(mine.local % torch.cuda.device_count())
