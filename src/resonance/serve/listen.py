"""The WebSocket /listen: text while a person speaks.

    client  {"type": "start", "patient_id": "anna", "language": "en", "sample_rate": 16000, "format": "pcm16"}
    server  {"type": "ready", …}
    client  binary messages with sound                       server  {"type": "partial", "text": …} now and then
                                                             server  {"type": "final", "text": …} for each utterance
    client  {"type": "end"}                                  server  {"type": "done", "text": all of it, …}, and closes

What goes wrong is {"type": "error", "error": …} in the one shape, and the last message: behind done, where the service stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, WebSocket, WebSocketDisconnect

from resonance.config_serve import ServeConfig
from resonance.messages import _
from resonance.serve import answers, fields
from resonance.serve.asking import MEGABYTE
from resonance.serve.auth import Auth, Caller
from resonance.serve.crowd import Sockets
from resonance.serve.faults import ServiceError, draining
from resonance.serve.listen_start import Start, start_of
from resonance.serve.live_audio import FEWEST_RATE, MOST_RATE, LiveAudio, Opus, Pcm
from resonance.serve.outer import Message, internal_error, log, where
from resonance.serve.patients import check_patient_id
from resonance.serve.routes_transcribe import fallback_of, settings_of
from resonance.serve.service import Service
from resonance.serve.speech import Answer, SpeechRequest
from resonance.serve.tokens import TokenFile
from resonance.serve.utterances import Utterance, Utterances
from resonance.transcribe.recognizer import DecodeSettings
from resonance.transcribe.segments import joined
from resonance.units import SAMPLE_RATE, WINDOW_SECONDS

router = APIRouter()
Made = TypeVar("Made")
EXTRA_SECONDS = 600.0  # of being connected, beyond those of the longest recording
READ_AHEAD_BYTES = 1 << 21  # of messages: a minute of PCM
PARTIAL_SECONDS = 1.0  # of new sound between two partial texts
# WebSocket close codes (RFC 6455): a message that is against the rules, too big, a fault of ours, try again later.
CLOSE_CODES = {413: 1009, 429: 1013, 503: 1013}


@router.websocket("/listen")
async def listen(socket: WebSocket) -> None:
    await socket.accept()
    state = socket.app.state
    try:
        await Session(socket, state.service, state.auth, state.config, stopping_of(socket.app)).run()
        await socket.close()
    except WebSocketDisconnect:
        pass
    except ServiceError as error:
        await refuse(socket, error)
    except asyncio.CancelledError:  # the time to finish what is under way is over
        await refuse(socket, draining())
        raise
    except Exception as error:
        log.error("listen: %s at %s", type(error).__name__, where(error))
        await refuse(socket, internal_error())


def stopping_of(app: FastAPI) -> asyncio.Event:
    """Set it, and all who listen finish: what they have heard so far is answered, then they are told why it was all."""
    app.state.stopping = found = getattr(app.state, "stopping", None) or asyncio.Event()
    return found


async def refuse(socket: WebSocket, error: ServiceError) -> None:
    socket.state.status = error.status  # for the audit log and the counts: the connection itself was taken, with 101
    body = error.body["error"] | ({} if error.retry_after is None else {"retry_after": error.retry_after})
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):
        await socket.send_json({"type": "error", "status": error.status, "error": body})
        await socket.close(CLOSE_CODES.get(error.status, 1011 if error.status >= 500 else 1008))


class Session:
    """One connection: one person, one stream of sound."""

    def __init__(
        self, socket: WebSocket, service: Service, auth: Auth, config: ServeConfig, stopping: asyncio.Event
    ) -> None:
        self.socket, self.service, self.auth, self.config, self.stopping = socket, service, auth, config, stopping
        # ServiceError: why no more is heard.
        self.messages: asyncio.Queue[Message | ServiceError] = asyncio.Queue()
        self.ahead = 0  # bytes in it
        self.room = asyncio.Event()
        self.reading: asyncio.Task[None]  # ends when the client goes away
        self.ending: ServiceError | None = None  # why no more is heard, where it was not the client who ended
        self.audio: LiveAudio
        self.settings: DecodeSettings
        self.start: Start
        self.patient: str | None
        self.caller: Caller
        self.fallback = False
        self.utterances = Utterances(WINDOW_SECONDS)
        self.text, self.count, self.bytes = "", 0, 0
        self.seconds = 0.0  # heard so far
        self.last: Answer | None = None
        self.adapters: list[Any] = []  # all that answered: there may be a newer one in between
        self.until = time.monotonic() + config.max_audio_seconds + EXTRA_SECONDS
        # Whether the token is valid still. It is no new request, and has permits of its own.
        unlimited = config.model_copy(update={"requests_per_minute": sys.maxsize})
        self.again = Auth(TokenFile(config.tokens), unlimited)
        self.partial: asyncio.Task[None] | None = None
        self.partial_at = 0.0  # seconds heard when the last partial text began

    async def run(self) -> None:
        stopped = asyncio.create_task(self.stopping.wait())
        stopped.add_done_callback(lambda _task: self.messages.put_nowait(draining()))
        self.reading = asyncio.create_task(self.read())
        try:
            await self.talk()
        finally:
            await ended(stopped)
            await ended(self.reading)

    async def read(self) -> None:
        """Messages before they are asked for: else nobody sees that the client goes away while its utterance waits."""
        while (message := await self.socket.receive())["type"] != "websocket.disconnect":
            self.ahead += _cost(message)
            self.messages.put_nowait(message)
            while self.ahead > READ_AHEAD_BYTES:
                self.room.clear()
                await self.room.wait()

    async def message_within(self, seconds: float) -> Message | ServiceError:
        """The next one, or why there is none. Raises TimeoutError, WebSocketDisconnect."""
        message = await asyncio.wait_for(self.unless_gone(self.messages.get()), seconds)
        if not isinstance(message, ServiceError):
            self.ahead -= _cost(message)
            self.room.set()
        return message

    async def sound_within(self, seconds: float) -> Message | ServiceError:
        """The next message that is not empty."""
        until = time.monotonic() + seconds
        while True:
            message = await self.message_within(until - time.monotonic())
            if isinstance(message, ServiceError) or message.get("bytes") != b"":
                return message

    async def unless_gone(self, work: Coroutine[Any, Any, Made]) -> Made:
        """What it gives. Cancelled where the client goes away: raises WebSocketDisconnect then."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait((task, self.reading), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise WebSocketDisconnect(1006)
            return task.result()
        finally:
            await ended(task)

    async def talk(self) -> None:
        """Who gives a good token with the request itself is known before anything is waited for; browsers cannot."""
        sockets: Sockets = self.socket.app.state.sockets
        self.header = self.socket.headers.get("authorization")
        self.host = self.socket.client.host if self.socket.client else ""
        start = refusal = None
        known = self.header is not None or self.config.auth == "off"
        if known:
            try:
                self.caller = self.auth.caller(self.header, self.host)
            except ServiceError as error:
                refusal = error
        if not known or refusal is not None:
            with sockets.stranger(self.messages.put_nowait):
                start = await self.first_message()
            if refusal is not None:  # only now: a client that is still about to send would not read it
                raise refusal
            self.header = f"Bearer {start.token}" if start.token else None
            self.caller = self.auth.caller(self.header, self.host)
        self.socket.state.account = self.caller.account
        with sockets.of(self.caller.account):
            self.open(start or await self.first_message())
            await self.converse()

    async def converse(self) -> None:
        await self.socket.send_json({"type": "ready", "patient_id": self.patient})
        try:
            while (data := await self.next_data()) is not None:
                self.audio.add(data)
                await self.hear()
            await self.hear(last=True)
            if (rest := self.utterances.end()) is not None:
                await self.finish(rest)
            await self.stop_partial()
            await self.socket.send_json(self.done())
            if self.ending is not None:
                raise self.ending
        finally:
            self.socket.state.audio_seconds = self.seconds
            self.audio.close()
            await self.stop_partial()

    async def first_message(self) -> Start:
        try:
            message = await self.message_within(self.config.header_seconds)
        except TimeoutError:
            raise ServiceError(
                408, "no_start", _("There was no first message."), _("Send the JSON message of type start first.")
            ) from None
        if isinstance(message, ServiceError):
            raise message
        return start_of(message.get("text") or "")

    def open(self, start: Start) -> None:
        """For whom, and how. Raises ServiceError."""
        if (state := self.service.state).status != "ready":
            raise state.refusal
        self.patient = self.caller.patient if start.patient_id is None else check_patient_id(start.patient_id)
        self.socket.state.patient = self.patient
        self.caller.allow(self.patient)
        # The same words mean the same as in a form.
        given = {
            name: [value]
            for name in ("fallback", "language", "task", "prompt")
            if (value := getattr(start, name)) is not None
        }
        if start.phrases:
            given["phrases"] = [json.dumps(start.phrases)]
        if start.phrases_only:
            given["phrases_only"] = ["true"]
        self.fallback = fallback_of(given, self.caller)
        self.settings = settings_of(given, self.config)
        self.audio = self.audio_of(start)
        self.start = start

    def audio_of(self, start: Start) -> LiveAudio:
        if start.format == "opus":
            return Opus(self.config.max_audio_seconds)
        if start.format != "pcm16":
            raise fields.wrong("format", start.format, _("It must be one of {choices}.").format(choices="pcm16, opus"))
        if not FEWEST_RATE <= start.sample_rate <= MOST_RATE:
            raise fields.wrong(
                "sample_rate",
                start.sample_rate,
                _("It must be a whole number from {least} to {most}.").format(least=FEWEST_RATE, most=MOST_RATE),
            )
        return Pcm(start.sample_rate)

    async def next_data(self) -> bytes | None:
        """The next sound; None where that was all."""
        idle, rest = self.config.idle_seconds, self.until - time.monotonic()
        try:
            message = await self.sound_within(min(idle, rest))
        except TimeoutError:
            if rest <= idle:
                text = _("The connection was open for longer than {most:g} seconds.")
                self.ending = too_long(text.format(most=self.config.max_audio_seconds + EXTRA_SECONDS))
                return None
            raise ServiceError(
                408,
                "idle",
                _("No sound came for {seconds:g} seconds.").format(seconds=idle),
                _("Send {end} when the person has finished.").format(end='{"type": "end"}'),
            ) from None
        if isinstance(message, ServiceError):
            self.ending = message
            return None
        data: bytes | None = message.get("bytes")
        if data is not None:
            self.bytes += len(data)
            if self.bytes > self.config.max_upload_mb * MEGABYTE:
                raise ServiceError(
                    413,
                    "upload_too_large",
                    _("More than {most:g} MB were sent.").format(most=self.config.max_upload_mb),
                    _("Connect again for more."),
                )
            return data
        if _is_end(message.get("text") or ""):
            return None
        raise ServiceError(
            400,
            "invalid_message",
            _("This message is neither sound nor the end."),
            _("Send {end} when the person has finished.").format(end='{"type": "end"}'),
        )

    async def hear(self, *, last: bool = False) -> None:
        """Sound goes to its utterance; what is finished is said, and the one under way now and then."""
        while len(samples := await self.audio.take(last=last)):
            self.seconds += len(samples) / SAMPLE_RATE
            if self.seconds > self.config.max_audio_seconds:
                raise too_long(_("More than {most:g} seconds were sent.").format(most=self.config.max_audio_seconds))
            # In a thread: 5 s of sound keep the detector busy for 15 ms, in which nobody else would be answered.
            for utterance in await asyncio.to_thread(self.utterances.add, samples):
                await self.finish(utterance)
            busy = self.partial is not None and not self.partial.done()
            begun = None if busy else self.utterances.under_way
            if begun is not None and self.seconds - self.partial_at >= PARTIAL_SECONDS:
                self.partial_at = self.seconds
                self.partial = asyncio.create_task(self.say_partial(begun))

    async def say_partial(self, begun: Utterance) -> None:
        """What the utterance under way sounds like so far. Where there is no time for it, nothing."""
        quick = replace(self.settings, temperatures=(0.0,), num_beams=1)
        with contextlib.suppress(ServiceError, RuntimeError, WebSocketDisconnect):
            answer = await self.answer(begun, quick, may_keep=False)
            if answer.result.text:
                await self.socket.send_json(self.message("partial", begun, answer))

    async def finish(self, utterance: Utterance) -> None:
        """Say all of an utterance. Its partial texts are over."""
        await self.stop_partial()
        answer = self.last = await self.unless_gone(self.answer(utterance, self.settings))
        if not answer.result.text:
            return
        self.text = joined(self.text, answer.result.text)
        await self.socket.send_json(self.message("final", utterance, answer))
        self.count += 1
        if (adapter := answers.voice_of(answer)["adapter"]) not in self.adapters:
            self.adapters.append(adapter)

    async def answer(self, utterance: Utterance, settings: DecodeSettings, *, may_keep: bool = True) -> Answer:
        self.again.caller(self.header, self.host).allow(self.patient)
        return await self.service.transcribe(
            SpeechRequest(
                audio=utterance.audio,
                patient=self.patient,
                base_if_missing=self.fallback,
                settings=settings,
                skip_nonspeech=self.start.skip_nonspeech,
                account=self.caller.account,
                deadline=time.monotonic() + self.config.deadline_seconds,
                may_keep=may_keep,
            )
        )

    async def stop_partial(self) -> None:
        task, self.partial = self.partial, None
        if task is not None:
            await ended(task)

    def message(self, kind: str, utterance: Utterance, answer: Answer) -> dict[str, Any]:
        return {
            "type": kind,
            "utterance": self.count,
            "start": round(utterance.start, 3),
            "end": round(utterance.start + len(utterance.audio) / SAMPLE_RATE, 3),
            "text": answer.result.text,
            "language": answer.result.language,
            **answers.voice_of(answer),
        }

    def done(self) -> dict[str, Any]:
        """The last message: all that was said."""
        voice = {} if self.last is None else answers.voice_of(self.last)
        return {
            "type": "done",
            "text": self.text,
            "duration": round(self.seconds, 3),
            "utterances": self.count,
            **voice,
            "adapters": self.adapters,
        }


def too_long(message: str) -> ServiceError:
    return ServiceError(413, "audio_too_long", message, _("Connect again for more."))


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel it where it is not done, and return when it is."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # of no interest: otherwise asyncio logs that nobody asked


def _cost(message: Message) -> int:
    return len(message.get("bytes") or message.get("text") or "") + 100  # so much an empty one takes


def _is_end(text: str) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found == {"type": "end"}
