"""Every setting of `resonance sagemaker submit` beside those of `resonance train`, which it takes too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from resonance.config import TrainConfig
from resonance.config_checks import Problem, train_problems
from resonance.config_types import AnyPath, Count, Switch, disagreement
from resonance.messages import _


def _s3_folder(text: str) -> str:
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9](/.*)?", text):
        raise ValueError(_("It must be a folder in S3, such as s3://my-bucket/recordings."))
    return text.rstrip("/")


def _role(text: str) -> str:
    if not re.fullmatch(r"arn:aws[a-z\-]*:iam::\d{12}:role/[\w+=,.@/\-]+", text):
        raise ValueError(_("It must be the ARN of a role, such as arn:aws:iam::123456789012:role/SageMakerTraining."))
    return text


def _job_name(text: str) -> str:
    if not re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", text):
        raise ValueError(_("It must be at most 63 letters, digits and hyphens, with a letter or digit at both ends."))
    return text


S3Folder = Annotated[str, AfterValidator(_s3_folder)]
Role = Annotated[str, AfterValidator(_role)]
JobName = Annotated[str, AfterValidator(_job_name)]


class SubmitConfig(TrainConfig):
    """Train on Amazon SageMaker: recordings in S3, rented machines, the result back in S3.

    Takes every setting of `resonance train`. Those that are given become the job's hyper-parameters; paths among them are
    taken from the folder that data names.
    """

    groups: ClassVar[dict[str, str]] = TrainConfig.groups | {"data": "SageMaker"}
    aliases: ClassVar[dict[str, str | Switch]] = TrainConfig.aliases | {
        "use_spot_instances": "spot",
        "image_uri": "image",
        "job_name": "name",
    }

    output_dir: AnyPath = Path("run")
    """Has no effect on SageMaker, where output says what becomes of the result."""

    data: S3Folder
    """Folder in S3 with the recordings and the file that lists them; the job sees it as the channel train."""
    validation_data: S3Folder | None = None
    """Folder in S3 with the validation data. Left out, validation_split takes a part of the recordings."""
    model_data: S3Folder | None = None
    """Folder in S3 with the model to start from, in place of one from the Hugging Face hub."""
    output: S3Folder | None = None
    """Folder in S3 for results and checkpoints. Left out, resonance in the bucket of data."""
    checkpoints: S3Folder | None = None
    """Folder in S3 for the checkpoints; that of an earlier job continues it. Left out, one for this job inside output."""
    input_mode: Literal["auto", "File", "FastFile"] = "auto"
    """Copy the recordings to the machine first (File) or read them from S3 as they are needed (FastFile). auto copies up
    to 50 GB: small files are read many times, and faster from a disk."""
    instance_type: str = Field(min_length=1)
    """Kind of machine, such as ml.g5.2xlarge or ml.p4d.24xlarge."""
    instance_count: Count = 1
    """How many machines train together."""
    volume_size: Count | None = None
    """Size of each machine's disk in GB. Left out, 50 more than the recordings take."""
    spot: bool = False
    """Use spot machines: spare ones that cost less and may be taken away; the job then waits and goes on from its
    checkpoint."""
    max_run: Count = 24 * 3600
    """Longest time of training, in seconds; the job is stopped then."""
    max_wait: Count | None = None
    """Longest time of training and waiting for spot machines together, in seconds. Left out, a day more than max_run."""
    role: Role | None = None
    """ARN of the IAM role that the job works as. Left out, the role of the SageMaker notebook that this runs in."""
    image: str | None = Field(None, min_length=1)
    """Container image with PyTorch. Left out, the one of AWS for the kind of machine."""
    name: JobName | None = None
    """Name of the job. Left out, resonance and the time."""
    region: str | None = Field(None, min_length=1)
    """AWS region. Left out, the one of your AWS settings; recordings and job must be in the same one."""
    wait: bool = False
    """Show the log until the job has ended."""
    dry_run: bool = False
    """Check everything and print the request, but upload and start nothing."""

    @model_validator(mode="after")
    def _agree(self) -> SubmitConfig:
        problems: list[Problem] = list(train_problems(self, needs_source=False))
        if self.max_wait is not None and not self.spot:
            problems.append(
                (
                    ("max_wait", "spot"),
                    _("max_wait is for spot machines, but spot is not given. Keep both or neither."),
                )
            )
        if self.max_wait is not None and self.max_wait < self.max_run:
            text = _("max_wait {wait} is less than max_run {run}, which it includes. Give at least as much.")
            problems.append((("max_wait", "max_run"), text.format(wait=self.max_wait, run=self.max_run)))
        if self.model_data is None and self._is_a_path_here():
            text = _(
                "model_name_or_path {model} is a folder of this machine, which the job does not see. Copy it to S3 and give "
                "that folder as model_data, or give the name of a model on the hub."
            )
            problems.append((("model_name_or_path",), text.format(model=self.model_name_or_path)))
        if problems:
            raise disagreement(problems)
        return self

    def _is_a_path_here(self) -> bool:
        name = self.model_name_or_path
        if name.startswith("/opt/ml/"):  # in the container
            return False
        return name.startswith(("/", "./", "../")) or Path(name).is_dir()
