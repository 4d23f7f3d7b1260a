"""What is finished of an output, kept beside it while the work goes on: where a stopped run, or another process, finds it.

Beside the output (`texts.json`, or `.resonance-transcribe` in the folder) lie a record of model and settings, and a journal
of rows for each process. One list divided among processes needs a disk that all of them see, and nothing else: who finishes
its share last, by the record, brings the journals together.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from resonance.errors import DataError
from resonance.messages import _
from resonance.ranks import Ranks
from resonance.transcribe.journal import Entry, Journal, best, read_entries
from resonance.transcribe.record import Record, digest_of_list, load, refuse_other_settings
from resonance.transcribe.rows import Row, printable


class Kept:
    """The rows of the recordings that are finished. `place`: the output, as its user knows it.

    `lasting`: an output that is a journal itself, which rows are appended to. `layout`: how the rows are written in the end;
    another one needs no other rows.
    """

    def __init__(
        self,
        stem: Path,
        place: Path,
        mine: Ranks,
        recordings: Sequence[Path],
        *,
        lasting: Path | None = None,
        layout: str = "",
    ) -> None:
        self.place = place
        self.lasting = lasting
        self.mine = mine
        self._stem = stem
        self._record_path = stem.with_name(f".{stem.name.lstrip('.')}.settings.json")
        own = stem.with_name(f"{stem.name}.rank{mine.rank}-of-{mine.world}.jsonl")
        if mine.world == 1:
            own = lasting or self.part
        self._journal = Journal(own)
        self._running = FileLock(own.with_name(f".{own.name.lstrip('.')}.running"))
        # Alone, the lock that keeps other commands away is enough.
        self._lock = FileLock(stem.with_name(f".{stem.name.lstrip('.')}.lock")) if mine.world > 1 else self._running
        self._digest = digest_of_list(recordings, layout)
        self._failed = 0

    @property
    def rows(self) -> Path:
        """What a finished output keeps its rows in where it cannot be read itself."""
        return self._stem.with_name(f".{self._stem.name.lstrip('.')}.rows.jsonl")

    @property
    def shown(self) -> str:
        return printable(str(self.place))

    @property
    def part(self) -> Path:
        """The journal of a process that works alone."""
        return self._stem.with_name(f"{self._stem.name}.part.jsonl")

    @property
    def journals(self) -> list[Path]:
        """All that there are, of this and of earlier runs, be it with another number of processes."""
        of_ranks = self._stem.parent.glob(f"{glob.escape(self._stem.name)}.rank*-of-*.jsonl")
        return [*([self.lasting] if self.lasting else []), self.part, *sorted(of_ranks)]

    def begin(self, settings: dict[str, Any], outputs: Sequence[Path], *, overwrite: bool) -> bool:
        """Claim the output for this process. Returns whether it holds all that is asked for.

        Raises DataError when the output was made with other settings or by something else, or holds what would be replaced,
        or another process writes it.
        """
        try:
            self._running.acquire(timeout=0)
        except Timeout:
            raise DataError(
                _("Another process is writing to {path}. Wait for it, or choose another place.").format(path=self.place)
            ) from None
        except OSError as error:  # a name that is too long with our ending, a disk without locks
            raise DataError(
                _("{path}: cannot be written ({reason}). Choose another folder or free some space.").format(
                    path=self._running.lock_file, reason=error.strerror or error
                )
            ) from error
        with self._lock:
            if overwrite and not self.mine.restarts:  # torchrun starts the same command again
                self._clear(settings)
            record = load(self._record_path)
            if record is None:
                there = next((path for path in [*outputs, *self.journals] if path.exists()), None)
                if there and not overwrite:
                    raise self._of_unknown_origin(there)
                record = Record(settings)
            else:
                refuse_other_settings(record, settings, self.place)
            if not overwrite:
                self._refuse_to_replace()
            whole = record.finished and not any(record.done.values()) and all(path.exists() for path in outputs)
            if whole and record.recordings == self._digest:
                return True
            if record.finished:
                self._reopen()
            if record.finished or (record.recordings, record.world) != (self._digest, self.mine.world):
                record.done = {}
            record.settings, record.recordings, record.world = settings, self._digest, self.mine.world
            record.finished = False
            record.done.pop(str(self.mine.rank), None)
            record.save(self._record_path)
        return False

    def _of_unknown_origin(self, path: Path) -> DataError:
        return DataError(
            _(
                "{path} exists, and nothing says with which model and settings it was made. Add --overwrite to replace it, or "
                "choose another place."
            ).format(path=path)
        )

    def _refuse_to_replace(self) -> None:
        """Raise DataError where texts of other recordings would be lost."""

    def _reopen(self) -> None:
        """Go on with what a finished output has, where rows can be read from it."""

    def _clear(self, settings: dict[str, Any]) -> None:
        """Forget what was finished, but for what other processes of the same job may have just finished."""
        job = f"-of-{self.mine.world}.jsonl"
        for path in self.journals:
            if path == self._journal.path or not path.name.endswith(job):
                path.unlink(missing_ok=True)
        record = load(self._record_path)
        if record is None or record.finished or record.settings != settings or record.world != self.mine.world:
            self._record_path.unlink(missing_ok=True)

    def add(self, row: Row) -> None:
        self._failed += "error" in row
        self._journal.append(row)

    def finished(self) -> dict[str, Entry]:
        """The rows without an error, by recording."""
        found = {name: best(entries) for name, entries in read_entries(self.journals).items()}
        return {name: entry for name, entry in found.items() if entry and not entry.failed}

    @contextlib.contextmanager
    def ending(self) -> Iterator[int | None]:
        """Gives the number of recordings that failed in all processes where this is the last one to finish, else None.

        Nobody else ends meanwhile. The output counts as finished when the block has ended without an error.
        """
        self._journal.close()
        with self._lock:
            record = load(self._record_path)
            assert record is not None  # written at the beginning
            record.done[str(self.mine.rank)] = self._failed
            record.save(self._record_path)
            others_finished = record.finished and not self._journal.path.exists()
            if len(record.done) < self.mine.world or others_finished:
                yield None
                return
            yield sum(record.done.values())
            record.finished = True
            record.save(self._record_path)
            _remove(self._lock)

    def close(self) -> None:
        self._journal.close()
        if self._running.is_locked:
            _remove(self._running)
            self._running.release()


def _remove(lock: FileLock) -> None:
    """While it is held, so that nobody else's goes; who waits for it makes a new one."""
    with contextlib.suppress(OSError):  # Windows keeps files that are open
        Path(lock.lock_file).unlink()
