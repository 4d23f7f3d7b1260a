"""The training of `training.py`, and recordings whose labels differ in length."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("training.py")


@pytest.fixture(scope="session")
def training() -> ModuleType:
    """`training.py` as a module."""
    spec = importlib.util.spec_from_file_location("resonance_test_training", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def uneven_labels(recordings: Callable[..., Path]) -> Callable[[int], Path]:
    """A function that writes `count` recordings with texts of 1 to 40 letters."""

    def write(count: int) -> Path:
        labels = recordings(count=count, name=f"uneven-{count}")
        rows = json.loads(labels.read_text(encoding="utf-8"))
        for i, row in enumerate(rows):
            row["text"] = "x" * (1 + 13 * i % 40)
        labels.write_text(json.dumps(rows), encoding="utf-8")
        return labels

    return write
