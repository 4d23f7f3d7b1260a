"""Where the adapters of all people lie: a folder, or an address such as s3://bucket/folder.

    <id>/current                  the name of the version that answers
    <id>/versions/<version>/      an adapter folder, and checksums.json with the SHA-256 of each of its files

An adapter folder, or the run folder of a training, may also lie at `<id>/` itself: it answers while there is no `current`.
Everything but `current` is written once and never changed, and `current` is replaced at once: whoever is killed at any
moment leaves the old version or the new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resonance.errors import AdapterError, DataError, ResonanceError, UnreachableError
from resonance.messages import _
from resonance.model import adapters
from resonance.model.lora_weights import WEIGHTS_FILE, AdapterBase, LoadedAdapter, read_adapter
from resonance.serve.faults import ServiceError
from resonance.serve.patients import check_patient_id, is_name
from resonance.serve.places import LocalFolder, open_folder

CURRENT = "current"
CHECKSUMS = "checksums.json"
# What an adapter folder is made of. A pickle (.bin, .pt) runs code when it is read.
KEPT_ENDINGS = frozenset({".json", ".safetensors", ".txt", ".md"})

_IN_FOLDER = "folder-"  # begins the names of versions that lie at <id>/ itself; those of stored ones begin with a year
_NEEDED = ("adapter_config.json", WEIGHTS_FILE, adapters.INFO_FILE, "tokenizer.json", "preprocessor_config.json")
_CUT_OFF_SECONDS = 3600.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """One version of somebody's adapter."""

    name: str
    fingerprint: str  # SHA-256 of adapter_model.safetensors, in hexadecimal
    created: str  # UTC, ISO 8601
    bytes: int
    current: bool


class AdapterStore:
    """Thread-safe. Several processes may use one place. keep: so many old versions of each adapter stay."""

    def __init__(self, place: str | Path, *, keep: int = 10) -> None:
        """Raises DataError where `place` is not there or cannot be reached."""
        self.place = str(place)
        self._keep = keep
        self._folder = open_folder(self.place)
        self._writing = threading.Lock()
        if adapters.INFO_FILE in self._folder.files(""):
            raise AdapterError(
                _("{place} is an adapter itself. Give the folder that it lies in, with its name as the id.").format(
                    place=place
                )
            )

    def patients(self, after: str | None = None, limit: int = 100) -> list[str]:
        """The ids that follow `after`, in order. No adapter is read. Behind an address, ids whose first upload was cut off
        are among them."""
        names = sorted(name for name in self._folder.folders("") if is_name(name) and (after is None or name > after))
        if not isinstance(self._folder, LocalFolder):
            return names[:limit]
        found: list[str] = []
        for name in names:
            if len(found) == limit:
                break
            if self.has(name):
                found.append(name)
        return found

    def has(self, patient: str) -> bool:
        check_patient_id(patient)
        try:
            return self._named(patient) is not None or self._plain(patient) is not None
        except UnreachableError:
            raise
        except (AdapterError, DataError):
            return True  # there is one, if not a good one

    def version(self, patient: str) -> str | None:
        """The name of the version that answers; None: there is none. Asks for one small file, or a listing.

        Raises AdapterError where `current` is damaged, ShardError where the place cannot be reached.
        """
        check_patient_id(patient)
        named = self._named(patient)
        if named is not None:
            return named
        found = self._plain(patient)
        if found is None and self._folder.folders(patient):
            time.sleep(0.05)  # a training that replaces its adapter moves the old one away first
            found = self._plain(patient)
        return _plain_name(found[1]) if found else None

    def current(self, patient: str) -> VersionInfo | None:
        name = self.version(patient)
        if name is None:
            return None
        if name.startswith(_IN_FOLDER):
            return self._plain_info(patient, current=True)
        return self._info(patient, name, name)

    def created(self, patient: str) -> str | None:
        """When the version that answers was made, as it says itself, be it empty; None: there is none. No weights are read.

        Raises AdapterError where `current` is damaged, ShardError where the place cannot be reached.
        """
        name = self.version(patient)
        if name is None:
            return None
        if name.startswith(_IN_FOLDER):
            found = self._plain(patient)
            return None if found is None else self._plain_created(*found)
        info = self._info(patient, name, name)
        return None if info is None else info.created

    def versions(self, patient: str) -> list[VersionInfo]:
        """All that can be rolled back to, the newest first; what lies at `<id>/` itself comes last."""
        check_patient_id(patient)
        named = self._named(patient)
        stored = [self._info(patient, name, named) for name in self._stored(patient)]
        plain = self._plain_info(patient, current=named is None)
        return [info for info in (*stored, plain) if info is not None]

    def put(self, patient: str, folder: Path) -> VersionInfo:
        """Store the adapter in `folder`, which is for the caller to check, and let it answer from now on.

        Raises AdapterError where files are missing, DataError or ShardError where the place cannot be written to.
        """
        check_patient_id(patient)
        paths = [path for path in sorted(folder.iterdir()) if path.suffix in KEPT_ENDINGS and path.name != CHECKSUMS]
        files = {path.name: path for path in paths if is_name(path.name) and path.is_file() and not path.is_symlink()}
        missing = [name for name in _NEEDED if name not in files]
        if missing:
            raise AdapterError(
                _("The adapter folder {folder} is incomplete; missing: {names}. Copy the whole folder again.").format(
                    folder=folder, names=", ".join(missing)
                )
            )
        digests = {name: _sha256(path) for name, path in files.items()}
        moment = datetime.now(UTC)
        name = f"{moment:%Y%m%dT%H%M%S%f}-{digests[WEIGHTS_FILE][:8]}"
        size = sum(path.stat().st_size for path in files.values())
        created = moment.isoformat(timespec="seconds")
        sums = {"created": created, "bytes": size, "files": digests}
        with self._writing:
            self._folder.put(f"{patient}/versions/{name}", {**files, CHECKSUMS: json.dumps(sums, indent=1).encode()})
            self._switch(patient, name)
            try:
                self._prune(patient, name)
            except ResonanceError as error:  # the new version answers; room is made next time
                _log.warning("%s", error)
        return VersionInfo(name, digests[WEIGHTS_FILE], created, size, True)

    def roll_back(self, patient: str, version: str | None = None) -> VersionInfo:
        """Let `version` answer again, or the one before the current one.

        Raises ServiceError 404 where there is none of that name, 409 where none is older, 422 where it is damaged.
        """
        with self._writing:
            found = self.versions(patient)
            if not found:
                raise not_found(patient)
            if version is None:
                at = next((i for i, info in enumerate(found) if info.current), -1)
                if at + 1 == len(found):
                    raise ServiceError(
                        409,
                        "no_older_version",
                        _("The adapter of {patient} has no older version.").format(patient=patient),
                        _("GET /patients/{patient}/adapter lists the versions.").format(patient=patient),
                    )
                wanted = found[at + 1]
            else:
                matching = [info for info in found if info.name == version]
                if not matching:
                    raise ServiceError(
                        404,
                        "version_not_found",
                        _("The adapter of {patient} has no such version.").format(patient=patient),
                        _("GET /patients/{patient}/adapter lists the versions.").format(patient=patient),
                        param="version",
                    )
                wanted = matching[0]
            if wanted.name.startswith(_IN_FOLDER):
                self._folder.remove(f"{patient}/{CURRENT}")
            else:
                try:
                    with self._folder.fetched(f"{patient}/versions/{wanted.name}", KEPT_ENDINGS) as local:
                        _verify(local, patient, WEIGHTS_FILE)
                except (AdapterError, FileNotFoundError) as error:
                    raise ServiceError(
                        422,
                        "adapter_unusable",
                        _("Version {version} of the adapter of {patient} is damaged; nothing was changed.").format(
                            version=wanted.name, patient=patient
                        ),
                        _("Choose another version, or upload the adapter again."),
                    ) from error
                self._switch(patient, wanted.name)
        return VersionInfo(wanted.name, wanted.fingerprint, wanted.created, wanted.bytes, True)

    def delete(self, patient: str) -> None:
        """Remove the adapter with all its versions. Of a run folder, what is not the adapter stays. Raises ServiceError 404
        where there is none."""
        check_patient_id(patient)
        with self._writing:
            stored = self._folder.folders(f"{patient}/versions")
            if not stored and not self.has(patient):
                raise not_found(patient)
            # `current` hides what lies at <id>/ itself, which would answer if `current` went first.
            while (found := self._plain(patient)) is not None:
                self._folder.remove(found[0])
            self._folder.remove(f"{patient}/{CURRENT}")
            self._folder.remove(f"{patient}/versions")
            if not self._folder.files(patient) and not self._folder.folders(patient):
                self._folder.remove(patient)

    def read(self, patient: str, version: str, base: AdapterBase) -> LoadedAdapter:
        """The adapter of `patient` as `version`, which `version()` has named, loaded for `base`.

        Raises AdapterError where it is not there (any longer), damaged or made for something else, ShardError where the
        place cannot be reached.
        """
        check_patient_id(patient)
        try:
            if version.startswith(_IN_FOLDER):
                return self._read_plain(patient, version, base)
            with self._folder.fetched(f"{patient}/versions/{version}", KEPT_ENDINGS) as local:
                sums = _verify(local, patient)
                adapter = _read(local, f"{patient}/versions/{version}", patient, version, base)
        except FileNotFoundError:
            raise AdapterError(
                _("Version {version} of the adapter of {patient} is not there, or only a part of it.").format(
                    version=version, patient=patient
                )
            ) from None
        if adapter.fingerprint != sums["files"][WEIGHTS_FILE]:
            raise _damaged(patient, WEIGHTS_FILE)
        return adapter

    def _read_plain(self, patient: str, version: str, base: AdapterBase) -> LoadedAdapter:
        found = self._plain(patient)
        if found is not None:
            with self._folder.fetched(found[0], KEPT_ENDINGS) as local:
                adapter = _read(local, found[0], patient, version, base)
            found = self._plain(patient)
        if found is None or _plain_name(found[1]) != version:
            raise AdapterError(_("The adapter of {patient} was changed while it was read.").format(patient=patient))
        return adapter

    def _named(self, patient: str) -> str | None:
        try:
            name = self._folder.read(f"{patient}/{CURRENT}").decode(errors="replace").strip()
        except FileNotFoundError:
            return None
        if not is_name(name) or name.startswith(_IN_FOLDER):
            raise _damaged(patient, CURRENT)
        return name

    def _plain(self, patient: str) -> tuple[str, dict[str, Any]] | None:
        """The adapter folder at `<id>/`, as `adapters.find` would name it, and its files."""
        for folder in (patient, f"{patient}/adapter", f"{patient}/model"):
            files = self._folder.files(folder)
            if adapters.INFO_FILE in files or "adapter_config.json" in files:
                return folder, files
        return None

    def _plain_info(self, patient: str, *, current: bool) -> VersionInfo | None:
        found = self._plain(patient)
        if found is None:
            return None
        folder, files = found
        fingerprint = ""
        if WEIGHTS_FILE in files:
            fingerprint = hashlib.sha256(self._folder.read(f"{folder}/{WEIGHTS_FILE}")).hexdigest()
        size = sum(files[name].size for name in _NEEDED if name in files)
        return VersionInfo(_plain_name(files), fingerprint, self._plain_created(folder, files), size, current)

    def _plain_created(self, folder: str, files: dict[str, Any]) -> str:
        info = files.get(adapters.INFO_FILE)
        if info is None or info.size > adapters.MAX_INFO_BYTES:
            return ""
        return str(_json(self._folder.read(f"{folder}/{adapters.INFO_FILE}")).get("created", ""))

    def _stored(self, patient: str) -> list[str]:
        """Names of versions, the newest first."""
        return sorted(filter(is_name, self._folder.folders(f"{patient}/versions")), reverse=True)

    def _info(self, patient: str, name: str, current: str | None) -> VersionInfo | None:
        """None where an upload was cut off."""
        try:
            sums = _json(self._folder.read(f"{patient}/versions/{name}/{CHECKSUMS}"))
            return VersionInfo(name, sums["files"][WEIGHTS_FILE], sums["created"], sums["bytes"], name == current)
        except (FileNotFoundError, KeyError, TypeError):
            return None

    def _switch(self, patient: str, name: str) -> None:
        self._folder.write(f"{patient}/{CURRENT}", f"{name}\n".encode())

    def _prune(self, patient: str, current: str) -> None:
        old = [name for name in self._stored(patient) if name != current]
        whole = [name for name in old if CHECKSUMS in self._folder.files(f"{patient}/versions/{name}")]
        cut_off = [name for name in old if name not in whole and _age(name) > _CUT_OFF_SECONDS]
        for name in (*whole[self._keep :], *cut_off):
            self._folder.remove(f"{patient}/versions/{name}")


def not_found(patient: str) -> ServiceError:
    return ServiceError(
        404,
        "adapter_not_found",
        _("There is no adapter of {patient}.").format(patient=patient),
        _("Check the id, or upload the adapter of this person first."),
        param="patient_id",
    )


def _read(local: Path, place: str, patient: str, version: str, base: AdapterBase) -> LoadedAdapter:
    try:
        return read_adapter(local, name=patient, version=version, base=base)
    except AdapterError as error:  # those who ask over a network are not told where things lie on this machine
        raise AdapterError(str(error).replace(str(local), place)) from error


def _plain_name(files: dict[str, Any]) -> str:
    signs = repr([(name, files[name].sign) for name in _NEEDED if name in files])
    return f"{_IN_FOLDER}{hashlib.sha256(signs.encode()).hexdigest()[:12]}"


def _verify(folder: Path, patient: str, *also: str) -> dict[str, Any]:
    """The contents of checksums.json, once every file has been compared with it but the weights, which are left to those
    that read them anyway unless they are named in `also`."""
    sums = _json((folder / CHECKSUMS).read_bytes())
    files = sums.get("files")
    if not isinstance(files, dict) or WEIGHTS_FILE not in files or not all(map(is_name, files)):
        raise _damaged(patient, CHECKSUMS)
    for name, digest in files.items():
        if (name != WEIGHTS_FILE or name in also) and _sha256(folder / name) != digest:
            raise _damaged(patient, name)
    return sums


def _damaged(patient: str, name: str) -> AdapterError:
    return AdapterError(
        _("The adapter of {patient} is damaged: {name} is not what was stored. Upload it again.").format(
            patient=patient, name=name
        )
    )


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _age(version: str) -> float:
    """Seconds since a version of this name was begun; 0 where the name says nothing."""
    try:
        begun = datetime.strptime(version.partition("-")[0], "%Y%m%dT%H%M%S%f").replace(tzinfo=UTC)
    except ValueError:
        return 0.0
    return time.time() - begun.timestamp()
