"""The service without HTTP: a recording in, a transcript out, by the adapter of the person who speaks."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import numpy as np

from resonance.config_serve import ServeConfig
from resonance.config_types import memory_bytes
from resonance.errors import ResonanceError
from resonance.messages import _
from resonance.serve.admission import Admission, Place
from resonance.serve.batcher import Batcher, Engine
from resonance.serve.decode_pool import AudioDecoder, audio_decoder
from resonance.serve.faults import ServiceError, deadline_passed, draining, not_ready, store_unreachable
from resonance.serve.hearing import Hearing, give_back, no_adapters
from resonance.serve.keep_audio import KeptAudio
from resonance.serve.keeping import Keeping
from resonance.serve.metrics import Metrics
from resonance.serve.pool import AdapterPool
from resonance.serve.speech import Answer, SpeechRequest, Upload
from resonance.serve.state import State
from resonance.serve.store import AdapterStore, VersionInfo
from resonance.serve.threads import BusyError, Threads
from resonance.serve.until import Until, in_time, stored
from resonance.transcribe.mixed_engine import Row, load_mixed
from resonance.transcribe.recognizer import DecodeSettings, TimedText
from resonance.units import SAMPLE_RATE

log = logging.getLogger(__name__)
Made = TypeVar("Made")

# What an upload is taken for until it is decoded: 16 bits a sample at 16 kHz. Less, where it is compressed; then there must
# be room for what it turns out to be.
UPLOAD_BYTES_PER_SECOND = 2 * SAMPLE_RATE
BATCH_SHARE = 0.6  # of the time in which the model has to say that it is there, for a batch before that
STUCK_READY = 3  # a batch that takes so many times that, and far more than batches have taken so far, never ends
STUCK_DEADLINES = 2  # nor does one that takes so many times the deadline of a request
CLOSING_SECONDS = 5.0  # for the end of the batch under way when nobody waits for it any more


class Service:
    """One model and the adapters of many people. Belongs to one event loop; the model to a thread of its own.

    Without an engine, `load` makes it and the pool in a thread, and `start` returns at once.
    """

    def __init__(
        self,
        config: ServeConfig,
        engine: Engine | None,
        pool: AdapterPool | None,
        decoder: AudioDecoder,
        metrics: Metrics,
        *,
        load: Callable[[], tuple[Engine, AdapterPool | None]] | None = None,
        kept: KeptAudio | None = None,
    ) -> None:
        self.config, self.metrics, self.pool = config, metrics, pool
        self._engine, self._decoder, self._load = engine, decoder, load
        self._keeping = Keeping(kept, metrics.not_kept) if kept else None
        self._loaded: Hearing | None = None
        self._loading: asyncio.Task[None] | None = None
        self._failure: str | None = None  # why there is no model
        self._draining = False
        self._threads = Threads()
        self._admission = Admission(
            config.max_queued_seconds,
            config.max_queued_seconds_per_person,
            lambda: self._loaded.batcher.pace.throughput if self._loaded else 1.0,
        )
        metrics.watch_queue(lambda: self._admission.seconds)
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Take up work. Given an engine, the service is ready or broken when this returns; else it may be loading."""
        self._ended = asyncio.get_running_loop().create_future()
        self._loading = asyncio.create_task(self._make_ready())
        if self._keeping is not None:
            self._keeping.start()
        if self._engine is not None:
            await self._loading

    async def loaded(self) -> State:
        """The state when loading has ended."""
        if self._loading is not None:
            await asyncio.wait([self._loading])
        return self.state

    @property
    def state(self) -> State:
        if self._draining:
            return State("draining")
        if self._failure is not None:
            return State("broken", self._failure)
        if self._loaded is None:
            return State("loading")
        fault = self._loaded.batcher.fault
        return State("broken", fault) if fault else State("ready")

    @property
    def base_name(self) -> str:
        return self._loaded.engine.name if self._loaded else self.config.model

    @property
    def base_fingerprint(self) -> str:
        """Of the base model's weights; empty until it is loaded."""
        return self._loaded.engine.fingerprint if self._loaded else ""

    @property
    def store(self) -> AdapterStore | None:
        return self.pool.store if self.pool else None

    def tokens(self, text: str) -> list[int]:
        """The model's tokens of a text, as OpenAI's segments list them."""
        return self._working().engine.tokens(text)

    async def check(self) -> None:
        """Return when the model has answered, if only to silence. Raises ServiceError 503."""
        if self._draining or self._loaded is None:
            raise self.state.refusal
        seconds = self.config.ready_seconds
        asked = self._loaded.batcher.check(fresh_seconds=seconds)
        try:
            await asyncio.wait_for(asyncio.wrap_future(asked), seconds)
        except TimeoutError:
            raise not_ready(_("it did not in {seconds:g} s.").format(seconds=seconds)) from None

    async def drain(self, seconds: float) -> None:
        """Take no more requests, finish those under way within so many seconds, refuse the rest, and end."""
        self._draining = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        with contextlib.suppress(asyncio.TimeoutError):  # who does not read his stream is not waited for
            await asyncio.wait_for(self._idle.wait(), CLOSING_SECONDS)
        if self._loading is not None:
            self._loading.cancel()
        if self._loaded is not None:
            self._loaded.batcher.close(draining)
            with contextlib.suppress(RuntimeError):  # no thread can be started to wait in
                await asyncio.to_thread(self._loaded.batcher.join, CLOSING_SECONDS)
        self._threads.close()
        if self._keeping is not None:
            self._keeping.close()
        await self._decoder.close()

    async def transcribe(self, request: SpeechRequest) -> Answer:
        """The transcript. Raises ServiceError. Cancelled, it takes what has not been decoded out of the queue."""
        async with contextlib.aclosing(self.stream(request)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Answer):
                    return piece
        raise AssertionError("a stream ends with the answer")

    async def stream(self, request: SpeechRequest) -> AsyncGenerator[TimedText | Answer, None]:
        """Each piece as soon as it and those before it are decoded; the Answer, with all of them, last.

        Raises ServiceError, before the first piece where the recording, the person or the load is to blame. Who stops
        reading closes it (`contextlib.aclosing`), which takes the rest out of the queue.
        """
        began = time.monotonic()
        try:
            hearing, ended = self._working(), self._ended
            assert ended is not None
            with self._admitted(request) as place:
                hear = hearing.hear(request, place, Until(request.deadline, ended, draining))
                async with contextlib.aclosing(hear) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Answer):
                            self.metrics.answered(piece.result.duration, time.monotonic() - began)
                        yield piece
        except ServiceError as error:
            self.metrics.refused(error.code)
            raise

    async def put_adapter(self, patient: str, folder: Path) -> VersionInfo:
        """Check an adapter folder, keep it, and let it answer from now on. Raises ServiceError 422, 503 where too much waits
        to be stored, 504 where it takes too long; ResonanceError where it cannot be stored."""

        def put(pool: AdapterPool) -> VersionInfo:
            pool.check(folder)
            return pool.store.put(patient, folder)

        return await self._change(patient, put)

    async def roll_back(self, patient: str, version: str | None = None) -> VersionInfo:
        """Let an earlier version answer from now on; without `version`, the one before."""
        return await self._change(patient, lambda pool: pool.store.roll_back(patient, version))

    async def delete_adapter(self, patient: str) -> None:
        """Delete all versions."""
        await self._change(patient, lambda pool: pool.store.delete(patient))

    async def _change(self, patient: str, change: Callable[[AdapterPool], Made]) -> Made:
        pool = self.pool
        if pool is None:
            raise no_adapters(patient)

        def changed() -> Made:
            try:
                return change(pool)
            finally:
                pool.changed(patient)

        try:
            coming = self._threads.write(changed)
        except BusyError:
            raise store_unreachable() from None
        return await in_time(coming, self.config.deadline_seconds, deadline_passed)

    async def read(self, function: Callable[[], Made]) -> Made:
        """What `function` finds where the adapters are. Raises ServiceError 503 where nothing answers there."""
        return await stored(self._threads, function, self.config.store_seconds)

    async def warm(self, patient: str) -> None:
        """Let the adapter of `patient` be in memory. Raises ServiceError where it cannot be."""
        if self.pool is not None:
            coming = self.pool.ask(patient, self._threads.read)
            coming.add_done_callback(functools.partial(give_back, self.pool))
            await in_time(coming, self.config.store_seconds, store_unreachable)

    async def _make_ready(self) -> None:
        batcher: Batcher | None = None
        try:
            await self._decoder.start()
            if self._engine is None:
                assert self._load is not None
                engine, self.pool = await asyncio.wrap_future(_in_thread(self._load))
            else:
                engine = self._engine
            batcher = self._batcher(engine)
            batcher.start()
            await asyncio.wrap_future(batcher.check())
            if self.pool is not None:
                self.metrics.watch_pool(self.pool.stats)
            self._loaded = Hearing(
                engine,
                self.pool,
                batcher,
                self._decoder,
                self._threads,
                self.config.language,
                self.config.store_seconds,
                self._keeping,
            )
        except Exception as error:
            if not isinstance(error, ResonanceError):
                log.exception("the model cannot be loaded")
            self._failure = str(error) if isinstance(error, ResonanceError) else f"{type(error).__name__}: {error}"
        finally:
            if batcher is not None and self._loaded is None:
                batcher.close(lambda: self.state.refusal)

    def _batcher(self, engine: Engine) -> Batcher:
        config = self.config
        known = DecodeSettings(language=config.language or "en", max_new_tokens=1)
        return Batcher(
            engine,
            Row(np.zeros(SAMPLE_RATE, np.float32), None, known),
            batch_size=config.batch_size,
            gather_seconds=config.gather_ms / 1000,
            longest_batch=BATCH_SHARE * config.ready_seconds,
            patient_seconds=STUCK_READY * config.ready_seconds,
            stuck_seconds=STUCK_DEADLINES * config.deadline_seconds,
            observer=self.metrics,
        )

    def _working(self) -> Hearing:
        """Raises ServiceError where no request can be taken."""
        if self._loaded is None or self.state.status != "ready":
            raise self.state.refusal
        return self._loaded

    @contextlib.contextmanager
    def _admitted(self, request: SpeechRequest) -> Iterator[Place]:
        audio, most = request.audio, self.config.max_audio_seconds
        if isinstance(audio, Upload):
            seconds = min(most, len(audio.data) / UPLOAD_BYTES_PER_SECOND)
        else:
            seconds = len(audio) / SAMPLE_RATE
            if seconds > most:
                raise ServiceError(
                    413,
                    "audio_too_long",
                    _("{seconds:.0f} s of audio; the longest recording is {most:g} s.").format(
                        seconds=seconds, most=most
                    ),
                    _("Cut the recording and send its parts."),
                )
        with self._admission.enter((request.account, request.patient), seconds) as place:
            self._under_way += 1
            self._idle.clear()
            try:
                yield place
            finally:
                self._under_way -= 1
                if not self._under_way:
                    self._idle.set()


def create_service(config: ServeConfig) -> Service:
    """The service that the settings describe. Its model and its adapters are loaded when it is started.

    Raises ConfigError where recordings are to be kept and cannot be.
    """

    def load() -> tuple[Engine, AdapterPool | None]:
        engine = load_mixed(config.model, device=config.device)
        if config.adapters is None:
            return engine, None
        store = AdapterStore(config.adapters)
        return engine, AdapterPool(store, engine, memory_bytes(config.adapter_memory), config.refresh_seconds)

    return Service(config, None, None, audio_decoder(config), Metrics(), load=load, kept=KeptAudio.from_config(config))


def _in_thread(function: Callable[[], Made]) -> Future[Made]:
    """Unlike one of a pool, the thread does not keep the process alive: whoever stops a service that is loading need not wait."""
    future: Future[Made] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="resonance-load", daemon=True).start()
    return future
