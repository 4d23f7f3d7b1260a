"""A SageMaker container's folders on this disk, and AWS as moto plays it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REGION = "us-east-1"
ROLE = "arn:aws:iam::123456789012:role/SageMakerTraining"
BUCKET = "voices"


@dataclass(frozen=True)
class Container:
    """What stands for /opt/ml."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """Every variable that a container sets, redirected."""
        channels = {f"SM_CHANNEL_{p.name.upper()}": str(p) for p in (self.root / "input/data").iterdir()}
        return {
            **os.environ,
            **channels,
            "SM_INPUT_CONFIG_DIR": str(self.root / "input/config"),
            "SM_INPUT_DATA_DIR": str(self.root / "input/data"),
            "SM_MODEL_DIR": str(self.root / "model"),
            "SM_OUTPUT_DIR": str(self.root / "output"),
            "SM_OUTPUT_DATA_DIR": str(self.root / "output/data"),
            "SM_CHECKPOINT_DIR": str(self.root / "checkpoints"),
            "SM_NUM_GPUS": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def write_hyperparameters(self, **values: object) -> None:
        path = self.root / "input/config/hyperparameters.json"
        path.write_text(json.dumps({name: str(value) for name, value in values.items()}), encoding="utf-8")

    @property
    def failure(self) -> str:
        path = self.root / "output/failure"
        return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.fixture
def container(tmp_path: Path, recordings: Callable[..., Path]) -> Container:
    """A container with twelve recordings in its channel train."""
    root = tmp_path / "opt ml"
    for name in ("input/config", "input/data", "model", "output/data", "checkpoints"):
        (root / name).mkdir(parents=True)
    labels = recordings()
    labels.parent.rename(root / "input/data/train")
    resources = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"}
    (root / "input/config/resourceconfig.json").write_text(json.dumps(resources), encoding="utf-8")
    return Container(root)


@pytest.fixture
def inside(container: Container, monkeypatch: pytest.MonkeyPatch) -> Container:
    """The container as this process's own."""
    for name, value in container.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RESONANCE_LANG", "en")  # set for good by a training in a container
    return container


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made-up credentials, and no settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("SAGEMAKER_USER_CONFIG_OVERRIDE", str(tmp_path / "no defaults.yaml"))
    monkeypatch.setenv("SAGEMAKER_ADMIN_CONFIG_OVERRIDE", str(tmp_path / "no defaults.yaml"))


@pytest.fixture
def cloud(keys: None, aws_descriptions: None) -> Iterator[Any]:
    """AWS as moto plays it, with the bucket `voices`, which holds three recordings in `anna/`. Gives the S3 client."""
    pytest.importorskip("sagemaker.core", reason="needs sagemaker-core: pip install 'resonance-asr[sagemaker]'")
    moto = pytest.importorskip("moto", reason="needs moto: pip install 'moto[s3]'")
    import boto3
    from sagemaker.core.utils import utils

    with moto.mock_aws():
        utils.SageMakerClient.reset()
        storage = boto3.client("s3", region_name=REGION)
        storage.create_bucket(Bucket=BUCKET)
        for i in range(3):
            storage.put_object(Bucket=BUCKET, Key=f"anna/audio/{i}.wav", Body=bytes(1000))
        rows = [{"audio": f"audio/{i}.wav", "text": f"phrase {i}"} for i in range(3)]
        storage.put_object(Bucket=BUCKET, Key="anna/labels.json", Body=json.dumps(rows).encode())
        yield storage
    utils.SageMakerClient.reset()


@pytest.fixture
def jobs(cloud: Any) -> Any:
    """The client that knows the jobs."""
    import boto3

    return boto3.client("sagemaker", region_name=REGION)


@pytest.fixture
def submit_flags() -> Callable[..., list[str]]:
    """A function that gives a `resonance sagemaker submit` that is right. Flags in its arguments win."""
    return lambda *more: [
        *("sagemaker", "submit", "--data", f"s3://{BUCKET}/anna", "--instance_type", "ml.g5.2xlarge", "--role", ROLE),
        *("--model_name_or_path", "openai/whisper-small", "--language", "en", "--name", "anna-1"),
        *map(str, more),
    ]
