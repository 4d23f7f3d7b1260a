"""The notebook runs from top to bottom. What SageMaker would do between two of its cells is done here, in a container's folders."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from resonance.model.adapters import read_info

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "whisper_finetuning_on_sagemaker.ipynb"


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_the_job(job: dict[str, Any], storage: Any, container: Any) -> None:
    """Do what the request says: bring the channels, start the entry point, take model.tar.gz away."""
    root: Path = container.root
    for channel in job["InputDataConfig"]:
        bucket, _slash, prefix = channel["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://").partition("/")
        for page in storage.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page["Contents"]:
                target = root / "input/data" / channel["ChannelName"] / item["Key"].removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(storage.get_object(Bucket=bucket, Key=item["Key"])["Body"].read())
    container.write_hyperparameters(**job["HyperParameters"])
    *shell, start = job["AlgorithmSpecification"]["ContainerEntrypoint"]
    done = subprocess.run(
        [*shell, start.replace("/opt/ml", '"$ROOT"')],
        env={**container.environment, "ROOT": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(root / "model", ".")
    bucket, _slash, key = job["ModelArtifacts"]["S3ModelArtifacts"].removeprefix("s3://").partition("/")
    storage.put_object(Bucket=bucket, Key=key, Body=packed.getvalue())


@pytest.mark.skipif(sys.platform == "win32", reason="containers run Linux")
def test_the_notebook_runs_from_top_to_bottom(
    cloud: Any,
    jobs: Any,
    container: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (container.root / "input/data/train").rename(tmp_path / "other recordings")
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "BUCKET": "voices",
        "ROLE": "arn:aws:iam::123456789012:role/SageMakerTraining",
        "MODEL": "resonance/nano",
        "MAX_STEPS": "2",
    }.items():
        monkeypatch.setenv(f"RESONANCE_{name}", value)
    world: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells()):
        if "sagemaker.download(" in cell:
            run_the_job(jobs.describe_training_job(TrainingJobName=world["name"]), cloud, container)
        exec(compile(cell, f"cell {number}", "exec"), world)
    assert read_info(world["result"]).settings["max_steps"] == 2
    assert world["result"].is_relative_to("runs")
    assert capsys.readouterr().out.strip().splitlines()[-1]  # what the new model heard


def test_the_notebook_is_stored_without_results() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])
