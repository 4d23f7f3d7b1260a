"""`resonance sagemaker submit`: the request that is sent, and what is refused before anything is uploaded."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import regex  # patterns of AWS name classes of characters that `re` does not know

from resonance.cli import run
from resonance.config_io import from_mapping
from resonance.config_sagemaker import SubmitConfig
from resonance.errors import ConfigError
from resonance.launch import hyperparameters, request

BUCKET, REGION, ROLE = "voices", "us-east-1", "arn:aws:iam::123456789012:role/SageMakerTraining"
Flags = Callable[..., list[str]]


def keys_in(storage: Any) -> list[str]:
    found = storage.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return [item["Key"] for item in found if not item["Key"].startswith("anna/")]


def config(**values: object) -> SubmitConfig:
    given = {"data": f"s3://{BUCKET}/anna", "instance_type": "ml.g5.2xlarge", "role": ROLE, **values}
    return from_mapping(SubmitConfig, given)


class Service:
    """SageMaker's address on this machine: keeps requests, and answers as it was told."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.refusal: tuple[str, str] | None = None
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                action = self.headers["X-Amz-Target"].partition(".")[2]
                status, answer = service.answer(action, body)
                packed = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/x-amz-json-1.1")
                self.send_header("Content-Length", str(len(packed)))
                self.end_headers()
                self.wfile.write(packed)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def answer(self, action: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if action == "CreateTrainingJob":
            if self.refusal:
                return 400, {"__type": self.refusal[0], "message": self.refusal[1]}
            self.created.append(body)
            return 200, {"TrainingJobArn": f"arn:aws:sagemaker:{REGION}:123456789012:training-job/x"}
        if self.created:
            return 200, {**self.created[-1], "TrainingJobStatus": "InProgress", "SecondaryStatus": "Starting"}
        return 400, {"__type": "ValidationException", "message": "Requested resource not found."}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    found = Service()
    found.thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", f"http://127.0.0.1:{found.server.server_port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield found
    found.server.shutdown()
    found.server.server_close()
    found.thread.join()


def test_the_request_over_the_wire_is_the_one_that_dry_run_shows(
    cloud: Any, service: Service, submit_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("per_device_train_batch_size: 16\nlearning_rate: 1e-5\nwarmup_steps: 500\nuse_8bit: true\n")
    cloud.put_object(Bucket=BUCKET, Key="dev/labels.json", Body=b"[]")
    cloud.put_object(Bucket=BUCKET, Key="base/config.json", Body=b"{}")
    flags = submit_flags(
        *("--config", file, "--instance_type", "ml.p4d.24xlarge", "--instance_count", 2, "--spot", "--max_run", 7200),
        *("--json_file", "labels.json", "--max_steps", 1024, "--validation_data", f"s3://{BUCKET}/dev"),
        *(
            "--model_data",
            f"s3://{BUCKET}/base/",
            "--target_modules",
            "q_proj,v_proj",
            "--output",
            f"s3://{BUCKET}/out",
        ),
    )
    assert run([*flags, "--dry_run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert keys_in(cloud) == ["base/config.json", "dev/labels.json"] and service.created == []  # shown, not done

    assert run(flags) == 0
    (sent,) = service.created
    assert sent == shown
    assert sent["HyperParameters"] == {
        "json_file": "labels.json",
        "language": "en",
        "learning_rate": "1e-05",
        "max_steps": "1024",
        "model_name_or_path": "openai/whisper-small",
        "per_device_train_batch_size": "16",
        "quantization": "8bit",
        "target_modules": "q_proj,v_proj",
        "warmup_steps": "500.0",
    }
    channels = {
        c["ChannelName"]: (c["DataSource"]["S3DataSource"]["S3Uri"], c["InputMode"]) for c in sent["InputDataConfig"]
    }
    assert channels == {
        "train": (f"s3://{BUCKET}/anna/", "File"),
        "validation": (f"s3://{BUCKET}/dev/", "File"),
        "model": (f"s3://{BUCKET}/base/", "File"),
        "code": (f"s3://{BUCKET}/out/anna-1/source/", "File"),
    }
    assert sent["CheckpointConfig"] == {
        "S3Uri": f"s3://{BUCKET}/out/anna-1/checkpoints",
        "LocalPath": "/opt/ml/checkpoints",
    }
    assert sent["ResourceConfig"] == {"InstanceType": "ml.p4d.24xlarge", "InstanceCount": 2, "VolumeSizeInGB": 51}
    assert sent["EnableManagedSpotTraining"] is True
    assert sent["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 7200 + 86400}
    assert sent["RoleArn"] == ROLE and sent["TrainingJobName"] == "anna-1"
    assert re.fullmatch(
        r"\d+\.dkr\.ecr\.us-east-1\..*/pytorch-training:.*gpu.*", sent["AlgorithmSpecification"]["TrainingImage"]
    )
    assert keys_in(cloud) == ["base/config.json", "dev/labels.json", "out/anna-1/source/source.tar.gz"]
    said = capsys.readouterr().out
    assert "resonance sagemaker download anna-1" in said


def test_a_job_that_moto_runs_is_described_with_what_was_given(cloud: Any, jobs: Any, submit_flags: Flags) -> None:
    assert run(submit_flags("--checkpoints", f"s3://{BUCKET}/old/checkpoints", "--volume_size", 200)) == 0
    found = jobs.describe_training_job(TrainingJobName="anna-1")
    assert found["HyperParameters"] == {"language": "en", "model_name_or_path": "openai/whisper-small"}
    assert found["CheckpointConfig"]["S3Uri"] == f"s3://{BUCKET}/old/checkpoints"
    assert found["ResourceConfig"]["VolumeSizeInGB"] == 200
    assert found["OutputDataConfig"]["S3OutputPath"] == f"s3://{BUCKET}/resonance"
    assert keys_in(cloud) == ["resonance/anna-1/source/source.tar.gz"]


@pytest.mark.parametrize(
    ("size", "given", "mode", "disk"),
    [
        (10, "auto", "File", 60),
        (51, "auto", "FastFile", 50),
        (10, "FastFile", "FastFile", 50),
        (80, "File", "File", 130),
    ],
)
def test_recordings_are_copied_to_a_disk_that_is_large_enough_or_read_as_needed(
    size: int, given: str, mode: str, disk: int
) -> None:
    settings = config(input_mode=given)
    job = request.Job("x", ROLE, "image", f"s3://{BUCKET}/out", {}, {"train": size << 30})
    made = request.training_job(settings, job)
    train, code = made["InputDataConfig"]
    assert (train["InputMode"], code["InputMode"]) == (mode, "File")
    assert made["ResourceConfig"]["VolumeSizeInGB"] == disk


def test_what_is_copied_is_counted_to_the_end_and_what_is_not_only_as_far_as_needed(cloud: Any) -> None:
    from resonance.launch import aws

    for i in range(1005):  # S3 lists a thousand at a time
        cloud.put_object(Bucket=BUCKET, Key=f"many/{i:04}.wav", Body=b"12")
    folder = aws.Folder.of(f"s3://{BUCKET}/many")
    assert aws.look(cloud, folder, None) == aws.Listing(1005, 2010, has_dataset=False)
    assert aws.look(cloud, folder, 5000) == aws.Listing(1005, 2010, has_dataset=False)
    assert aws.look(cloud, folder, 10) == aws.Listing(1000, 2000, has_dataset=False)
    cloud.put_object(Bucket=BUCKET, Key="many/train/dataset_info.json", Body=b"{}")
    assert aws.look(cloud, folder, None).has_dataset


def test_a_model_is_copied_even_where_recordings_are_not_and_needs_room() -> None:
    settings = config(input_mode="FastFile", model_data=f"s3://{BUCKET}/base")
    job = request.Job("x", ROLE, "image", f"s3://{BUCKET}/out", {}, {"train": 900 << 30, "model": 6 << 30})
    made = request.training_job(settings, job)
    assert {c["ChannelName"]: c["InputMode"] for c in made["InputDataConfig"]} == {
        "train": "FastFile",
        "model": "File",
        "code": "File",
    }
    assert made["ResourceConfig"]["VolumeSizeInGB"] == 56
    small = config(input_mode="File", model_data=f"s3://{BUCKET}/base", volume_size=200)
    with pytest.raises(ConfigError, match="volume_size 200 GB has no room for 906 GB"):
        request.training_job(small, job)


def test_requests_and_limits_are_those_of_the_service_model() -> None:
    session = pytest.importorskip("botocore.session", reason="needs boto3").get_session()
    model = session.get_service_model("sagemaker")
    assert model.shape_for("HyperParameters").metadata["max"] == hyperparameters.MOST
    assert model.shape_for("HyperParameterKey").metadata["max"] == hyperparameters.LONGEST_NAME
    assert model.shape_for("HyperParameterValue").metadata["max"] == hyperparameters.LONGEST_VALUE

    settings = config(spot=True, use_wandb=True, validation_data=f"s3://{BUCKET}/dev", model_data=f"s3://{BUCKET}/base")
    job = request.Job("x", ROLE, "image", f"s3://{BUCKET}/out", {"a": "b"}, {"train": 1, "validation": 1, "model": 1})
    checked: list[str] = []

    def check(shape: Any, value: Any) -> None:
        """botocore itself leaves lengths, patterns and choices to the service."""
        if shape.type_name == "structure":
            assert set(shape.required_members) <= set(value) <= set(shape.members)
            for name, part in value.items():
                check(shape.members[name], part)
        elif shape.type_name == "list":
            assert len(value) <= shape.metadata.get("max", len(value))
            for part in value:
                check(shape.member, part)
        elif shape.type_name == "map":
            for name, part in value.items():
                check(shape.key, name)
                check(shape.value, part)
        elif shape.type_name == "string":
            assert shape.metadata.get("min", 0) <= len(value) <= shape.metadata.get("max", len(value)), (shape, value)
            assert regex.fullmatch(shape.metadata.get("pattern", ".*"), value), (shape, value)
            assert not shape.metadata.get("enum") or value in shape.enum
            checked.append(shape.name)

    check(model.shape_for("CreateTrainingJobRequest"), request.training_job(settings, job))
    assert {"RoleArn", "TrainingContainerEntrypointString", "MetricRegex", "ChannelName", "S3Uri"} <= set(checked)


def test_every_given_setting_is_a_hyperparameter_and_is_read_back_as_what_it_was() -> None:
    given = {
        "fp16": "true",
        "max_steps": "-1",
        "num_train_epochs": "3",
        "save_total_limit": "none",
        "output_dir": "x",
        "lr_scheduler_kwargs": '{"num_cycles": 2}',
        "adam_beta2": "0.98",
        "target_modules": "all-linear",
    }
    found = hyperparameters.from_config(config(**given), ["train"])
    assert found["precision"] == "fp16" and found["max_steps"] == "none" and found["save_total_limit"] == "none"
    assert json.loads(found["lr_scheduler_kwargs"]) == {"num_cycles": 2} and found["adam_beta2"] == "0.98"
    assert not {"output_dir", "data", "instance_type", "role"} & found.keys()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"run_name": "x" * 2501}, "run_name has 2501 characters"),
        ({"run_name": "two\nlines"}, "line break"),
        ({"wandb_project": "x"}, "use_wandb is not"),
        ({"max_wait": 90000}, "spot is not given"),
        ({"max_wait": 60, "spot": True}, "less than max_run"),
        ({"model_name_or_path": "./my-model"}, "model_data"),
        ({"data": "voices/anna"}, "s3://my-bucket/recordings"),
        ({"role": "SageMakerRole"}, "ARN of a role"),
        ({"name": "anna_1"}, "letters, digits and hyphens"),
        ({"learn_rate": "1"}, "learn_rate is not a setting"),
        ({"hub_token": "hf_x"}, "hub_token is a secret"),
    ],
)
def test_settings_that_no_job_can_have_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hyperparameters.from_config(config(**values), ["train"])
    assert said in str(caught.value)


def test_more_settings_than_a_job_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyperparameters, "MOST", 3)
    with pytest.raises(ConfigError, match="4 settings are given, but a SageMaker job takes at most 3"):
        hyperparameters.from_config(config(language="en", max_steps=5, lora_r=8, seed=1), ["train"])


def without_keys(monkeypatch: pytest.MonkeyPatch, cloud: Any) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


def without_region(monkeypatch: pytest.MonkeyPatch, cloud: Any) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")


def with_unknown_profile(monkeypatch: pytest.MonkeyPatch, cloud: Any) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")


def offline(monkeypatch: pytest.MonkeyPatch, cloud: Any) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


def with_a_job_of_that_name(monkeypatch: pytest.MonkeyPatch, cloud: Any) -> None:
    flags = ["--data", f"s3://{BUCKET}/anna", "--instance_type", "ml.g5.2xlarge", "--role", ROLE, "--name", "anna-1"]
    assert run(["sagemaker", "submit", *flags]) == 0
    cloud.delete_object(Bucket=BUCKET, Key="resonance/anna-1/source/source.tar.gz")


def nothing_else(monkeypatch: pytest.MonkeyPatch, cloud: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("before", "flags", "code", "said"),
    [
        (without_keys, [], 1, "No AWS credentials were found. Run `aws configure`"),
        (without_region, [], 1, "No AWS region is set. Give --region"),
        (with_unknown_profile, [], 1, "Correct AWS_PROFILE"),
        (offline, [], 1, "AWS cannot be reached"),
        (with_a_job_of_that_name, [], 1, "There is a job named anna-1 already. Give another --name."),
        (nothing_else, ["--data", "s3://no-such-bucket-here/x"], 1, "no such bucket"),
        (nothing_else, ["--data", f"s3://{BUCKET}/nobody"], 1, "is empty. Copy the recordings there first"),
        (nothing_else, ["--output", "s3://no-such-bucket-here/x"], 1, "no such bucket"),
        (nothing_else, ["--json_file", "list.json"], 1, "json_file is list.json, but s3://voices/anna holds nothing"),
        (nothing_else, ["--train_file", "lists/train.json"], 1, "train_file is lists/train.json"),
        (nothing_else, ["--instance_type", "ml.p4d.24xlage"], 1, "Did you mean ml.p4d.24xlarge"),
        (nothing_else, ["--instance_type", "nonsense"], 1, "An example is ml.g5.2xlarge"),
        (nothing_else, ["--lora_r", "x", "--learn_rate", "1"], 2, "learn_rate is not a setting"),
        (
            nothing_else,
            ["--data", f"s3://{BUCKET}"],
            2,
            "results would go to s3://voices/resonance, inside s3://voices,",
        ),
        (nothing_else, ["--output", f"s3://{BUCKET}/anna/out"], 2, "inside s3://voices/anna,"),
        (nothing_else, ["--eval_steps", "100", "--max_steps", "10"], 2, "nothing would ever be measured"),
    ],
)
def test_what_cannot_work_is_told_in_a_paragraph_before_anything_is_uploaded(
    before: Callable[[pytest.MonkeyPatch, Any], None],
    flags: list[str],
    code: int,
    said: str,
    cloud: Any,
    submit_flags: Flags,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        before(patch, cloud)
        capsys.readouterr()
        assert run(submit_flags(*flags)) == code
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and said in err and "Traceback" not in err
    assert keys_in(cloud) == []


def test_without_a_role_outside_aws_it_says_what_a_role_is(
    cloud: Any, submit_flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = submit_flags()
    del flags[flags.index("--role") : flags.index("--role") + 2]
    assert run(flags) == 2
    assert "--role is needed: the ARN of the IAM role" in capsys.readouterr().err
    assert keys_in(cloud) == []


@pytest.mark.parametrize("known", [False, True], ids=["unknown keys", "keys without permission"])
def test_keys_that_aws_does_not_take(
    known: bool, cloud: Any, submit_flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import boto3
    from moto.core import set_initial_no_auth_action_count

    identity = boto3.client("iam")
    identity.create_user(UserName="anna")
    key = identity.create_access_key(UserName="anna")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"] if known else "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    assert set_initial_no_auth_action_count(0)(run)(submit_flags()) == 1
    said = capsys.readouterr().err
    assert ("no permission" if known else "AWS does not accept the credentials") in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("code", "message", "said"),
    [
        (
            "ResourceLimitExceeded",
            "The account-level service limit 'ml.p4d.24xlarge for training job usage' is 0 Instances.",
            "Ask for more at Service Quotas",
        ),
        ("ResourceInUse", "Training job names must be unique within an AWS account and region", "Give another --name."),
        ("AccessDeniedException", "User is not authorized to perform: sagemaker:CreateTrainingJob", "no permission"),
        ("ValidationException", f"Could not assume role {ROLE}.", "let sagemaker.amazonaws.com assume it"),
        ("ValidationException", "1 validation error detected: MaxWait", "AWS refused it. ValidationException"),
        ("ThrottlingException", "Rate exceeded", "Try again in some minutes"),
        ("ExpiredTokenException", "The security token included in the request is expired", "`aws sso login` again"),
    ],
)
def test_what_the_service_refuses_is_told_with_the_way_out(
    code: str,
    message: str,
    said: str,
    cloud: Any,
    service: Service,
    submit_flags: Flags,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service.refusal = (code, message)
    assert run(submit_flags()) == 1
    err = capsys.readouterr().err
    assert message in err and said in err and err.count("\n") == 1 and "Traceback" not in err


def test_without_the_packages_it_says_how_to_install_them(
    submit_flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "boto3" else real(name))
    assert run(submit_flags()) == 1
    assert 'pip install "resonance-asr[sagemaker]"' in capsys.readouterr().err
