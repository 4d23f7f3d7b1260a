"""What goes into a job's archive, and what never does."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from importlib import metadata
from io import BytesIO
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import resonance
from resonance.errors import MissingExtraError
from resonance.launch import source

PACKAGE = Path(resonance.__file__).parent
METADATA = f"resonance_asr-{metadata.version('resonance-asr')}.dist-info/METADATA"


def names(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        return tar.getnames()


def test_the_archive_holds_the_package_the_script_and_the_requirements_and_no_recordings() -> None:
    found = names(source.archive())
    assert {"requirements.txt", "sagemaker_torchrun.sh", "resonance/cli.py", "resonance/locales/zh-CN.json"} <= {*found}
    assert {"resonance/launch/container.py", "resonance/evaluate/report.html", "resonance/plan/prices.yaml"} <= {*found}
    assert {name for name in found if "/" not in name} == {"requirements.txt", "sagemaker_torchrun.sh"}
    assert {name.split("/")[0] for name in found if "/" in name} == {"resonance", METADATA.split("/")[0]}
    assert {Path(name).suffix for name in found if name != METADATA} <= {
        ".py",
        ".html",
        ".yaml",
        ".sh",
        ".typed",
        ".json",
        ".txt",
    }
    # Everything that Python could import is there.
    modules = {f"resonance/{p.relative_to(PACKAGE).as_posix()}" for p in PACKAGE.rglob("*.py")}
    assert modules <= {*found}
    assert not [name for name in found if "demo_speaker" in name or "nano" in name or "__pycache__" in name]
    assert len(source.archive()) < 1 << 20


def test_the_version_is_found_where_only_the_archive_is(tmp_path: Path) -> None:
    """A container has the package on its path, and pip never installed it there; results name its version."""
    with tarfile.open(fileobj=BytesIO(source.archive())) as tar:
        tar.extractall(tmp_path, filter="data")
    (found,) = metadata.distributions(path=[str(tmp_path)])
    assert (found.name, found.version) == ("resonance-asr", metadata.version("resonance-asr"))


def test_an_installation_that_pip_does_not_know_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(MissingExtraError, match="pip install --no-deps"):
        source.archive()


def test_the_same_files_give_the_same_bytes() -> None:
    assert source.archive() == source.archive()


def test_the_built_in_model_goes_along_where_a_training_starts_from_it() -> None:
    assert "resonance/nano/model.safetensors" in names(source.archive(model="resonance/nano"))


@pytest.fixture
def package(tmp_path: Path, recordings: Callable[..., Path]) -> Path:
    """A package folder into which somebody put everything that must not leave the machine."""
    folder = tmp_path / "resonance"
    (folder / "data").mkdir(parents=True)
    (folder / "locales").mkdir()
    for name in ("__init__.py", "cli.py", "data/__init__.py", "data/audio.py", "py.typed"):
        (folder / name).write_text("", encoding="utf-8")
    (folder / "locales/zh-CN.json").write_text("{}", encoding="utf-8")
    for name in (
        *(".env", ".env.py", "data/.env", "key.pem", "data/id_rsa", ".aws/credentials", ".aws/config", ".netrc"),
        *(".git/config", ".git/hooks/run.sh", "run/config.yaml", "run/events.jsonl", "run/adapter/adapter_config.json"),
        *(
            "credentials.json",
            "data/tokens.json",
            "data/voice.wav",
            "notes.txt",
            "__pycache__/cli.pyc",
            "locales/.key.json",
        ),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret", encoding="utf-8")
    (tmp_path / "outside.py").write_text("secret", encoding="utf-8")
    (folder / "link.py").symlink_to(tmp_path / "outside.py")
    recordings(2, name="resonance/recordings")
    return folder


def test_secrets_runs_and_recordings_beside_the_code_stay_where_they_are(package: Path) -> None:
    found = [path.relative_to(package).as_posix() for path in source.files(package)]
    assert sorted(found) == [
        *("__init__.py", "cli.py", "data/__init__.py", "data/audio.py", "locales/zh-CN.json", "py.typed"),
    ]


def test_requirements_leave_torch_to_the_image_and_take_what_the_settings_need() -> None:
    found = {Requirement(line).name for line in source.requirements()}
    assert {"transformers", "peft", "accelerate", "pydantic", "tensorboard"} <= found
    assert not {"torch", "bitsandbytes", "wandb", "datasets", "pytest", "sagemaker-core"} & found
    more = {Requirement(line).name for line in source.requirements(["quant", "wandb"])}
    assert more == found | {"bitsandbytes", "wandb"}
    assert all(Requirement(line).marker is None for line in source.requirements(["quant"]))
