"""Runs the transcription, translation and model tests of the `openai` package's own source distribution against the service.

    python tests/conformance/run_openai_suite.py --model openai/whisper-tiny

It downloads the source distribution of the installed version from the package index, installs what its tests need into a
virtual environment of their own, starts `resonance serve`, and runs the tests with TEST_API_BASE_URL. They were written for a
server that answers anything, so the placeholders in them are replaced by values that mean something: see REPLACED.
Needs the index, so it is no part of `make test`. Prints the figures as JSON; the exit code is that of pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDING = ROOT / "src/resonance/demo_speaker/audio/close_the_door_2.opus"
TESTS = (
    "tests/api_resources/audio/test_transcriptions.py",
    "tests/api_resources/audio/test_translations.py",
    "tests/api_resources/test_models.py",
)
REPLACED = {
    'b"Example data"': '__import__("pathlib").Path(__import__("os").environ["RECORDING"]).read_bytes()',
    'language="language"': 'language="en"',
    'languages=["string"]': 'languages=["en"]',
}
# The names by which these tests ask for models.
NAMES = ("whisper-1", "gpt-4o-transcribe", "gpt-6-astra")
# DELETE /v1/models/{model} is no route of this service: adapters are deleted at /patients/{id}/adapter, by admins.
LEFT_OUT = "not delete or path_params"
LISTENING = re.compile(r"Listening on (http://\S+)\.")
START_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="Whisper model to serve: a hub name or a folder")
    parser.add_argument("--openai", default=importlib.metadata.version("openai"), help="version of the package")
    parser.add_argument("--work", type=Path, help="folder for downloads, to be used again; left out, a temporary one")
    args, further = parser.parse_known_args()  # of `resonance serve`
    with contextlib.ExitStack() as stack:
        work: Path = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        suite, python = prepared(work.resolve(), args.openai)
        address = stack.enter_context(serving(args.model, further, work))
        return tried(suite, python, address, args.openai)


def prepared(work: Path, version: str) -> tuple[Path, Path]:
    """The unpacked suite with its placeholders replaced, and the Python that runs it."""
    work.mkdir(parents=True, exist_ok=True)
    python = work / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(work / "venv", with_pip=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # What builds the distribution, and what its tests import.
    needs = (
        "hatchling",
        "hatch-fancy-pypi-readme",
        f"openai[aiohttp]=={version}",
        "pytest",
        "pytest-asyncio",
        "pytest-xdist",
        "rich",
    )
    subprocess.run([*pip, "install", *needs], check=True)
    packed = work / f"openai-{version}.tar.gz"
    if not packed.exists():
        wanted = [f"openai=={version}", "--no-binary", "openai", "--no-deps", "--no-build-isolation", "-d", str(work)]
        subprocess.run([*pip, "download", *wanted], check=True)
    with tarfile.open(packed) as archive:
        archive.extractall(work, filter="data")
    suite = work / f"openai-{version}"
    for name in TESTS:
        text = (suite / name).read_text(encoding="utf-8")
        for placeholder, value in REPLACED.items():
            text = text.replace(placeholder, value)
        (suite / name).write_text(text, encoding="utf-8")
    return suite, python


@contextlib.contextmanager
def serving(model: str, further: Sequence[str], work: Path) -> Iterator[str]:
    """`resonance serve` in a process of its own; gives its address when the model answers."""
    command = ["serve", "--model", model, "--port", "0", "--auth", "off", "--model_names", ",".join(NAMES), *further]
    said = work / "serve.log"
    with said.open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "resonance", *command], stdout=log, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + START_SECONDS
            while "Ready." not in (text := said.read_text()):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"The service does not answer:\n{text}")
                time.sleep(0.2)
            found = LISTENING.search(text)
            assert found
            yield found[1]
        finally:
            process.terminate()
            process.wait()


def tried(suite: Path, python: Path, address: str, version: str) -> int:
    """Run the tests, print the figures, and give pytest's exit code."""
    report = suite / "report.xml"
    done = subprocess.run(
        [
            str(python),
            "-m",
            "pytest",
            *TESTS,
            "-k",
            LEFT_OUT,
            "-q",
            "-n0",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
        ],
        cwd=suite,
        env=os.environ | {"TEST_API_BASE_URL": f"{address}/v1", "RECORDING": str(RECORDING)},
        check=False,
    )
    text = report.read_text(encoding="utf-8")
    counts = {
        name: int(found[1]) for name in ("tests", "failures", "errors", "skipped") if (found := _count(name, text))
    }
    print(json.dumps({"openai": version, **counts, "left_out": LEFT_OUT}))
    return done.returncode


def _count(name: str, text: str) -> re.Match[str] | None:
    return re.search(rf'<testsuite [^>]*\b{name}="(\d+)"', text)


if __name__ == "__main__":
    sys.exit(main())
