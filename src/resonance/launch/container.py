"""A training inside a SageMaker container: folders and settings from its environment, the result where SageMaker takes it.

/opt/ml/input/config  hyperparameters.json …     /opt/ml/checkpoints  the run folder; mirrored to S3 and brought back
/opt/ml/input/data    train, validation, model   /opt/ml/model        the result: model.tar.gz
/opt/ml/output        failure                    /opt/ml/output/data  log and settings: output.tar.gz
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from resonance.errors import ConfigError
from resonance.messages import _
from resonance.model.runs import RunFolder

FAILURE_CHARACTERS = 1024  # SageMaker shows no more of /opt/ml/output/failure
CHANNELS = ("train", "validation", "model")
# Set here whatever a hyper-parameter says: where checkpoints are mirrored from, and that a restarted job goes on.
OWNED = frozenset({"output_dir", "resume", "resume_from_checkpoint"})
INTERRUPTED = (130, 143)  # exit codes of a training that was stopped and saved


@dataclass(frozen=True, slots=True)
class Folders:
    """Where everything lies in a container."""

    config: Path
    channels: Mapping[str, Path]  # of CHANNELS, those that the job has
    model: Path
    output: Path
    output_data: Path
    checkpoints: Path

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Folders:
        """The folders that the `SM_…` variables name; those of every SageMaker container where they are not set."""
        data = Path(environment.get("SM_INPUT_DATA_DIR", "/opt/ml/input/data"))
        found = {name: Path(environment.get(f"SM_CHANNEL_{name.upper()}", data / name)) for name in CHANNELS}
        output = Path(environment.get("SM_OUTPUT_DIR", "/opt/ml/output"))
        return cls(
            config=Path(environment.get("SM_INPUT_CONFIG_DIR", "/opt/ml/input/config")),
            channels={name: folder for name, folder in found.items() if name == "train" or folder.is_dir()},
            model=Path(environment.get("SM_MODEL_DIR", "/opt/ml/model")),
            output=output,
            output_data=Path(environment.get("SM_OUTPUT_DATA_DIR", output / "data")),
            checkpoints=Path(environment.get("SM_CHECKPOINT_DIR", "/opt/ml/checkpoints")) / _own(environment),
        )

    @classmethod
    def of_a_job(cls, channels: Sequence[str]) -> Folders:
        """The folders in the container of a job with these channels."""
        return replace(cls.of({}), channels={name: Path("/opt/ml/input/data") / name for name in channels})


def _own(environment: Mapping[str, str]) -> str:
    """A folder for each of several machines: all are mirrored to one place in S3, where equal names would overwrite each
    other, and every machine gets all of it back after an interruption."""
    try:
        hosts = json.loads(environment.get("SM_HOSTS", "[]"))
    except ValueError:
        return ""
    return environment.get("SM_CURRENT_HOST", "") if isinstance(hosts, list) and len(hosts) > 1 else ""


def train_in_container(
    run: Callable[[list[str]], int], argv: Sequence[str] = (), defaults: Mapping[str, str] | None = None
) -> int:
    """Train as the container's hyper-parameters say (flags in `argv` win) and return the exit code.

    `run` runs one `resonance` command line. A checkpoint that an interrupted job left is continued from. `defaults` stand in
    for settings that are not given.
    """
    # The metrics of the job are read from the English log.
    os.environ["RESONANCE_LANG"] = "en"
    folders = Folders.of(os.environ)
    heard = _Heard()
    try:
        with contextlib.redirect_stderr(heard):
            try:
                given = hyperparameters(folders, os.environ) | read_flags(argv)
                settings = training_settings({**(defaults or {}), **given}, folders)
            except ConfigError as error:
                print(_("Error: {message}").format(message=error), file=sys.stderr)
                code = error.exit_code
            else:
                code = run(["train", *(f"--{name}={value}" for name, value in settings.items())])
        if code == 0 and os.environ.get("RANK", "0") == "0":
            hand_over(folders)
    except Exception as error:
        write_failure(folders, f"{type(error).__name__}: {error}")
        raise
    if code not in (0, *INTERRUPTED):
        write_failure(folders, heard.reason())
    return code


class _Heard(io.TextIOBase):
    """Passes everything on to stderr and keeps the end of it."""

    def __init__(self) -> None:
        self.stream = sys.stderr
        self.end = ""

    def reason(self) -> str:
        """The error that ended the command, without what libraries printed before it."""
        start = self.end.rfind("Error: ")
        return self.end[start:] if start >= 0 else self.end[-FAILURE_CHARACTERS:]

    def write(self, text: str) -> int:
        self.end = (self.end + text)[-64 * FAILURE_CHARACTERS :]
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


def hyperparameters(folders: Folders, environment: Mapping[str, str]) -> dict[str, str]:
    """The job's hyper-parameters as text. Raises ConfigError."""
    file = folders.config / "hyperparameters.json"
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else environment.get("SM_HPS", "{}")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(_("no JSON object"))
    except (OSError, ValueError) as error:
        source = file if file.is_file() else "SM_HPS"
        raise ConfigError([_("{path}: cannot be read ({reason}).").format(path=source, reason=error)]) from None
    return {name.replace("-", "_"): _as_text(value) for name, value in values.items()}


def _as_text(value: object) -> str:
    """The text of a hyper-parameter, which some of AWS' tools write as JSON inside the text."""
    if isinstance(value, str) and value[:1] in ('"', "["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def read_flags(argv: Sequence[str]) -> dict[str, str]:
    """`--name value`, `--name=value` and bare `--name` by name; what they mean is checked by `resonance train`."""
    found: dict[str, str] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = _as_text(value) if equals else "true"
            name = "" if equals else name
        elif name:
            found[name], name = _as_text(word), ""
        else:
            raise ConfigError([_("{text} belongs to no setting.").format(text=repr(word))])
    return found


def training_settings(given: Mapping[str, str], folders: Folders) -> dict[str, str]:
    """`given` with paths taken from the channels, the folder for checkpoints, and the wish to continue what is there."""
    settings = {name: value for name, value in given.items() if name not in OWNED and not _of_aws(name)}
    train = folders.channels["train"]
    validation = folders.channels.get("validation")
    for name, channel in (("dataset_dir", train), ("train_file", train), ("validation_file", validation or train)):
        if name in settings:
            settings[name] = str(channel / settings[name])  # an absolute path stays what it is
    if "json_file" in settings:
        settings.setdefault("dataset_dir", str(train))
    else:
        settings.setdefault("train_file", settings.get("dataset_dir", str(train)))
    if validation:
        settings.setdefault("validation_file", str(validation))
    if "model" in folders.channels:
        settings.pop("base_model", None)
        settings["model_name_or_path"] = str(folders.channels["model"])
    return settings | {"output_dir": str(folders.checkpoints), "resume": "true"}


def _of_aws(name: str) -> bool:
    """Whether AWS' own tools have put the name among the hyper-parameters."""
    return name.startswith("sagemaker_") or name == "mp_parameters"


def hand_over(folders: Folders) -> None:
    """Copy the result to where SageMaker makes model.tar.gz of it, and everything beside it to output.tar.gz."""
    run = RunFolder(folders.checkpoints)
    if run.result is None:
        return
    shutil.copytree(run.result, folders.model, dirs_exist_ok=True)
    folders.output_data.mkdir(parents=True, exist_ok=True)
    for path in sorted(run.path.iterdir()):
        if path.name.startswith(".") or path in (run.checkpoints, run.result):
            continue
        if path.is_dir():
            shutil.copytree(path, folders.output_data / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, folders.output_data)


def write_failure(folders: Folders, text: str) -> None:
    """Tell SageMaker why the job failed. The first process that fails is the one to tell; the others follow from it."""
    with contextlib.suppress(OSError):  # it is in the log too
        folders.output.mkdir(parents=True, exist_ok=True)
        with (folders.output / "failure").open("x", encoding="utf-8") as stream:
            stream.write(text.strip()[:FAILURE_CHARACTERS])
