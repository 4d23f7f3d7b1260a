"""Jobs on Amazon SageMaker: start one, ask about it, read its log, fetch what it made.

Of the SageMaker Python SDK v3 only sagemaker-core is used. ModelTrainer, in sagemaker-train, names jobs itself, uploads
before it has a request to show, creates a bucket, reports its use to AWS and needs 500 MB more of packages.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import signal
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resonance.config_sagemaker import SubmitConfig
from resonance.errors import CloudError, ConfigError, Interrupted
from resonance.launch import aws, hyperparameters, request, source
from resonance.launch.logs import GROUP, JobLog
from resonance.messages import _
from resonance.model.adapters import INFO_FILE, read_info

PYTORCH = {"version": "2.8", "py_version": "py312"}  # of AWS' image
ENDED = ("Completed", "Failed", "Stopped")
POLL_SECONDS = 10.0
Say = Callable[[str], None]


def submit(config: SubmitConfig, say: Say = print) -> str:
    """Start the job, or only show its request where `dry_run` says so. Returns the job's name.

    Raises ConfigError and CloudError; everything that can be wrong is looked for before anything is uploaded.
    """
    channels = request.channels(config)
    settings = hyperparameters.from_config(config, [*channels])
    output = aws.Folder.of(config.output or f"s3://{aws.Folder.of(config.data).bucket}/resonance")
    _check_apart(output, channels)
    session = aws.session(config.region)
    client, storage = session.client("sagemaker"), session.client("s3")
    aws.check_instance_type(client, config.instance_type)
    # What is copied needs room on the disk; of the rest it is enough to know that it is too much to copy.
    enough = None if config.input_mode == "File" else request.COPIED_UP_TO
    listings = {name: aws.look(storage, aws.Folder.of(uri), enough) for name, uri in channels.items()}
    _check_files(config, storage)
    name = config.name or f"resonance-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"[:-3]
    if config.name:
        _check_free(client, name)
    with aws.explained(str(output)):
        storage.head_bucket(Bucket=output.bucket)
    job = request.Job(
        name=name,
        role=config.role or _own_role(session),
        image=config.image or _image(session.region_name, config.instance_type),
        output=str(output),
        hyperparameters=settings,
        channel_bytes={name: found.bytes for name, found in listings.items()},
    )
    wanted = request.training_job(config, job)
    if config.dry_run:
        say(json.dumps(wanted, indent=2, ensure_ascii=False))
        return name
    packed = source.archive(_extras(config, listings.values()), config.model_name_or_path)
    place = aws.Folder.of(job.source)
    with aws.explained(str(place)):
        storage.put_object(Bucket=place.bucket, Key=f"{place.prefix}source.tar.gz", Body=packed)
    _create(session, wanted)
    return name


def _check_files(config: SubmitConfig, storage: Any) -> None:
    train = aws.Folder.of(config.data)
    validation = aws.Folder.of(config.validation_data or config.data)
    for setting, folder in (("dataset_dir", train), ("train_file", train), ("validation_file", validation)):
        path = getattr(config, setting)
        if path is not None and not path.is_absolute() and path != Path():
            aws.check_file(storage, folder, path.as_posix(), setting)
    if config.json_file and (config.dataset_dir is None or not config.dataset_dir.is_absolute()):
        name = (config.dataset_dir or Path()) / config.json_file
        aws.check_file(storage, train, name.as_posix(), "json_file")


def _check_apart(output: aws.Folder, channels: dict[str, str]) -> None:
    """Raise ConfigError where results would become input of the next job."""
    for folder in map(aws.Folder.of, channels.values()):
        if output.bucket == folder.bucket and output.prefix.startswith(folder.prefix):
            raise ConfigError(
                [
                    _(
                        "The results would go to {output}, inside {folder}, and be taken for recordings by the next job. Give "
                        "another --output, or keep the recordings in a folder of their own."
                    ).format(output=output, folder=folder)
                ]
            )


def _check_free(client: Any, name: str) -> None:
    """Raise CloudError where a job has that name already: names are never free again, also those of ended jobs."""
    from botocore.exceptions import ClientError

    with aws.explained(name):
        try:
            client.describe_training_job(TrainingJobName=name)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("ValidationException", "ValidationError", "ResourceNotFound"):
                return
            raise
    raise CloudError(_("There is a job named {name} already. Give another --name.").format(name=name))


def _own_role(session: Any) -> str:
    """The role that this runs as, in a notebook or a machine of AWS. Raises ConfigError anywhere else."""
    from sagemaker.core.helper.session_helper import Session, get_execution_role

    with aws.explained(_("the role of this session")):
        try:
            return str(get_execution_role(Session(boto_session=session)))
        except ValueError as error:
            raise ConfigError(
                [
                    _(
                        "--role is needed: the ARN of the IAM role that the job works as. Outside AWS there is none to take "
                        "({reason}). The guide to SageMaker says how to make one."
                    ).format(reason=error)
                ]
            ) from None


def _image(region: str, instance_type: str) -> str:
    from sagemaker.core import image_uris

    try:
        return str(
            image_uris.retrieve("pytorch", region, instance_type=instance_type, image_scope="training", **PYTORCH)
        )
    except ValueError as error:
        raise CloudError(
            _("AWS has no PyTorch image for {type} in {region} ({reason}). Give one with --image.").format(
                type=instance_type, region=region, reason=str(error).splitlines()[0]
            )
        ) from None


def _extras(config: SubmitConfig, listings: Any) -> list[str]:
    """Optional packages that the settings or the recordings ask for."""
    needed = {
        "quant": config.quantization != "none" or "bnb" in config.optim or "8bit" in config.optim,
        "wandb": config.use_wandb,
        "datasets": any(found.has_dataset for found in listings),
    }
    return [name for name, wanted in needed.items() if wanted]


def _create(session: Any, wanted: dict[str, Any]) -> None:
    from pydantic import ValidationError
    from sagemaker.core.resources import TrainingJob
    from sagemaker.core.utils.code_injection.codec import transform

    with aws.explained(wanted["TrainingJobName"]):
        try:
            TrainingJob.create(
                **transform(wanted, "CreateTrainingJobRequest"), session=session, region=session.region_name
            )
        except ValidationError as error:
            raise CloudError(
                _("The request does not fit this sagemaker-core: {reason}").format(reason=str(error).splitlines()[0])
            ) from error


def find(name: str, region: str | None = None) -> Any:
    """The job (a sagemaker.core TrainingJob). Raises CloudError where there is none of that name."""
    from botocore.exceptions import ClientError

    session = aws.session(region)
    from sagemaker.core.resources import TrainingJob

    with aws.explained(name):
        try:
            return TrainingJob.get(training_job_name=name, session=session, region=session.region_name)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("ValidationException", "ValidationError", "ResourceNotFound"):
                raise
    raise CloudError(
        _("There is no job named {name} in {region}. Check the name, --region and the account.").format(
            name=name, region=session.region_name
        )
    )


def describe(job: Any) -> Iterator[str]:
    """What there is to say about a job, a line each."""
    yield _("{name}: {status} ({phase})").format(
        name=job.training_job_name, status=job.training_job_status, phase=job.secondary_status or "-"
    )
    yield _("machines: {count} x {type}{spot}").format(
        count=job.resource_config.instance_count,
        type=job.resource_config.instance_type,
        spot=", spot" if job.enable_managed_spot_training else "",
    )
    if job.training_time_in_seconds:
        yield _("trained: {minutes:.1f} min, paid: {paid:.1f} min").format(
            minutes=job.training_time_in_seconds / 60,
            paid=(job.billable_time_in_seconds or job.training_time_in_seconds) / 60,
        )
    for metric in job.final_metric_data_list or []:
        yield f"{metric.metric_name}: {metric.value:g}"
    if job.training_job_status == "Completed":
        yield _("result: {uri}").format(uri=job.model_artifacts.s3_model_artifacts)
    if job.failure_reason:
        yield _("reason: {reason}").format(reason=job.failure_reason)


def show_log(job: Any, region: str | None, *, follow: bool, say: Say = print) -> str:
    """Print the job's log, until it has ended where `follow` says so. Returns the job's status."""
    several = job.resource_config.instance_count > 1
    log = JobLog(aws.session(region).client("logs"), job.training_job_name)
    phase = None
    while True:
        with aws.explained(GROUP):
            ended = job.training_job_status in ENDED  # asked before the log is read to its end
            if follow and job.secondary_status != phase:
                phase = job.secondary_status
                say(_("-- {name}: {phase}").format(name=job.training_job_name, phase=phase))
            for machine, line in log.new_lines():
                say(f"[{machine}] {line}" if several else line)
            if ended or not follow:
                return str(job.training_job_status)
            time.sleep(POLL_SECONDS)
            job.refresh()


def wait(name: str, region: str | None, say: Say = print) -> int:
    """Show the log until the job has ended. Returns 0 where it is complete. Ctrl-C leaves the job running."""
    try:
        status = show_log(job := find(name, region), region, follow=True, say=say)
    except KeyboardInterrupt:
        text = _("The job goes on. See it again with: resonance sagemaker logs {name} --follow").format(name=name)
        raise Interrupted(text, signal.SIGINT) from None
    if status != "Completed":
        raise CloudError("\n".join(describe(job)))
    return 0


def download(name: str, output_dir: Path, region: str | None = None) -> Path:
    """Fetch the result of a job and return its folder: `output_dir`/adapter, or /model, with the log of the run beside it.

    Raises CloudError where the job has no result (yet) or its archive is not one of ours. Nothing of an incomplete download
    is left, and nothing that is there is overwritten.
    """
    job = find(name, region)
    status = job.training_job_status
    if status not in ENDED:
        raise CloudError(_("{name} is still at work ({status}). Wait for it.").format(name=name, status=status))
    if status == "Failed" or not job.model_artifacts:
        raise CloudError(
            _("{name} has no result: {status}. {reason}")
            .format(name=name, status=status, reason=job.failure_reason or "")
            .rstrip()
        )
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise CloudError(_("{path} is there already. Choose another folder.").format(path=output_dir))
    storage = aws.session(region).client("s3")
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}.", dir=output_dir.parent) as part:
            whole = Path(part) / "run"
            kind = _fetch_run(storage, job, whole)
            if output_dir.exists():
                output_dir.rmdir()
            whole.rename(output_dir)
    except OSError as error:
        raise CloudError(
            _("{path}: cannot be written ({reason}). Choose another folder or free some space.").format(
                path=output_dir, reason=error.strerror or error
            )
        ) from error
    return output_dir / kind


def _fetch_run(storage: Any, job: Any, target: Path) -> str:
    """Both archives of a job in `target`. Returns the name of the result's folder there."""
    uri, _slash, file = job.model_artifacts.s3_model_artifacts.rpartition("/")
    folder, result = aws.Folder.of(uri), target.with_name("result")
    target.mkdir()
    _fetch(storage, folder, file, result)
    if not (result / INFO_FILE).is_file():
        raise CloudError(
            _("{name} ended without a result ({status}). Its checkpoints continue with --checkpoints.").format(
                name=job.training_job_name, status=job.training_job_status
            )
        )
    kind = "adapter" if read_info(result).kind == "lora" else "model"
    with contextlib.suppress(_Absent):
        _fetch(storage, folder, "output.tar.gz", target)
    if (target / kind).exists():
        raise CloudError(_("{file} holds what no training writes: {name}").format(file="output.tar.gz", name=kind))
    result.rename(target / kind)
    return kind


class _Absent(CloudError):  # noqa: N818 - says what is so; whether that is a fault depends on the archive
    """An archive that the job did not write."""


def _fetch(storage: Any, folder: aws.Folder, name: str, target: Path) -> None:
    """Download an archive and unpack it into `target`; whatever would lie outside is refused."""
    from botocore.exceptions import ClientError

    uri = f"{folder}/{name}"
    with tempfile.TemporaryFile(dir=target.parent) as stream, aws.explained(uri):
        try:
            storage.download_fileobj(folder.bucket, f"{folder.prefix}{name}", stream)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("404", "NoSuchKey"):
                raise
            raise _Absent(
                _("{uri} is not there: the job wrote no result, or it was deleted.").format(uri=uri)
            ) from None
        stream.seek(0)
        try:
            with tarfile.open(fileobj=stream, mode="r:gz") as tar:
                tar.extractall(target, filter="data")
        except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            shutil.rmtree(target, ignore_errors=True)
            raise CloudError(
                _("{uri} cannot be unpacked: {reason}. Nothing was kept.").format(uri=uri, reason=error)
            ) from error
