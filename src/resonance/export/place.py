"""Where an export is written: beside its place, moved there once it is checked."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from resonance.errors import ExportError, RunFolderError
from resonance.messages import _
from resonance.model import exports
from resonance.model.runs import write_failure
from resonance.units import GIBIBYTE


def check_place(folder: Path, overwrite: bool) -> None:
    """Raise RunFolderError where `folder` holds something that may not be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / exports.RECORD_FILE).is_file():
        raise RunFolderError(
            _("{path} holds something that is no export. Choose another --output_dir.").format(path=folder)
        )
    if not overwrite:
        raise RunFolderError(
            _("{path} holds an export. Choose another --output_dir, or replace it with --overwrite.").format(
                path=folder
            )
        )


def check_space(folder: Path, needed: float) -> None:
    """Raise ExportError where the disk of `folder` has fewer bytes left than are `needed`."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ExportError(
            _(
                "{path}: the export needs {needed:.2f} GiB, and {free:.2f} GiB are free there. Free some space, or choose "
                "another --output_dir."
            ).format(path=folder, needed=needed / GIBIBYTE, free=free / GIBIBYTE)
        )


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends well; otherwise nothing is left of it.

    Raises RunFolderError where something could not be written.
    """
    temporary, before = (folder.with_name(f".{folder.name}.{ending}") for ending in ("part", "before"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
        temporary.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise RunFolderError(
            _(
                "The export could not be written to {folder}: {reason}. Free some space, or choose another --output_dir."
            ).format(folder=folder, reason=reason)
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
