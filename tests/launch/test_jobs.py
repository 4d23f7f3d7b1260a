"""`resonance sagemaker status`, `logs` and `download`."""

from __future__ import annotations

import io
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resonance.cli import run
from resonance.launch import sagemaker
from resonance.launch.logs import GROUP
from resonance.model.adapters import read_info

BUCKET = "voices"
MODEL, OUTPUT = (f"resonance/anna-1/output/{name}.tar.gz" for name in ("model", "output"))


def packed(folder: Path, *more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
        for member, content in more:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.fixture
def job(cloud: Any, submit_flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> Any:
    """A job that is complete, with nothing in its output yet. Gives the S3 client."""
    assert run(submit_flags()) == 0
    capsys.readouterr()
    return cloud


@pytest.fixture
def logs(job: Any) -> Callable[..., None]:
    """A function that writes lines of one machine to the job's log."""
    import boto3

    client = boto3.client("logs")
    client.create_log_group(logGroupName=GROUP)

    def write(host: str, *lines: str, start: int = 1700000000) -> None:
        stream = {"logGroupName": GROUP, "logStreamName": f"anna-1/{host}-{start}"}
        client.create_log_stream(**stream)
        now = int(time.time() * 1000)
        client.put_log_events(
            **stream, logEvents=[{"timestamp": now + i, "message": line} for i, line in enumerate(lines)]
        )

    return write


def test_the_result_lies_there_ready_to_use_with_the_log_of_the_run_beside_it(
    job: Any, finished_run: Path, short_answers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    for name in ("config.yaml", "events.jsonl"):
        shutil.copy(finished_run / name, beside)
    job.put_object(Bucket=BUCKET, Key=MODEL, Body=packed(finished_run / "adapter"))
    job.put_object(Bucket=BUCKET, Key=OUTPUT, Body=packed(beside))
    target = tmp_path / "runs" / "anna"
    assert run(["sagemaker", "download", "anna-1", "--output_dir", str(target)]) == 0
    assert f"resonance transcribe --model_path {target}" in capsys.readouterr().out
    assert read_info(target / "adapter") == read_info(finished_run / "adapter")
    assert {path.name for path in target.iterdir()} == {"adapter", "config.yaml", "events.jsonl"}
    assert [path.name for path in target.parent.iterdir()] == ["anna"]
    audio = next((finished_run.parent / "recordings/audio").glob("*.wav"))
    command = ["transcribe", "--audio_path", str(audio), "--language", "en", "--model_path"]
    assert run([*command, str(target)]) == 0
    there = capsys.readouterr().out
    assert run([*command, str(finished_run)]) == 0
    assert there == capsys.readouterr().out
    # What is there is never overwritten.
    assert run(["sagemaker", "download", "anna-1", "--output_dir", str(target)]) == 1
    assert "Choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "member",
    [tarfile.TarInfo("../escaped.txt"), tarfile.TarInfo("a/../../escaped.txt"), link("out", ".."), link("etc", "/etc")],
    ids=["above", "above later", "link above", "link to the root"],
)
def test_an_archive_that_reaches_outside_leaves_nothing(
    member: tarfile.TarInfo, job: Any, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.put_object(Bucket=BUCKET, Key=MODEL, Body=packed(finished_run / "adapter", (member, b"")))
    place = tmp_path / "place"
    place.mkdir()
    assert run(["sagemaker", "download", "anna-1", "--output_dir", str(place / "anna")]) == 1
    assert "cannot be unpacked" in capsys.readouterr().err
    assert not any(place.iterdir()) and not (tmp_path / "escaped.txt").exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, "is not there: the job wrote no result"),
        (b"not an archive", "cannot be unpacked"),
        (b"", "cannot be unpacked"),
        ("without a result", "Its checkpoints continue with --checkpoints"),
    ],
)
def test_a_result_that_is_none_is_told_and_leaves_nothing(
    body: Any, said: str, job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if body == "without a result":
        (tmp_path / "empty").mkdir()
        body = packed(tmp_path / "empty", (tarfile.TarInfo("notes.txt"), b"x"))
    if body is not None:
        job.put_object(Bucket=BUCKET, Key=MODEL, Body=body)
    assert run(["sagemaker", "download", "anna-1", "--output_dir", str(place / "anna")]) == 1
    assert said in capsys.readouterr().err
    assert not any(place.iterdir())


def test_a_place_that_cannot_be_written_is_told(
    job: Any, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.put_object(Bucket=BUCKET, Key=MODEL, Body=packed(finished_run / "adapter"))
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run(["sagemaker", "download", "anna-1", "--output_dir", str(place)]) == 1
        assert "Choose another folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_an_archive_cut_in_half_leaves_nothing(
    job: Any, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = packed(finished_run / "adapter")
    job.put_object(Bucket=BUCKET, Key=MODEL, Body=whole[: len(whole) // 2])
    assert run(["sagemaker", "download", "anna-1", "--output_dir", str(tmp_path / "x" / "anna")]) == 1
    assert "cannot be unpacked" in capsys.readouterr().err
    assert not any((tmp_path / "x").iterdir())


def moto_job() -> Any:
    from moto.backends import get_backend

    return get_backend("sagemaker")["123456789012"]["us-east-1"].training_jobs["anna-1"]


@pytest.mark.parametrize(("status", "said"), [("InProgress", "still at work"), ("Failed", "has no result: Failed.")])
def test_a_job_without_a_result_yet_or_ever(
    status: str, said: str, job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moto_job().training_job_status = status
    assert run(["sagemaker", "download", "anna-1", "--output_dir", str(tmp_path / "x")]) == 1
    assert said in capsys.readouterr().err


def test_status_says_how_far_a_job_is(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sagemaker", "status", "anna-1"]) == 0
    said = capsys.readouterr().out
    assert "anna-1: Completed" in said and "1 x ml.g5.2xlarge" in said
    assert f"s3://{BUCKET}/resonance/anna-1/output/model.tar.gz" in said


@pytest.mark.parametrize("command", ["status", "logs", "download"])
def test_a_job_that_is_not_there(command: str, cloud: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--output_dir", str(tmp_path / "x")] if command == "download" else []
    assert run(["sagemaker", command, "nobody", *more]) == 1
    assert "There is no job named nobody in us-east-1" in capsys.readouterr().err


def test_the_log_is_shown_as_it_was_printed(logs: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    logs("algo-1", "step 1/4 · loss 5.0 [b]", "step 2/4 · loss 4.0")
    assert run(["sagemaker", "logs", "anna-1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["step 1/4 · loss 5.0 [b]", "step 2/4 · loss 4.0"]


def test_lines_of_several_machines_say_whose_they_are(
    logs: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    moto_job().resource_config["InstanceCount"] = 2
    logs("algo-1", "first")
    logs("algo-2", "second")
    assert run(["sagemaker", "logs", "anna-1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["[algo-1] first", "[algo-2] second"]


def test_following_goes_on_when_a_spot_job_starts_again_on_another_machine(
    logs: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = moto_job()
    found.training_job_status, found.secondary_status = "InProgress", "Training"
    logs("algo-1", "step 1/4")

    def pause(seconds: float) -> None:
        if found.secondary_status == "Training":
            found.secondary_status = "Interrupted"
        else:
            logs("algo-1", "step 2/4", start=1800000000)
            found.training_job_status = found.secondary_status = "Completed"

    monkeypatch.setattr(sagemaker.time, "sleep", pause)
    assert run(["sagemaker", "logs", "anna-1", "--follow"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")] == [
        "step 1/4",
        "step 2/4",
    ]


def test_a_job_that_has_not_printed_yet_has_an_empty_log(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sagemaker", "logs", "anna-1"]) == 0
    assert capsys.readouterr().out == ""


def test_job_and_log_are_looked_for_in_the_region_that_is_given(
    logs: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs("algo-1", "step 1/4")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert run(["sagemaker", "logs", "anna-1"]) == 1
    assert "no job named anna-1 in eu-west-1" in capsys.readouterr().err
    assert run(["sagemaker", "logs", "anna-1", "--region", "us-east-1"]) == 0
    assert capsys.readouterr().out == "step 1/4\n"


@pytest.mark.parametrize(("end", "code"), [("Completed", 0), ("Failed", 1), ("Stopped", 1)])
def test_following_ends_with_the_job_and_its_exit_code(
    end: str, code: int, logs: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = moto_job()
    found.training_job_status, found.secondary_status = "InProgress", "Starting"

    def pause(seconds: float) -> None:
        """What happens at AWS between two looks."""
        if found.secondary_status == "Starting":
            found.secondary_status = "Training"
            logs("algo-1", "step 1/4")
        else:
            found.training_job_status = found.secondary_status = end
            if end == "Failed":
                found.failure_reason = "AlgorithmError: Error: nowhere.json: no such file"

    monkeypatch.setattr(sagemaker.time, "sleep", pause)
    assert run(["sagemaker", "logs", "anna-1", "--follow"]) == code
    said = capsys.readouterr()
    expected = ["-- anna-1: Starting", "-- anna-1: Training", "step 1/4", f"-- anna-1: {end}"]
    assert said.out.splitlines() == expected
    assert ("nowhere.json: no such file" in said.err) == (end == "Failed")


def test_ctrl_c_while_following_leaves_the_job_running(
    logs: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moto_job().training_job_status = "InProgress"

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sagemaker.time, "sleep", interrupted)
    assert run(["sagemaker", "logs", "anna-1", "--follow"]) == 130
    assert "The job goes on." in capsys.readouterr().err
    assert moto_job().training_job_status == "InProgress"
