"""The exception tree: every failure a user can meet, each with the exit code of the command that met it.

An error says where, what was found there and what to do. Exit code 1 means that data, a model or the machine is at
fault; 2 that the command line or the configuration is; 130 and 143 that the user (SIGINT) or the system (SIGTERM)
stopped the command.
"""

from __future__ import annotations

from collections.abc import Sequence


class ResonanceError(Exception):
    """Root of all errors that a command reports without a traceback."""

    exit_code = 1


class ConfigError(ResonanceError):
    """Settings that cannot be used. Holds one line for every problem found, so that all are fixed in one go."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class DataError(ResonanceError):
    """Recordings or transcripts that cannot be used."""


class ManifestError(DataError):
    """A manifest that cannot be read, or rows in it that make no sense."""


class AudioError(DataError):
    """One audio file that cannot be decoded. The message names the file."""


class NoSoundError(AudioError):
    """An audio file of 0 seconds."""


class TooLongError(AudioError):
    """More sound than may be decoded."""


class ShardError(DataError):
    """A part of streamed data that is missing, damaged or out of reach. The message names it."""


class UnreachableError(ShardError):
    """A network or a server that does not answer now. Tried again later, it may."""


class ModelError(ResonanceError):
    """Weights, a tokenizer or a configuration that cannot be loaded."""


class AdapterError(ModelError):
    """An adapter folder that is incomplete, damaged or made for another base model."""


class ExportError(ModelError):
    """A model that cannot be written in a format, or that no longer understands the same when it is."""


class RunFolderError(ResonanceError):
    """An output folder that is in use, finished, not writable or full."""


class MissingExtraError(ResonanceError):
    """An optional dependency that the command needs and that is not installed."""


class CloudError(ResonanceError):
    """A cloud provider that refuses a request, or a job there that is not what was asked for."""


class OutOfMemoryError(ResonanceError):
    """The device has too little memory for the settings."""


class SmallerSettingsError(ResonanceError):
    """Memory ran out in one of several processes. Smaller settings are saved: started again, the training goes on with them."""


class LostContactError(ResonanceError):
    """Another process of the training has ended or does not answer. Started again, the training goes on."""


class ElsewhereError(ResonanceError):
    """Another process of the training has said what is wrong."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


class Interrupted(ResonanceError):  # noqa: N818 - not a fault: somebody asked the command to stop
    """SIGINT or SIGTERM arrived; what can be saved has been saved. `exit_code` is 128 + the signal's number.

    `here`: in this process, not only in another one of the same training.
    """

    def __init__(self, message: str, signal_number: int, *, here: bool = True) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
        self.here = here
