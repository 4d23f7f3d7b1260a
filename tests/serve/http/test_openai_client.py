"""The official `openai` client against the real server: all formats, strictly validated, and its own classes of errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Model
from openai.types.audio import (
    Transcription,
    TranscriptionTextDeltaEvent,
    TranscriptionTextDoneEvent,
    TranscriptionVerbose,
    Translation,
)

# The client says that whisper-1 has a last day.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def ask(running: Any) -> Iterator[openai.OpenAI]:
    with client(running, "admin") as found:
        yield found


def client(running: Any, token: str) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{running.address}/v1",
        api_key=running.tokens.get(token, token),
        max_retries=0,
        _strict_response_validation=True,
    )


@pytest.fixture
def named(recording: bytes) -> tuple[str, bytes]:
    return "recording.wav", recording


def test_json_is_the_text_and_what_it_cost(ask: openai.OpenAI, named: Any) -> None:
    found = ask.audio.transcriptions.create(file=named, model="whisper-1", language="en")
    assert isinstance(found, Transcription) and found.text
    assert found.usage and found.usage.type == "duration" and found.usage.seconds == pytest.approx(1.94, abs=0.01)


def test_the_model_is_a_persons_name_and_the_answer_says_who_answered(
    running: Any, ask: openai.OpenAI, named: Any
) -> None:
    by_model = ask.audio.transcriptions.with_raw_response.create(file=named, model="bob", language="en")
    by_field = ask.audio.transcriptions.create(
        file=named, model="whisper-1", language="en", extra_body={"patient_id": "bob"}
    )
    assert by_model.parse().text == by_field.text
    assert by_model.headers["X-Resonance-Adapter"].startswith("bob; version=")
    assert by_model.headers["X-Resonance-Base"] == running.service.base_fingerprint
    with client(running, "anna") as anna:  # made for OpenAI, it knows whisper-1 only
        found = anna.audio.transcriptions.with_raw_response.create(file=named, model="whisper-1")
    assert found.headers["X-Resonance-Adapter"].startswith("anna; ")


def test_verbose_json_has_segments_words_or_both(ask: openai.OpenAI, named: Any) -> None:
    for wanted in (["segment"], ["word"], ["word", "segment"]):
        found = ask.audio.transcriptions.create(
            file=named, model="bob", language="en", response_format="verbose_json", timestamp_granularities=wanted
        )
        assert isinstance(found, TranscriptionVerbose)
        assert found.language == "english" and found.duration == pytest.approx(1.94, abs=0.01) and found.text
        assert bool(found.segments) == ("segment" in wanted) and bool(found.words) == ("word" in wanted)
        if found.segments:
            assert [segment.id for segment in found.segments] == [*range(len(found.segments))]
            assert all(segment.avg_logprob < 0 and segment.tokens for segment in found.segments)
            assert all(0 <= segment.start <= segment.end <= found.duration for segment in found.segments)
        if found.words:
            starts = [word.start for word in found.words]
            assert starts == sorted(starts) and all(word.word.strip() == word.word for word in found.words)


def test_left_out_granularities_give_segments_as_openai_does(ask: openai.OpenAI, named: Any) -> None:
    found = ask.audio.transcriptions.create(file=named, model="whisper-1", response_format="verbose_json")
    assert found.segments and found.words is None


def test_text_and_subtitles_are_plain(ask: openai.OpenAI, named: Any) -> None:
    texts = {
        form: ask.audio.transcriptions.create(file=named, model="bob", language="en", response_format=form)
        for form in ("text", "srt", "vtt")
    }
    assert all(isinstance(text, str) for text in texts.values())
    assert texts["srt"].startswith("1\n00:00:0") and " --> " in texts["srt"] and "," in texts["srt"]
    assert texts["vtt"].startswith("WEBVTT\n\n00:00:0")
    as_json = ask.audio.transcriptions.create(file=named, model="bob", language="en")
    assert texts["text"] == as_json.text + "\n"


def test_logprobs_are_those_of_the_words(ask: openai.OpenAI, named: Any) -> None:
    found = ask.audio.transcriptions.create(file=named, model="bob", language="en", include=["logprobs"])
    assert found.logprobs and all(word.logprob is not None and word.logprob <= 0 for word in found.logprobs)
    assert all(bytes(map(int, word.bytes or [])).decode() == word.token for word in found.logprobs)


def test_a_stream_ends_with_the_whole_text_which_its_pieces_make(
    ask: openai.OpenAI, spoken: Any, make_wav: Any
) -> None:
    import numpy as np

    long = make_wav(np.concatenate([spoken] * 18))  # 35 s: more than the model hears at once
    plain = ask.audio.transcriptions.create(file=("long.wav", long), model="bob", language="en")
    for include in ([], ["logprobs"]):
        stream = ask.audio.transcriptions.create(
            file=("long.wav", long), model="bob", language="en", stream=True, include=include
        )
        *deltas, done = list(stream)
        assert isinstance(done, TranscriptionTextDoneEvent) and done.text == plain.text
        assert all(isinstance(delta, TranscriptionTextDeltaEvent) for delta in deltas)
        assert len(deltas) > 1
        if not include:  # words of a model with random weights end in the middle of a character
            assert "".join(delta.delta for delta in deltas) == done.text
        assert done.usage and done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens > 0
        assert bool(done.logprobs) == bool(include)


def test_translations_have_all_formats_but_no_language(ask: openai.OpenAI, named: Any) -> None:
    assert isinstance(ask.audio.translations.create(file=named, model="whisper-1"), Translation)
    verbose = ask.audio.translations.create(file=named, model="whisper-1", response_format="verbose_json")
    assert verbose.language == "english" and verbose.text
    for form in ("text", "srt", "vtt"):
        assert isinstance(ask.audio.translations.create(file=named, model="whisper-1", response_format=form), str)


def test_models_are_the_base_by_its_names_and_those_the_token_opens(running: Any, ask: openai.OpenAI) -> None:
    base = ["random-whisper", "whisper-1"]
    assert [model.id for model in ask.models.list()] == [*base, "anna", "bob"]
    for token, others in (("all", ["anna", "bob"]), ("anna", ["anna"]), ("base", [])):
        with client(running, token) as caller:
            assert [model.id for model in caller.models.list()] == [*base, *others]
    assert isinstance(ask.models.retrieve("bob"), Model) and ask.models.retrieve("whisper-1").object == "model"


@pytest.mark.parametrize(
    ("kind", "code", "token", "asked"),
    [
        (openai.AuthenticationError, "token_invalid", "wrong", {"model": "whisper-1"}),
        (openai.PermissionDeniedError, "not_yours", "anna", {"model": "bob"}),
        (openai.PermissionDeniedError, "not_yours", "base", {"model": "bob"}),
        (openai.NotFoundError, "model_not_found", "admin", {"model": "nobody"}),
        (openai.NotFoundError, "model_not_found", "admin", {"model": "gpt 4o/x"}),
        (openai.BadRequestError, "unsupported_response_format", "admin", {"model": "bob", "response_format": "xml"}),
        (openai.BadRequestError, "unsupported_language", "admin", {"model": "bob", "language": "xx"}),
        (openai.BadRequestError, "audio_unreadable", "admin", {"model": "bob", "file": b"no audio at all, no audio"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_refusals_are_the_clients_own_errors_with_a_code_and_a_hint(
    running: Any, named: Any, kind: type[openai.APIStatusError], code: str, token: str, asked: Any, stream: bool
) -> None:
    with client(running, token) as caller, pytest.raises(kind) as caught:
        caller.audio.transcriptions.create(**({"file": named, "stream": stream} | asked))
    assert type(caught.value) is kind and caught.value.code == code
    assert isinstance(caught.value.body, dict) and caught.value.body["hint"]
    assert caught.value.request_id


def test_too_many_requests_are_a_rate_limit_error_with_whole_seconds_to_wait(
    running: Any, named: Any, start: Any
) -> None:
    from resonance.serve.auth import Auth

    state = running.server.config.app.state
    usual = state.auth
    state.auth = Auth.from_config(running.config.model_copy(update={"requests_per_minute": 1}))
    try:
        with client(running, "all") as caller:
            caller.models.list()
            with pytest.raises(openai.RateLimitError) as caught:
                caller.models.list()
    finally:
        state.auth = usual
    assert int(caught.value.response.headers["Retry-After"]) >= 1 and caught.value.type == "rate_limit_error"


def test_the_asynchronous_client_is_answered_as_well(running: Any, named: Any) -> None:
    async def both() -> tuple[str, str]:
        key = running.tokens["admin"]
        address = f"{running.address}/v1"
        async with openai.AsyncOpenAI(base_url=address, api_key=key, _strict_response_validation=True) as caller:
            ask = caller.audio.transcriptions.create
            plain, stream = await asyncio.gather(
                ask(file=named, model="anna", language="en"),
                ask(file=named, model="anna", language="en", stream=True),
            )
            events = [event async for event in stream]
            return plain.text, events[-1].text  # type: ignore[union-attr]

    plain, streamed = asyncio.run(both())
    assert plain == streamed


def test_what_fails_in_the_middle_of_a_stream_is_its_last_event() -> None:
    from resonance.serve.events import events
    from resonance.serve.faults import ServiceError
    from resonance.transcribe.recognizer import TimedText

    async def rest(error: Exception) -> Any:
        yield TimedText(1.0, 2.0, "two")
        raise error

    async def read(error: Exception) -> list[Any]:
        sent = events(TimedText(0.0, 1.0, "one"), rest(error), None, logprobs=False, tokens=list)
        return [json.loads(event.split("data: ")[1]) async for event in sent]

    refused = asyncio.run(read(ServiceError(504, "deadline_passed", "too late", "again")))
    assert [event["type"] for event in refused] == ["transcript.text.delta"] * 2 + ["error"]
    assert refused[-1]["error"]["code"] == "deadline_passed" and refused[1]["delta"] == " two"
    assert asyncio.run(read(RuntimeError("what was said")))[-1]["error"]["code"] == "internal_error"
