"""The WebSocket /listen: text while somebody speaks, all of it at the end, and refusals in the one shape."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from resonance.serve import listen, live_audio, tokens
from resonance.serve.live_audio import Opus
from resonance.serve.utterances import UNSURE_SECONDS, Utterances

START = {"type": "start", "patient_id": "bob", "language": "en"}
END = json.dumps({"type": "end"})
SECOND = 32_000  # bytes of PCM


def pcm(samples: np.ndarray) -> bytes:
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


def pieces(data: bytes, size: int) -> Iterable[bytes]:
    return (data[i : i + size] for i in range(0, len(data), size))


def talk(running: Any, start: Any, sent: Iterable[bytes | str], *, token: str | None = "admin") -> list[dict[str, Any]]:
    """All messages of the server, for these of the client. Raises nothing when the server closes."""
    headers = {"Authorization": f"Bearer {running.tokens.get(token, token)}"} if token else {}
    address = running.address.replace("http", "ws") + "/listen"
    with connect(address, additional_headers=headers, open_timeout=60) as socket:
        try:
            socket.send(start if isinstance(start, str | bytes) else json.dumps(start))
            for message in sent:
                socket.send(message)
        except ConnectionClosed:
            pass
        return list(received(socket))


def received(socket: ClientConnection) -> Iterable[dict[str, Any]]:
    try:
        while True:
            yield json.loads(socket.recv(timeout=60))
    except ConnectionClosed:
        return


def kinds(messages: Iterable[dict[str, Any]]) -> list[str]:
    return [message["type"] for message in messages]


def test_each_utterance_is_said_when_it_is_over_and_the_last_message_holds_all(
    running: Any, spoken: np.ndarray
) -> None:
    pause = np.zeros(2 * 16_000, np.float32)
    sound = pcm(np.concatenate([spoken, pause, spoken[::-1], pause, spoken]))
    heard = talk(running, START, [*pieces(sound, SECOND // 10), END])
    assert heard[0] == {"type": "ready", "patient_id": "bob"} and heard[-1]["type"] == "done"
    final = [message for message in heard if message["type"] == "final"]
    assert len(final) == 3 and [message["utterance"] for message in final] == [0, 1, 2]
    assert heard[-1]["text"] == " ".join(message["text"] for message in final) and heard[-1]["utterances"] == 3
    assert heard[-1]["duration"] == pytest.approx(len(sound) / SECOND, abs=0.01)
    for message in [*final, heard[-1]]:
        assert message["adapter"]["patient_id"] == "bob"
        assert message["base_fingerprint"] == running.service.base_fingerprint
    times = [time for message in final for time in (message["start"], message["end"])]
    assert times == sorted(times)


def test_the_last_message_names_every_adapter_that_answered(
    running: Any, spoken: np.ndarray, make_adapter: Callable[..., Path], openai_shaped: Path, tmp_path: Path
) -> None:
    utterance = pcm(np.concatenate([spoken, np.zeros(2 * 16_000, np.float32)]))
    store, final = running.service.store, []
    store.put("dora", make_adapter(tmp_path / "1", base=openai_shaped, seed=11, rank=4))
    try:
        with connect(
            running.address.replace("http", "ws") + "/listen",
            additional_headers={"Authorization": f"Bearer {running.tokens['admin']}"},
        ) as socket:
            socket.send(json.dumps(START | {"patient_id": "dora"}))
            for seed in (12, 13, None):
                socket.send(utterance)
                while (message := json.loads(socket.recv(timeout=60)))["type"] != "final":
                    pass
                final.append(message["adapter"])
                if seed == 12:
                    store.put("dora", make_adapter(tmp_path / "2", base=openai_shaped, seed=seed, rank=4))
            socket.send(END)
            done = list(received(socket))[-1]
    finally:
        store.delete("dora")
    assert final[0] != final[1] == final[2] == done["adapter"]
    assert done["adapters"] == final[:2]


def test_partial_texts_come_while_the_person_speaks(running: Any, spoken: np.ndarray) -> None:
    headers = {"Authorization": f"Bearer {running.tokens['admin']}"}
    with connect(running.address.replace("http", "ws") + "/listen", additional_headers=headers) as socket:
        socket.send(json.dumps(START))
        assert json.loads(socket.recv(timeout=60))["type"] == "ready"
        for piece in pieces(pcm(spoken), SECOND // 4):
            socket.send(piece)
        partial = json.loads(socket.recv(timeout=60))
        assert partial["type"] == "partial" and partial["text"]
        socket.send(END)
        assert kinds(received(socket))[-2:] == ["final", "done"]


def test_what_is_sent_in_any_division_and_at_any_rate_is_heard_to_its_end(running: Any, spoken: np.ndarray) -> None:
    whole = talk(running, START, [pcm(spoken), END])[-1]
    odd = talk(running, START, [*pieces(pcm(spoken), 3333), END])[-1]
    assert whole["text"] and odd == whole
    telephone = talk(running, START | {"sample_rate": 8000}, [pcm(spoken[::2]), END])[-1]
    assert telephone["type"] == "done" and telephone["duration"] == pytest.approx(whole["duration"], abs=0.01)


@pytest.mark.parametrize("container", ["ogg", "webm"])
def test_opus_is_decoded_as_it_comes(running: Any, speech: bytes, spoken: np.ndarray, container: str) -> None:
    data = speech if container == "ogg" else as_webm(spoken)
    heard = talk(running, START | {"format": "opus"}, [*pieces(data, 700), END])
    assert heard[-1]["type"] == "done" and heard[-1]["text"], heard[-1]
    assert heard[-1]["duration"] == pytest.approx(len(spoken) / 16_000, abs=0.1)


def as_webm(samples: np.ndarray) -> bytes:
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="webm", options={"live": "1"}) as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        wide = np.repeat(samples, 3).astype(np.float32)
        for i in range(0, len(wide), 960):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wide[None, i : i + 960]), "flt", "mono")
            frame.sample_rate, frame.pts = 48_000, i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def test_half_an_hour_in_a_small_message_is_decoded_no_further_than_it_is_taken() -> None:
    data = as_webm(np.zeros(90 * 16_000, np.float32))

    async def heard() -> tuple[int, list[int]]:
        sound = Opus(1000.0)
        sound.add(data)
        held, before = 0, -1
        while held == 0 or held > before:
            before, held = held, sum(len(block) for block in sound.ready)
            await asyncio.sleep(0.3)
        taken = []
        while size := len(await sound.take(last=True)):
            taken.append(size)
        sound.close()
        return held, taken

    held, taken = asyncio.run(heard())
    assert held < 11 * 16_000 and max(taken) <= 5 * 16_000
    assert sum(taken) == pytest.approx(90 * 16_000, abs=1600)


def test_a_decoder_that_waits_for_room_ends_with_its_session() -> None:
    sound = Opus(1000.0)
    sound.add(as_webm(np.zeros(30 * 16_000, np.float32)))
    assert sound.thread is not None
    while sum(len(block) for block in sound.ready) < live_audio.READY_SAMPLES:
        time.sleep(0.01)
    sound.close()
    sound.thread.join(5)
    assert not sound.thread.is_alive()


def test_what_is_not_decoded_in_time_after_the_end_is_an_error(
    running: Any, speech: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    frames = live_audio._frames

    def stuck(container: Any, stream: Any) -> Iterable[Any]:
        yield from list(frames(container, stream))[:30]
        may_end.wait(60)

    monkeypatch.setattr(live_audio, "_frames", stuck)
    monkeypatch.setattr(live_audio, "ENDING_SECONDS", 0.5)
    try:
        heard = talk(running, START | {"format": "opus"}, [speech, END])
    finally:
        may_end.set()
    assert (heard[-1]["status"], heard[-1]["error"]["code"]) == (504, "deadline_passed")


def test_a_long_message_is_heard_in_short_pieces_beside_the_loop(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces_heard: list[tuple[str, int]] = []
    add = Utterances.add

    def adding(self: Utterances, audio: np.ndarray) -> Any:
        pieces_heard.append((threading.current_thread().name, len(audio)))
        return add(self, audio)

    monkeypatch.setattr(Utterances, "add", adding)
    loops = {thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}
    assert talk(running, START, [bytes(SECOND * 12), END])[-1]["duration"] == 12
    assert max(length for _name, length in pieces_heard) <= 5 * 16_000
    assert not loops & {name for name, _length in pieces_heard}


def test_nothing_said_is_an_empty_text(running: Any) -> None:
    assert talk(running, START, [END])[-1]["text"] == ""
    silent = talk(running, START, [bytes(SECOND * 3), END])
    assert kinds(silent) == ["ready", "done"] and silent[-1]["text"] == ""


def test_a_token_in_the_first_message_opens_as_much_as_one_in_the_header(running: Any, spoken: np.ndarray) -> None:
    start = {"type": "start", "token": running.tokens["anna"]}
    heard = talk(running, start, [pcm(spoken), END], token=None)
    assert heard[0]["patient_id"] == "anna" and heard[-1]["adapter"]["patient_id"] == "anna"


def test_a_token_that_is_revoked_opens_no_further_utterance(
    running: Any, spoken: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "CHECK_SECONDS", 0.0)
    file = tokens.TokenFile(running.config.tokens)
    secret = file.create("guest", "patient", patient="bob")[1]
    utterance = pcm(np.concatenate([spoken, np.zeros(2 * 16_000, np.float32)]))
    with connect(
        running.address.replace("http", "ws") + "/listen", additional_headers={"Authorization": f"Bearer {secret}"}
    ) as socket:
        socket.send(json.dumps(START))
        socket.send(utterance)
        while json.loads(socket.recv(timeout=60))["type"] != "final":
            pass
        file.revoke("guest")
        socket.send(utterance)
        heard = list(received(socket))
    assert kinds(heard) == ["error"] and heard[0]["error"]["code"] == "token_invalid"


def test_nobody_stays_connected_for_ever(running: Any, spoken: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "EXTRA_SECONDS", 2 - running.config.max_audio_seconds)

    def little() -> Iterable[bytes]:
        yield pcm(spoken)
        for _i in range(100):
            yield b""
            time.sleep(0.1)

    heard = talk(running, START, little())
    assert kinds(heard)[-3:] == ["final", "done", "error"] and heard[-1]["error"]["code"] == "audio_too_long"


REFUSED: dict[str, tuple[Any, list[bytes | str], str | None, int, str]] = {
    "no token": (START, [], None, 401, "token_missing"),
    "wrong token": (START | {"token": "x"}, [], None, 401, "token_invalid"),
    "another's model": (START, [], "anna", 403, "not_yours"),
    "no JSON": ("hello", [], "admin", 400, "invalid_start"),
    "sound first": (b"\0\0", [], "admin", 400, "invalid_start"),
    "no start": ({"type": "begin"}, [], "admin", 400, "invalid_start"),
    "unknown name": (START | {"langage": "en"}, [], "admin", 400, "invalid_start"),
    "text for a number": (START | {"sample_rate": "16000"}, [], "admin", 400, "invalid_start"),
    "rate": (START | {"sample_rate": 1}, [], "admin", 400, "invalid_value"),
    "format": (START | {"format": "mp3"}, [], "admin", 400, "invalid_value"),
    "language": (START | {"language": "klingon"}, [], "admin", 400, "unsupported_language"),
    "malformed id": (START | {"patient_id": "../x"}, [], "admin", 400, "invalid_patient_id"),
    "unknown patient": (START | {"patient_id": "nobody"}, [bytes(SECOND), END], "admin", 404, "adapter_not_found"),
    "text in between": (START, ["and?"], "admin", 400, "invalid_message"),
    "JSON in between": (START, ["[" * 5000], "admin", 400, "invalid_message"),
    "no Opus": (START | {"format": "opus"}, [b"This is no Opus", END], "admin", 400, "audio_unreadable"),
    "broken Opus": (START | {"format": "opus"}, [b"OggS" + bytes(9000), END], "admin", 400, "audio_unreadable"),
    "longer than allowed": (START | {"sample_rate": 8000}, [bytes(500_000)] * 2, "admin", 413, "audio_too_long"),
    "larger than allowed": (START | {"sample_rate": 96_000}, [bytes(700_000)] * 3, "admin", 413, "upload_too_large"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals_have_the_one_shape_and_are_the_last_message(running: Any, case: Any) -> None:
    start, sent, token, status, code = case
    heard = talk(running, start, sent, token=token)
    assert heard[-1]["type"] == "error", heard
    assert (heard[-1]["status"], heard[-1]["error"]["code"]) == (status, code), heard[-1]
    assert heard[-1]["error"].keys() >= {"message", "type", "param", "code", "hint"}


def test_the_audit_log_has_who_was_refused(running: Any) -> None:
    log = Path(running.config.audit_log)
    before = len(log.read_text().splitlines()) if log.exists() else 0
    talk(running, START, [], token="anna")
    rows: list[dict[str, Any]] = []
    until = time.monotonic() + 10
    while not rows and time.monotonic() < until:  # written behind the answer
        rows = [json.loads(line) for line in log.read_text().splitlines()[before:] if "/listen" in line]
    assert [(row["account"], row["patient"], row["status"]) for row in rows] == [("anna", "bob", 403)]
    counted = running.service.metrics.registry.get_sample_value
    assert counted("resonance_requests_total", {"route": "/listen", "status": "403"})


def test_who_says_nothing_is_not_waited_for(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hasty = running.config.model_copy(update={"idle_seconds": 0.2})
    monkeypatch.setitem(running.server.config.app.state._state, "config", hasty)
    assert talk(running, START, [])[-1]["error"]["code"] == "idle"


@pytest.mark.parametrize("drain_seconds", [10.0, 0.0])
def test_a_service_that_stops_answers_what_was_said_and_says_why_no_more_is_heard(
    running: Any, start: Callable[..., Any], spoken: np.ndarray, tmp_path: Path, drain_seconds: float
) -> None:
    config = running.config.model_copy(update={"drain_seconds": drain_seconds, "audit_log": tmp_path / "audit"})
    found = start(config, running.tokens)
    try:
        address = found.running.address.replace("http", "ws") + "/listen"
        headers = {"Authorization": f"Bearer {running.tokens['admin']}"}
        with connect(address, additional_headers=headers) as socket, connect(address) as silent:
            socket.send(json.dumps(START))
            for piece in pieces(pcm(spoken), SECOND // 4):
                socket.send(piece)
            while drain_seconds and json.loads(socket.recv(timeout=60))["type"] != "partial":
                pass
            found.running.server.should_exit = True
            heard = list(received(socket))
            refused = list(received(silent))
    finally:
        found.stop()
    if drain_seconds:
        assert kinds(heard)[-3:] == ["final", "done", "error"] and heard[-2]["text"] == heard[-3]["text"] != ""
        assert refused[-1]["error"]["code"] == "draining"
    assert (heard[-1]["status"], heard[-1]["error"]["code"]) == (503, "draining")


def test_a_client_that_goes_away_leaves_nothing_behind(running: Any, spoken: np.ndarray) -> None:
    headers = {"Authorization": f"Bearer {running.tokens['admin']}"}
    with connect(running.address.replace("http", "ws") + "/listen", additional_headers=headers) as socket:
        socket.send(json.dumps(START | {"format": "opus"}))
        socket.send(b"OggS")
        socket.recv(timeout=60)
    assert talk(running, START, [pcm(spoken), END])[-1]["type"] == "done"


def test_the_utterance_of_a_client_that_has_gone_is_not_waited_for(
    running: Any, spoken: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, dropped = threading.Event(), threading.Event()

    async def never(_request: Any) -> None:
        waits.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            dropped.set()
            raise

    monkeypatch.setattr(running.service, "transcribe", never)
    monkeypatch.setattr(listen, "PARTIAL_SECONDS", 1e9)
    headers = {"Authorization": f"Bearer {running.tokens['admin']}"}
    with connect(running.address.replace("http", "ws") + "/listen", additional_headers=headers) as socket:
        socket.send(json.dumps(START))
        for message in (pcm(spoken), END, b"", b""):
            socket.send(message)
        assert waits.wait(30) and not dropped.is_set()
    assert dropped.wait(10)


def test_sound_in_which_the_detector_hears_nobody_is_not_thrown_away() -> None:
    soft = np.full(int(7 * UNSURE_SECONDS * 16_000), 1e-4, np.float32)
    soft[::2] *= -1
    cut = Utterances(30.0)
    found = [part for block in np.split(soft, 42) for part in cut.add(block)]
    last = cut.end()
    assert last is not None
    np.testing.assert_array_equal(np.concatenate([part.audio for part in [*found, last]]), soft)


def test_utterances_are_no_longer_than_the_model_hears(make_wav: Callable[..., bytes]) -> None:
    loud = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000 * 21).astype(np.float32)
    cut = Utterances(5.0)
    found = [*cut.add(loud), cut.end()]
    assert all(part is not None and len(part.audio) <= 5 * 16_000 for part in found)
    assert sum(len(part.audio) for part in found if part) == len(loud)
