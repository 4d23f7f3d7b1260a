"""The set-up scripts, what they install, and the example of a manifest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("python3", "python3.13", "python3.12", "python3.11", "python3.10", "python")

# Stands for Python: makes a .venv with itself in it, and writes down every call.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
  *version_info*) exit ${OLD:-0} ;;
  --version) echo "Python 3.8.10" ;;
  "-m venv .venv") [ -z "$NO_VENV" ] || exit 1
    mkdir -p .venv/bin && cp "$0" .venv/bin/python
    printf '#!/bin/sh\\necho doctor >> "$LOG"\\n' > .venv/bin/resonance && chmod +x .venv/bin/resonance ;;
  *"pip install"*) exit ${NO_INDEX:-0} ;;
esac
"""

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the script and stand-ins for every Python that it looks for, on a path that is hard to quote."""
    folder = tmp_path / "my folder 共鸣"
    (folder / "bin").mkdir(parents=True)
    for name in ("setup_environment.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name in PYTHONS:
        (folder / "bin" / name).write_text(FAKE_PYTHON, encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    return folder


def set_up(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script from another folder; the result, and what the stand-ins were called with."""
    log = folder / "log"
    log.write_text("", encoding="utf-8")
    done = subprocess.run(
        ["bash", str(folder / "setup_environment.sh")],
        env={"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "LOG": str(log), **environment},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, log.read_text(encoding="utf-8").splitlines()


@needs_bash
def test_set_up_installs_torch_first_and_ends_with_the_doctor_and_the_next_command(checkout: Path) -> None:
    done, calls = set_up(checkout, PIP_INDEX_URL="https://example.org/simple")
    assert done.returncode == 0, done.stderr
    installs = [call.partition("install ")[2] for call in calls if "pip install" in call]
    assert [part.split()[-1] for part in installs] == ["torch==2.13.0", "requirements.txt", "."]
    assert installs[-1].split()[-3:] == ["--no-deps", "-e", "."]
    assert calls[-1] == "doctor"
    assert "resonance data check" in done.stdout


@needs_bash
def test_set_up_run_again_keeps_the_environment(checkout: Path) -> None:
    set_up(checkout)
    (checkout / ".venv" / "mine").touch()
    done, calls = set_up(checkout)
    assert done.returncode == 0
    assert "-m venv .venv" not in calls
    assert (checkout / ".venv" / "mine").exists()


@needs_bash
def test_an_environment_that_does_not_work_is_put_aside_and_not_deleted(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").touch()
    done, _calls = set_up(checkout)
    assert done.returncode == 0
    assert "does not work" in done.stdout
    assert len(list(checkout.glob(".venv.old.*/mine"))) == 1


@needs_bash
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"OLD": "1"}, "Python 3.11 or newer is needed, and none was found (python3: Python 3.8.10)"),
        ({"OLD": "1", "PYTHON": "python3.12"}, "PYTHON=python3.12 is not Python 3.11 or newer"),
        ({"NO_VENV": "1"}, "sudo apt-get install python3-venv"),
        ({"NO_INDEX": "1"}, "No connection to the package index?"),
    ],
)
def test_what_stops_set_up_is_said_plainly(environment: dict[str, str], said: str, checkout: Path) -> None:
    done, calls = set_up(checkout, **environment)
    assert done.returncode == 1
    assert said in done.stderr
    assert "doctor" not in calls
    assert (checkout / ".venv").exists() == ("NO_INDEX" in environment)


def test_the_windows_script_has_windows_line_ends_and_every_label_it_jumps_to() -> None:
    data = (ROOT / "setup_environment.bat").read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n") > 0
    text = data.decode("ascii")  # cmd reads it in the code page of the machine
    labels = set(re.findall(r"^:(\w+)", text, re.MULTILINE))
    jumps = set(re.findall(r"(?:goto|call) :(\w+)", text))
    assert jumps <= labels
    assert len(jumps) >= 4


def test_everything_installed_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", line), f"{name}: {line}"


def test_the_pins_satisfy_what_the_package_asks_for() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith("#"))
    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text


def test_the_example_of_a_manifest_loads() -> None:
    from resonance.data.formats import load_manifest

    rows = load_manifest(ROOT / "data_format_example.json").utterances
    assert [row.text for row in rows] == ["我想喝水", "请开灯", "Call my sister."]
    assert rows[0].audio == str(ROOT / "audio" / "001_我想喝水.wav")
