"""The adapters in memory: those that were asked for, within a budget, each of them the newest good version.

Nobody is ever answered by another adapter than the one asked for, nor by the base model in its place: where there is none,
or none that can be used, `acquire` says so.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch

from resonance.errors import AdapterError, ResonanceError
from resonance.messages import _
from resonance.model.lora_weights import AdapterBase, LoadedAdapter, read_adapter
from resonance.serve.faults import ServiceError, adapter_memory_full, store_unreachable
from resonance.serve.patients import check_patient_id
from resonance.serve.store import AdapterStore, not_found

LOADS_AT_ONCE = 4  # each holds its file and its matrices at the same time, outside the budget
_REMEMBERED = 1000  # ids without an adapter in memory, such as those that somebody tries out
_FULL, _UNUSABLE, _UNREACHABLE = "adapter_memory_full", "adapter_unusable", "adapter_store_unreachable"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counts since the start, and what is in memory now."""

    loaded: int  # adapters in memory, old versions that are still in use among them
    bytes: int
    budget_bytes: int
    pinned: int  # adapters in use
    hits: int
    misses: int
    evictions: int
    loads: int
    loads_failed: int
    behind: int  # people who are answered by an older version, because the newest cannot be used


Coming = Future[LoadedAdapter]


@dataclass(slots=True, eq=False)
class _Look:
    """One look at the store, and the load that follows from it, for everybody who waits for it."""

    had: LoadedAdapter | None  # what was in memory when it began, acquired until it ends
    changed: bool = False  # begun by `changed`: what was in memory before it answers nobody who asks now
    waiting: list[Coming] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Slot:
    adapter: LoadedAdapter | None = None
    looked: float = -math.inf  # when the store was last asked
    look: _Look | None = None
    error: ServiceError | None = None  # what the last look ended in, where there is no adapter
    behind: str = ""  # why a newer version is not used
    wanted_bytes: int = 0  # of an adapter that there was no room for


class AdapterPool:
    """Thread-safe. An adapter that was acquired stays as it is until it is released, whatever happens to its file.

    budget_bytes: of all matrices in memory; loads under way come on top, at most `LOADS_AT_ONCE` of them. refresh_seconds:
    how old an answer to “which version is current?” may be, and how long a failure is not tried again.
    """

    def __init__(
        self,
        store: AdapterStore,
        base: AdapterBase,
        budget_bytes: int,
        refresh_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.base = store, base
        self.budget_bytes, self.refresh_seconds = budget_bytes, refresh_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._loading = threading.BoundedSemaphore(LOADS_AT_ONCE)
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # used longest ago first
        self._pins: dict[LoadedAdapter, int] = {}  # every adapter in memory
        self._bytes = 0
        self._hits = self._misses = self._evictions = self._loads = self._failed = 0

    def acquire(self, patient: str) -> LoadedAdapter:
        """The newest good version of the adapter of `patient`, which stays in memory until it is released. Waits where it
        has to be loaded; where only a newer one is being loaded, the older one is given, unless `changed` has been called.

        Raises ServiceError: 400 invalid_patient_id, 404 adapter_not_found, 422 adapter_unusable with the reason, 503
        adapter_memory_full and adapter_store_unreachable.
        """
        coming, begun = self._asked(patient)
        if begun is not None:
            self._follow(patient, *begun)
        return coming.result()

    def ask(self, patient: str, submit: Callable[[Callable[[], None]], object]) -> Coming:
        """As `acquire`, without waiting: what is in memory is there at once. However many ask for a patient, one function,
        which looks at the store, is given to `submit`, to run in a thread; where it raises RuntimeError, as BusyError is,
        nobody looks, and the store cannot be reached for those who wait. Cancelled, nothing is acquired.

        Raises ServiceError where the answer is known already; else the future does.
        """
        coming, begun = self._asked(patient)
        if begun is not None:
            try:
                submit(functools.partial(self._follow, patient, *begun))
            except RuntimeError:
                self._settle(patient, *begun, None, store_unreachable(), self._clock())
        return coming

    def held(self, patient: str) -> LoadedAdapter | None:
        """What is in memory, acquired, however long ago the store was asked whether it is the newest; None where nothing is,
        or `changed` says that it may be wrong."""
        with self._lock:
            slot = self._slots.get(patient)
            if slot is None or slot.adapter is None or (slot.look is not None and slot.look.changed):
                return None
            self._pins[slot.adapter] += 1
            return slot.adapter

    def release(self, adapter: LoadedAdapter) -> None:
        """Give back what `acquire` gave, once for each time."""
        with self._lock:
            self._unpin(adapter)

    def changed(self, patient: str) -> None:
        """The store was written to: whoever asks for `patient` from now on waits until it was looked at again. What was
        deleted leaves the memory, though nobody asks for it. Returns at once."""
        with self._lock:
            slot = self._slots.get(patient)
            if slot is None:
                return
            # A look under way may have seen what was there before; it goes on for those who wait for it already.
            slot.looked, slot.look, slot.error = -math.inf, None, None
            had = slot.adapter
            if had is None:
                return
            look = slot.look = _Look(had, changed=True)
            self._pins[had] += 1
        follow = threading.Thread(
            target=self._follow, args=(patient, slot, look), name="resonance-changed", daemon=True
        )
        try:
            follow.start()
        except RuntimeError as error:  # as many processes as this user may have; that may pass
            _log.error("%s: %s", patient, error)
            self._settle(patient, slot, look, None, store_unreachable(), self._clock())

    def check(self, folder: Path) -> LoadedAdapter:
        """The adapter in `folder`, as it would be loaded; it is not kept. Raises ServiceError 422 with the reason."""
        try:
            with self._loading:
                adapter = read_adapter(folder, name="", version="", base=self.base)
            self._check_size(adapter)
        except AdapterError as error:
            # Where uploads are unpacked is nobody's business.
            raise _unusable("", str(error).replace(str(folder), folder.name)) from error
        return adapter

    def stats(self) -> PoolStats:
        with self._lock:
            return PoolStats(
                loaded=len(self._pins),
                bytes=self._bytes,
                budget_bytes=self.budget_bytes,
                pinned=sum(count > 0 for count in self._pins.values()),
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                loads=self._loads,
                loads_failed=self._failed,
                behind=sum(bool(slot.behind) for slot in self._slots.values()),
            )

    def _asked(self, patient: str) -> tuple[Coming, tuple[_Slot, _Look] | None]:
        """What will come, and what has to be followed for it, where nobody does it yet."""
        check_patient_id(patient)
        coming: Coming = Future()
        with self._lock:
            slot = self._slots.setdefault(patient, _Slot())
            self._slots.move_to_end(patient)
            fresh = self._clock() - slot.looked < self.refresh_seconds
            look, had = slot.look, slot.adapter
            if had is not None and (fresh if look is None else not look.changed):
                self._pins[had] += 1
                self._hits += 1
                coming.set_result(had)
                return coming, None
            if look is not None:
                look.waiting.append(coming)
                return coming, None
            if had is None and fresh and slot.error is not None:
                raise slot.error.again()
            look = slot.look = _Look(had, waiting=[coming])
            if had is not None:
                self._pins[had] += 1
            self._forget_ids()
        return coming, (slot, look)

    def _follow(self, patient: str, slot: _Slot, look: _Look) -> None:
        """Look at the store and load what is new there."""
        began = self._clock()
        found: LoadedAdapter | None = None
        error: ServiceError | None = None
        try:
            found = self._newest(patient, slot, look.had)
        except Exception as problem:
            error = self._translated(patient, problem)
        except BaseException as problem:  # the process is ending; those who wait must not wait for ever
            error = self._translated(patient, problem)
            raise
        finally:
            self._settle(patient, slot, look, found, error, began)

    def _newest(self, patient: str, slot: _Slot, had: LoadedAdapter | None) -> LoadedAdapter:
        tried = None
        while True:
            version = self.store.version(patient)
            if version is None:
                raise not_found(patient)
            if had is not None and had.version == version:
                return had
            with self._lock:
                self._misses += 1
                others = self._pinned_bytes() - (had.nbytes if had is not None and self._pins[had] == 1 else 0)
                if others + max(slot.wanted_bytes, 1) > self.budget_bytes:
                    raise adapter_memory_full()
            try:
                with self._loading:
                    adapter = self.store.read(patient, version, self.base)
            except AdapterError:
                if version == tried or self.store.version(patient) == version:
                    raise
                tried = version  # another one has taken its place while it was read
                continue
            self._check_size(adapter)
            return adapter

    def _settle(
        self,
        patient: str,
        slot: _Slot,
        look: _Look,
        found: LoadedAdapter | None,
        error: ServiceError | None,
        began: float,
    ) -> None:
        """Put what a look has brought in its place, and hand it to everybody who waits for it."""
        with self._lock:
            found, error, waiting = self._placed(patient, slot, look, found, error, began)
        for coming in waiting:
            if found is not None:
                coming.set_result(found)
            else:
                assert error is not None
                coming.set_exception(error.again())

    def _placed(
        self,
        patient: str,
        slot: _Slot,
        look: _Look,
        found: LoadedAdapter | None,
        error: ServiceError | None,
        began: float,
    ) -> tuple[LoadedAdapter | None, ServiceError | None, list[Coming]]:
        """What those who wait get, and who they are."""
        had = look.had
        newest = slot.look is look and self._slots.get(patient) is slot  # or `changed` has called for another look
        if had is not None:
            self._pins[had] -= 1  # held until here, and again below where it is what answers
        if found is not None and found is not had:
            self._loads += 1
            if self._make_room(found.nbytes, had if newest else None):
                self._pins[found] = 0
                self._bytes += found.nbytes
                slot.wanted_bytes = 0
            else:
                slot.wanted_bytes = found.nbytes
                found, error = None, adapter_memory_full()
        self._failed += error is not None and error.code in (_UNUSABLE, _UNREACHABLE)
        if error is not None and error.status != 404 and not (look.changed and error.status == 503):
            found = had
        waiting = [coming for coming in look.waiting if coming.set_running_or_notify_cancel()]
        if found is not None:
            self._pins[found] += len(waiting)
        if newest:
            self._keep(patient, slot, found, error, began)
        for one in {found, had} - {None, slot.adapter}:
            assert one is not None
            if self._pins[one] == 0:
                self._drop(one)
        return found, error, waiting

    def _keep(
        self, patient: str, slot: _Slot, found: LoadedAdapter | None, error: ServiceError | None, began: float
    ) -> None:
        slot.look, slot.adapter = None, found
        slot.error = None if error is not None and error.code == _FULL else error  # there may be room at any time
        slot.looked = began if error is None else self._clock()
        behind = error.message if error is not None and found is not None else ""
        if found is not None and behind and behind != slot.behind:
            text = _("{patient}: version {version} goes on answering, because the newest cannot be used. {reason}")
            _log.warning("%s", text.format(patient=patient, version=found.version, reason=behind))
        slot.behind = behind

    def _unpin(self, adapter: LoadedAdapter) -> None:
        count = self._pins.get(adapter, 0)
        if count < 1:
            raise ValueError(f"the adapter of {adapter.name} was released more often than acquired")
        self._pins[adapter] = count - 1
        slot = self._slots.get(adapter.name)
        if count == 1 and (slot is None or slot.adapter is not adapter):
            self._drop(adapter)

    def _drop(self, adapter: LoadedAdapter) -> None:
        del self._pins[adapter]
        self._bytes -= adapter.nbytes

    def _pinned_bytes(self) -> int:
        return sum(adapter.nbytes for adapter, count in self._pins.items() if count)

    def _make_room(self, nbytes: int, replaced: LoadedAdapter | None) -> bool:
        """Let go of what was not used for longest until `nbytes` fit; False, and nothing is let go, where they cannot.
        `replaced` makes room anyway, unless somebody holds it."""
        if self._pinned_bytes() + nbytes > self.budget_bytes:
            return False
        excess = self._bytes + nbytes - self.budget_bytes
        if replaced is not None and self._pins[replaced] == 0:
            excess -= replaced.nbytes
        for patient, slot in list(self._slots.items()):
            if excess <= 0:
                break
            adapter = slot.adapter
            if adapter is not None and adapter is not replaced and self._pins[adapter] == 0:
                del self._slots[patient]
                self._drop(adapter)
                self._evictions += 1
                excess -= adapter.nbytes
        return True

    def _forget_ids(self) -> None:
        if len(self._slots) > len(self._pins) + _REMEMBERED:
            for patient in [name for name, slot in self._slots.items() if slot.adapter is None and slot.look is None]:
                del self._slots[patient]

    def _check_size(self, adapter: LoadedAdapter) -> None:
        if adapter.nbytes > self.budget_bytes:
            reason = _("It takes {size} MB of memory, and all adapters together may take {most} MB.")
            raise _unusable(
                adapter.name,
                reason.format(size=-(-adapter.nbytes // 1_000_000), most=self.budget_bytes // 1_000_000),
                _("Start the service with a larger --adapter_memory, or train with a smaller --lora_r."),
            )

    def _translated(self, patient: str, problem: BaseException) -> ServiceError:
        if isinstance(problem, ServiceError):
            return problem
        if isinstance(problem, AdapterError):
            return _unusable(patient, str(problem))
        if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
            return adapter_memory_full()
        if isinstance(problem, (ResonanceError, OSError)) or not isinstance(problem, Exception):
            _log.warning("%s: %s", patient, problem)
            return store_unreachable(max(1, math.ceil(self.refresh_seconds)))
        _log.error("%s: %r", patient, problem, exc_info=problem)
        return _unusable(patient, type(problem).__name__)


def _unusable(patient: str, reason: str, hint: str | None = None) -> ServiceError:
    text = _("The adapter of {patient} cannot be used: {reason}") if patient else _("It cannot be used: {reason}")
    return ServiceError(
        422,
        _UNUSABLE,
        text.format(patient=patient, reason=reason),
        hint or _("Upload the adapter of this person again, or roll back to an older version."),
    )
