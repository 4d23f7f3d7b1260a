"""One recording on its way: decoded, cut into windows, heard by the adapter of the person who speaks, put together."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from resonance.data.audio import LOUDEST
from resonance.errors import DataError, ModelError
from resonance.messages import _
from resonance.model.lora_weights import LoadedAdapter
from resonance.serve.admission import Place
from resonance.serve.batcher import Batcher, Engine
from resonance.serve.decode_pool import AudioDecoder
from resonance.serve.faults import ServiceError, invalid_settings, store_unreachable
from resonance.serve.keeping import Keeping
from resonance.serve.pool import AdapterPool
from resonance.serve.speech import Answer, Decoded, SpeechRequest, Upload, Voice
from resonance.serve.threads import Threads
from resonance.serve.until import Until
from resonance.transcribe.assemble import UNHEARD, is_silent, put_together
from resonance.transcribe.longform import Samples, Window, windows
from resonance.transcribe.mixed_engine import Row
from resonance.transcribe.recognizer import DecodeSettings, TimedText, Transcript
from resonance.units import SAMPLE_RATE

log = logging.getLogger(__name__)
Rows = list[Future[Transcript]]
Coming = tuple[Window, Future[Transcript] | None]  # None: nobody speaks in it

BLOCK_SAMPLES = 30 * SAMPLE_RATE  # that the detector of speech is given at once
LOOK_SECONDS = 1.0  # then, what is in memory answers, though there may be a newer version
NO_AUDIO = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class Hearing:
    """What hears: the same for all requests."""

    engine: Engine
    pool: AdapterPool | None
    batcher: Batcher
    decoder: AudioDecoder
    threads: Threads
    language: str | None  # spoken where neither the request nor the adapter says
    store_seconds: float  # in which an adapter has to be read
    keeping: Keeping | None = None  # of recordings; None: they are not kept

    async def hear(
        self, request: SpeechRequest, place: Place, until: Until
    ) -> AsyncGenerator[TimedText | Answer, None]:
        """Each piece as soon as it and those before it are decoded; the Answer, with all of them, last."""
        decoded = await self._decoded(request, place, until)
        async with self._speaking(request, until) as (adapter, rows):
            settings = await self._settings(request, adapter, until)
            heard: list[tuple[Window, Transcript]] = []
            put = functools.partial(
                put_together,
                request.audio.name if isinstance(request.audio, Upload) else "",
                settings=settings,
                skip_nonspeech=request.skip_nonspeech,
                no_speech_threshold=settings.no_speech_threshold,
            )

            def submit(window: Window) -> Future[Transcript] | None:
                if request.skip_nonspeech and is_silent(window):
                    return None
                row = Row(window.audio, adapter, settings)
                rows.append(self.batcher.submit(row, (request.account, request.patient), request.deadline))
                return rows[-1]

            most = self.engine.best_clip_seconds(adapter)
            to_keep = decoded.samples if self.keeping is not None and request.may_keep else None
            warning, cutting = decoded.warning, self._cut(windows(_blocks(decoded.samples), most), submit, until)
            del decoded  # a long recording's samples go as they are heard
            async with contextlib.aclosing(cutting) as cut:
                async for window, row in cut:
                    found = UNHEARD if row is None else await until.get(asyncio.wrap_future(row))
                    place.answered(window.seconds)
                    heard.append((replace(window, audio=NO_AUDIO), found))
                    for piece in put(heard=heard[-1:]).segments:
                        yield piece
            voice = Voice(adapter.name, adapter.version, adapter.fingerprint) if adapter else None
            answer = Answer(put(heard=heard, error=warning), voice, self.engine.fingerprint)
            if self.keeping is not None and to_keep is not None:
                await self.keeping.keep(to_keep, answer, request.account, request.patient, until)
            yield answer

    async def _decoded(self, request: SpeechRequest, place: Place, until: Until) -> Decoded:
        if isinstance(request.audio, Upload):
            decoded = await until.get(self.decoder.decode(request.audio, request.deadline))
            request.audio.data = b""
            place.resize(len(decoded.samples) / SAMPLE_RATE)
            return decoded
        if not (np.abs(request.audio) <= LOUDEST).all():
            raise ServiceError(
                400,
                "audio_unreadable",
                _("There are samples that are not numbers, or far too large."),
                _("Send samples from -1 to 1."),
            )
        return Decoded(request.audio, None)

    @contextlib.asynccontextmanager
    async def _speaking(self, request: SpeechRequest, until: Until) -> AsyncIterator[tuple[LoadedAdapter | None, Rows]]:
        """The adapter that is to answer, kept in memory until the last of the rows that are put into the list is done."""
        adapter = await self._acquired(request, until)
        rows: Rows = []
        try:
            yield adapter, rows
        finally:
            for row in rows:
                row.cancel()
            if adapter is not None:
                _when_done(rows, functools.partial(self._pool(adapter.name).release, adapter))

    async def _acquired(self, request: SpeechRequest, until: Until) -> LoadedAdapter | None:
        if request.patient is None:
            return None
        try:
            return await self._adapter(self._pool(request.patient), request.patient, until)
        except ServiceError as error:
            if request.base_if_missing and error.code == "adapter_not_found":
                return None
            raise

    async def _adapter(self, pool: AdapterPool, patient: str, until: Until) -> LoadedAdapter:
        """Raises ServiceError 503 adapter_store_unreachable where the store takes too long, and nothing is in memory."""
        coming = pool.ask(patient, self.threads.read)
        if coming.done():
            return coming.result()
        future = asyncio.wrap_future(coming)
        try:
            if await until.done(future, LOOK_SECONDS):
                return future.result()
            if (held := pool.held(patient)) is not None:
                log.warning("%s: where the adapters are, nothing answers; version %s goes on", patient, held.version)
                coming.add_done_callback(functools.partial(give_back, pool))
                future.cancel()
                return held
            if await until.done(future, max(0.0, self.store_seconds - LOOK_SECONDS)):
                return future.result()
            log.warning("%s: where the adapters are, nothing answers for %g s", patient, self.store_seconds)
            raise store_unreachable()
        except BaseException:
            # Where nobody waits any more it may come yet.
            coming.add_done_callback(functools.partial(give_back, pool))
            future.cancel()
            raise

    def _pool(self, patient: str) -> AdapterPool:
        if self.pool is None:
            raise no_adapters(patient)
        return self.pool

    async def _settings(self, request: SpeechRequest, adapter: LoadedAdapter | None, until: Until) -> DecodeSettings:
        """Those of the request, completed, and checked against what the model and the adapter can do."""
        settings = request.settings
        if settings.language is None and not (adapter and adapter.info.language):
            settings = replace(settings, language=self.language)
        # How sure the model is says whether it made its text up.
        settings = replace(settings, scores=settings.scores or request.skip_nonspeech)
        checked = self.threads.cut(functools.partial(self.engine.check, settings, adapter))
        try:
            await until.get(asyncio.wrap_future(checked))
        except (DataError, ModelError) as error:
            raise invalid_settings(str(error)) from None
        return settings

    async def _cut(
        self,
        cut: Iterator[Window],
        submit: Callable[[Window], Future[Transcript] | None],
        until: Until,
    ) -> AsyncGenerator[Coming, None]:
        """The windows of a recording, all of which are submitted as soon as they are cut."""
        line: asyncio.Queue[Coming | None] = asyncio.Queue()

        async def cutting() -> None:
            try:
                while True:
                    window = await asyncio.wrap_future(self.threads.cut(functools.partial(next, cut, None)))
                    if window is None:
                        return
                    line.put_nowait((window, submit(window)))
            finally:
                line.put_nowait(None)

        task = asyncio.create_task(cutting())
        try:
            while (coming := await until.get(line.get())) is not None:
                yield coming
            await task
        finally:
            if not task.cancel() and not task.cancelled():
                task.exception()  # known already, or of no interest: otherwise asyncio logs that nobody asked


def no_adapters(patient: str) -> ServiceError:
    """The service has no place for adapters."""
    return ServiceError(
        404,
        "adapter_not_found",
        _("There is no adapter of {patient}: this service has none.").format(patient=patient),
        _("Start the service with --adapters and the folder where adapters are."),
        param="patient_id",
    )


def _blocks(samples: Samples) -> Iterator[Samples]:
    return (samples[first : first + BLOCK_SAMPLES] for first in range(0, len(samples), BLOCK_SAMPLES))


def give_back(pool: AdapterPool, coming: Future[LoadedAdapter]) -> None:
    if not coming.cancelled() and coming.exception() is None:
        pool.release(coming.result())


def _when_done(rows: Sequence[Future[Transcript]], then: Callable[[], None]) -> None:
    """Call `then` when the last of them is done: the model may be computing some that nobody waits for."""
    lock, left = threading.Lock(), len(rows)

    def count(_row: object) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            then()

    for row in rows:
        row.add_done_callback(count)
    if not rows:
        then()
