"""Which engine transcribes: PyTorch, or CTranslate2 where a model was exported for it."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

from resonance.config_recognizer import TranscribeConfig
from resonance.errors import ModelError
from resonance.messages import _
from resonance.model import exports
from resonance.model.builtin import folder_of
from resonance.model.load import choose_device, not_for_torch
from resonance.transcribe.recognizer import Recognizer
from resonance.transcribe.torch_engine import load_recognizer


def load_recognizer_for(config: TranscribeConfig) -> Recognizer:
    """The model of `config` in the engine it asks for.

    auto takes CTranslate2 for a folder that is one of its models; else, on a CPU, for a model with an export in its run folder
    that was made from these very weights and was the faster of the two when it was checked.
    """
    folder = Path(folder_of(config.model_path)).expanduser()
    if exports.is_ctranslate2(folder):
        if config.engine == "torch" or config.phrases:
            raise not_for_torch(folder)
        return _ct2(folder, config)
    if config.engine != "torch" and not config.phrases:
        exported = ready_export(config)
        if exported:
            return _ct2(exported, config)
        if config.engine == "ct2":
            raise ModelError(
                _("The engine ct2 needs this model in CTranslate2's format. Export it first:\n  {command}").format(
                    command=export_command(config.model_path)
                )
            )
    return load_recognizer(
        config.model_path, base_model=config.base_model, device=config.device, audio_context=config.audio_context
    )


def _ct2(folder: Path, config: TranscribeConfig) -> Recognizer:
    from resonance.transcribe.ct2_engine import load_ct2_recognizer

    return load_ct2_recognizer(str(folder), device=config.device, audio_context=config.audio_context)


def ready_export(config: TranscribeConfig) -> Path | None:
    """The export in the run folder that the engine may use in place of the model itself."""
    folder = exports.default_folder(config.model_path, "ctranslate2")
    record = exports.read_record(folder) if folder and exports.is_ctranslate2(folder) else None
    if folder is None or record is None:
        return None
    wanted = config.engine == "ct2"
    if not wanted and (
        importlib.util.find_spec("ctranslate2") is None
        or choose_device(config.device).type != "cpu"  # what was measured was measured on a processor
        or record.seconds["ct2"] >= record.seconds["torch"]
    ):
        return None
    if record.source_fingerprint != exports.source_fingerprint(config.model_path):
        print(
            _(
                "{folder} was exported from other weights than the model has now, and is not used. Again: {command}"
            ).format(folder=folder, command=export_command(config.model_path, overwrite=True)),
            file=sys.stderr,
        )
        return None
    return folder


def export_command(model_path: str, *, overwrite: bool = False) -> str:
    """What to type for a model in CTranslate2's format."""
    place = "" if exports.default_folder(model_path, "ctranslate2") else " --output_dir exported"
    again = " --overwrite" if overwrite else ""
    return f"resonance export --model_path {shlex.quote(model_path)} --to ctranslate2{place}{again}"
