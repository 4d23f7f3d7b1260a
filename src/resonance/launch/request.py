"""The request that starts a job, as CreateTrainingJob takes it. Nothing here talks to AWS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from resonance.config_sagemaker import SubmitConfig
from resonance.errors import ConfigError
from resonance.launch import metrics
from resonance.messages import _
from resonance.units import GIBIBYTE

CODE = "/opt/ml/code"
# Unpacked to a disk, because channels may be read-only. exec, so that SIGTERM reaches the training.
START = f"mkdir -p {CODE} && tar -xzf /opt/ml/input/data/code/source.tar.gz -C {CODE} && exec bash {CODE}/sagemaker_torchrun.sh"
COPIED_UP_TO = 50 * GIBIBYTE  # AWS advises to copy data sets of less than 50 to 100 GB
SPARE_DISK = 50  # GB for the model, its checkpoints and packages
SPARE_WAIT = 24 * 3600  # seconds
RETRIES = 3  # after a fault of SageMaker's own


@dataclass(frozen=True, slots=True)
class Job:
    """What a request needs besides the settings."""

    name: str
    role: str
    image: str
    output: str  # S3 folder of all jobs
    hyperparameters: dict[str, str]
    channel_bytes: dict[str, int]

    @property
    def folder(self) -> str:
        return f"{self.output}/{self.name}"

    @property
    def source(self) -> str:
        return f"{self.folder}/source"


def channels(config: SubmitConfig) -> dict[str, str]:
    """S3 folder by channel."""
    given = {"train": config.data, "validation": config.validation_data, "model": config.model_data}
    return {name: uri for name, uri in given.items() if uri}


def training_job(config: SubmitConfig, job: Job) -> dict[str, Any]:
    """The whole request. Raises ConfigError where the disk that was asked for is too small."""
    modes = _input_modes(config, job)
    copied = sum(size for name, size in job.channel_bytes.items() if modes[name] == "File")
    needed = -(-copied // GIBIBYTE)
    if config.volume_size and config.volume_size <= needed:
        raise ConfigError(
            [
                _(
                    "volume_size {size} GB has no room for {needed} GB that are copied from S3. Leave it out, or give more."
                ).format(size=config.volume_size, needed=needed)
            ]
        )
    stop = {"MaxRuntimeInSeconds": config.max_run}
    if config.spot:
        stop["MaxWaitTimeInSeconds"] = config.max_wait or config.max_run + SPARE_WAIT
    request: dict[str, Any] = {
        "TrainingJobName": job.name,
        "RoleArn": job.role,
        "HyperParameters": job.hyperparameters,
        "AlgorithmSpecification": {
            "TrainingImage": job.image,
            "TrainingInputMode": modes["train"],
            "ContainerEntrypoint": ["/bin/bash", "-c", START],
            "MetricDefinitions": metrics.definitions(),
        },
        "InputDataConfig": [
            *(_channel(name, uri, modes[name]) for name, uri in channels(config).items()),
            _channel("code", job.source, "File"),
        ],
        "OutputDataConfig": {"S3OutputPath": job.output},
        "CheckpointConfig": {
            "S3Uri": config.checkpoints or f"{job.folder}/checkpoints",
            "LocalPath": "/opt/ml/checkpoints",
        },
        "ResourceConfig": {
            "InstanceType": config.instance_type,
            "InstanceCount": config.instance_count,
            "VolumeSizeInGB": config.volume_size or needed + SPARE_DISK,
        },
        "StoppingCondition": stop,
        "EnableManagedSpotTraining": config.spot,
        "RetryStrategy": {"MaximumRetryAttempts": RETRIES},
        "Tags": [{"Key": "resonance", "Value": "training"}],
    }
    if config.use_wandb:
        # No key leaves this machine: the run is kept in output.tar.gz, for `wandb sync`.
        request["Environment"] = {"WANDB_MODE": "offline", "WANDB_DIR": "/opt/ml/output/data"}
    return request


def _input_modes(config: SubmitConfig, job: Job) -> dict[str, str]:
    """How each channel is brought to the machine. A model is read whole, once: it is always copied."""
    recordings = sum(size for name, size in job.channel_bytes.items() if name != "model")
    mode: str = config.input_mode
    if mode == "auto":
        mode = "File" if recordings <= COPIED_UP_TO else "FastFile"
    return {name: "File" if name == "model" else mode for name in channels(config)}


def _channel(name: str, uri: str, mode: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": f"{uri}/", "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": mode}
