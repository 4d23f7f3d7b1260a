"""Models that come with the package, under a name as on the hub."""

from __future__ import annotations

from pathlib import Path

FOLDERS = {"resonance/nano": Path(__file__).parent.parent / "nano"}


def folder_of(name: str) -> str:
    """The folder of a model that comes with the package; any other name as it is."""
    return str(FOLDERS.get(name, name))
