"""What the front of the service and a copy of the model on another machine say to each other, and the copy itself."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import tempfile
import time
import uuid
import zipfile
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from resonance.config_serve import ServeConfig
from resonance.errors import (
    AdapterError,
    AudioError,
    DataError,
    ModelError,
    ResonanceError,
    ShardError,
    UnreachableError,
)
from resonance.serve.archives import unpack
from resonance.serve.faults import ServiceError
from resonance.serve.service import Service, create_service
from resonance.serve.speech import Answer, SpeechRequest
from resonance.serve.store import VersionInfo
from resonance.transcribe.recognizer import TimedText

Given = TypeVar("Given")
MEGABYTE = 1_000_000
MOST_FILES = 100


@dataclass(frozen=True, slots=True)
class Refusal:
    """A ServiceError as a value. As an exception it would lose all but its text on the way, and be logged with that."""

    status: int
    code: str
    message: str
    hint: str
    param: str | None
    retry_after: int | None

    @classmethod
    def of(cls, error: ServiceError) -> Refusal:
        return cls(error.status, error.code, error.message, error.hint, error.param, error.retry_after)

    def error(self) -> ServiceError:
        return ServiceError(
            self.status, self.code, self.message, self.hint, param=self.param, retry_after=self.retry_after
        )


# What `create_app` tells apart, the narrower before the wider.
KINDS: tuple[type[ResonanceError], ...] = (
    AdapterError,
    UnreachableError,
    ShardError,
    AudioError,
    ModelError,
    DataError,
)


@dataclass(frozen=True, slots=True)
class Mistake:
    """DataError, ModelError and what they are the roots of, as a value."""

    kind: int  # of KINDS
    message: str

    @classmethod
    def of(cls, error: DataError | ModelError) -> Mistake:
        kind = next(i for i, kind in enumerate(KINDS) if isinstance(error, kind))
        return cls(kind, str(error))

    def error(self) -> ResonanceError:
        return KINDS[self.kind](self.message)


@dataclass(frozen=True, slots=True)
class About:
    """What a copy says of itself."""

    copy: str  # a name for it
    base_name: str
    base_fingerprint: str
    figures: bytes  # in Prometheus's text format


class Replica:
    """One copy of the model with its adapters: a `Service` that is asked by another process.

    Times travel as seconds that are left, because every machine has a clock of its own.
    """

    async def __init__(self, config: ServeConfig, key: bytes) -> None:  # type: ignore[misc]  # Ray awaits it
        self.config, self.key = config, key
        self.held: set[str] = set()  # whose adapters have answered here
        self.name = uuid.uuid4().hex[:8]
        self.service: Service = create_service(config)
        await self.service.start()
        await self.service.loaded()
        self.check_health()

    def check_health(self) -> None:
        """Raises where the model does not answer any more: the copy is replaced then."""
        state = self.service.state
        if state.status == "broken":
            raise RuntimeError(state.reason)

    async def about(self) -> About:
        content, _type = self.service.metrics.exposition()
        return About(self.name, self.service.base_name, self.service.base_fingerprint, content)

    async def changed(self, patient: str) -> None:
        """The person's adapter is another now. Read before this returns, it answers whoever asks afterwards."""
        if self.service.pool is not None:
            self.service.pool.changed(patient)
            if patient in self.held:
                with contextlib.suppress(ServiceError):  # where there is none any more, the next request says so
                    await self.service.warm(patient)

    async def transcribe(self, request: SpeechRequest, seconds: float) -> Answer | Refusal | Mistake:
        """`seconds`: left until the deadline, whatever clock that was on."""
        answer = await _said(self.service.transcribe(replace(request, deadline=time.monotonic() + seconds)))
        if isinstance(answer, Answer):
            await self._announce(answer)
        return answer

    async def stream(
        self, request: SpeechRequest, seconds: float
    ) -> AsyncIterator[TimedText | Answer | Refusal | Mistake]:
        asked = replace(request, deadline=time.monotonic() + seconds)
        try:
            async with contextlib.aclosing(self.service.stream(asked)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Answer):
                        await self._announce(piece)
                    yield piece
        except ServiceError as error:
            yield Refusal.of(error)
        except (DataError, ModelError) as error:
            yield Mistake.of(error)

    async def check(self) -> Refusal | Mistake | None:
        return await _said(self.service.check())

    async def put_adapter(self, patient: str, packed: bytes) -> VersionInfo | Refusal | Mistake:
        """`packed`: the adapter folder as a zip file."""
        with tempfile.TemporaryDirectory(prefix="resonance-adapter-") as place:
            folder = Path(place) / "adapter"
            folder.mkdir()
            most = int(self.config.max_adapter_mb * MEGABYTE)

            async def put() -> VersionInfo:
                await asyncio.to_thread(unpack, packed, folder, most, MOST_FILES)
                return await self.service.put_adapter(patient, folder)

            return await _said(put())

    async def roll_back(self, patient: str, version: str | None) -> VersionInfo | Refusal | Mistake:
        return await _said(self.service.roll_back(patient, version))

    async def delete_adapter(self, patient: str) -> Refusal | Mistake | None:
        return await _said(self.service.delete_adapter(patient))

    async def _announce(self, answer: Answer) -> None:
        """Let the front know whose adapter is here. Only now: before, nobody was admitted, and no deadline held."""
        if answer.voice is not None:
            self.held.add(answer.voice.patient)
            await self.hold(mark(answer.voice.patient, self.key))

    async def hold(self, mark: str) -> str:
        """Overridden with Ray's bookkeeping of who holds what."""
        return mark


def mark(patient: str, key: bytes) -> str:
    """What stands for a person's id with Ray, whose figures and logs name it. key: 32 bytes, another at each start."""
    return hashlib.blake2b(patient.encode(), key=key, digest_size=12).hexdigest()


async def _said(work: Awaitable[Given]) -> Given | Refusal | Mistake:
    try:
        return await work
    except ServiceError as error:
        return Refusal.of(error)
    except (DataError, ModelError) as error:
        return Mistake.of(error)


def packed(folder: Path) -> bytes:
    """The files of an adapter folder as a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
    return buffer.getvalue()
