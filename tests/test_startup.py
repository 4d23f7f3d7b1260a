"""What starts fast: help and refusals load neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from resonance.cli import run
codes = [run(command) for command in json.loads(sys.argv[1])]
heavy = {"torch", "transformers", "peft", "datasets", "av", "jiwer", "boto3", "sagemaker", "fastapi", "uvicorn"}
heavy &= set(sys.modules)
print(json.dumps([codes, sorted(heavy)]))
"""


@pytest.mark.parametrize(
    ("commands", "code"),
    [
        ([["--help"], ["--version"]], 0),
        ([[name, "--help"] for name in ("train", "evaluate", "transcribe", "serve")], 0),
        ([["data", name, "--help"] for name in ("check", "convert", "split")], 0),
        ([["sagemaker", name, "--help"] for name in ("submit", "status", "logs", "download")], 0),
        ([["token", name, "--help"] for name in ("create", "list", "revoke")], 0),
        (
            [
                ["train", "--lora_r", "x"],
                ["evaluate", "--modle_path", "x"],
                ["transcribe"],
                ["trian"],
                ["sagemaker", "submit"],
                ["token", "revoke", "nobody"],
            ],
            2,
        ),
    ],
    ids=["overview", "command help", "data help", "sagemaker help", "token help", "refusals"],
)
def test_neither_help_nor_a_refusal_loads_torch(commands: list[list[str]], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[code] * len(commands), []]
    assert "Traceback" not in done.stderr
