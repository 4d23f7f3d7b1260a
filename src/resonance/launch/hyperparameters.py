"""Settings as the hyper-parameters of a SageMaker job: text, few enough, short enough, and read back as what was meant.

Hyper-parameters, and not a file in the source package: they are what the console and DescribeTrainingJob show, and what a copy
of the job made there can change. The container reads them with the same schema that checked them here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from resonance.config import TrainConfig
from resonance.config_io import from_mapping
from resonance.config_sagemaker import SubmitConfig
from resonance.errors import ConfigError
from resonance.launch.container import OWNED, Folders, training_settings
from resonance.messages import _

# Of CreateTrainingJob.
MOST = 100
LONGEST_NAME = 256  # characters
LONGEST_VALUE = 2500  # characters
SECRET = ("hub_token",)  # settings that nobody else may read


def from_config(config: SubmitConfig, channels: list[str]) -> dict[str, str]:
    """The settings that were given, as text by name. Raises ConfigError where a job could not be told them."""
    names = (config.model_fields_set & TrainConfig.model_fields.keys()) - OWNED
    values = config.model_dump(mode="json", include=set(names))
    values |= values.pop("extra", {})
    found = {name: as_text(value) for name, value in sorted(values.items())}
    problems = [*_limits(found)]
    if problems:
        raise ConfigError(problems)
    _check_as_the_container_will(config, names, found, channels)
    return found


def as_text(value: Any) -> str:
    """What a person would type for `value`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _limits(found: Mapping[str, str]) -> list[str]:
    problems = []
    if len(found) > MOST:
        problems.append(
            _(
                "{count} settings are given, but a SageMaker job takes at most {most}. Leave out those at their default."
            ).format(count=len(found), most=MOST)
        )
    for name, value in found.items():
        if name in SECRET:
            problems.append(
                _(
                    "{name} is a secret, but hyper-parameters can be read by everybody in the AWS account. Leave it out."
                ).format(name=name)
            )
        if len(name) > LONGEST_NAME or len(value) > LONGEST_VALUE:
            problems.append(
                _("{name} has {length} characters, but a SageMaker job takes at most {most} for a setting.").format(
                    name=name, length=len(value), most=LONGEST_VALUE
                )
            )
        elif "\n" in value or "\r" in value:
            problems.append(_("{name} has a line break, which a SageMaker job does not take.").format(name=name))
    return problems


def _check_as_the_container_will(
    config: SubmitConfig, names: set[str], found: Mapping[str, str], channels: list[str]
) -> None:
    """Read the hyper-parameters as the job will. Raises ConfigError with what it would stop at."""
    folders = Folders.of_a_job(channels)
    settings = training_settings(found, folders)
    there = from_mapping(TrainConfig, settings, _("hyper-parameters"))
    changed = [
        _(
            "{name} is {value}, which a job would read as {other}: hyper-parameters are text. Give another value."
        ).format(name=name, value=repr(getattr(config, name)), other=repr(getattr(there, name)))
        for name in sorted(names - {"train_file", "validation_file", "dataset_dir", "model_name_or_path"})
        if getattr(there, name) != getattr(config, name)
    ]
    if changed:
        raise ConfigError(changed)
