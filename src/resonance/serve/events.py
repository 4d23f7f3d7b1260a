"""A transcript as server-sent events, in OpenAI's words."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

from resonance.serve import answers
from resonance.serve.faults import ServiceError
from resonance.serve.outer import internal_error, log, where
from resonance.serve.speech import Answer
from resonance.transcribe.recognizer import TimedText
from resonance.transcribe.segments import joined

Piece = TimedText | Answer
TOKENS_A_SECOND = 50  # of audio: positions of Whisper's encoder


async def first_of(pieces: AsyncIterator[Piece]) -> tuple[Piece, AsyncIterator[Piece]]:
    """The first piece, and the others. Until it is there, a refusal can still be a status."""
    return await anext(pieces), pieces


async def events(
    first: Piece, rest: AsyncIterator[Piece], prompt: str | None, *, logprobs: bool, tokens: answers.Tokens
) -> AsyncIterator[str]:
    """`transcript.text.delta` for each piece, then `transcript.text.done` with all of the text: the deltas together.

    What fails on the way is an event `error` of the one shape, and the last. However slowly they are read, the recording is
    heard at the model's pace: who does not read holds neither the adapter nor room in the queue.
    """
    said = ""
    line: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
    hearing = asyncio.create_task(_hear(rest, line))
    try:
        piece: Piece | None = first
        while piece is not None:
            if isinstance(piece, Answer):
                text = piece.result.text
                if text.startswith(said) and len(text) > len(said):
                    yield _event({"type": "transcript.text.delta", "delta": text[len(said) :]})
                yield _event(_done(piece, prompt, logprobs, tokens))
                return
            before, said = said, joined(said, piece.text)
            if said != before:
                delta: dict[str, Any] = {"type": "transcript.text.delta", "delta": said[len(before) :]}
                if logprobs:
                    delta["logprobs"] = answers.word_logprobs([piece])
                yield _event(delta)
            coming = await line.get()
            if isinstance(coming, Exception):
                raise coming
            piece = coming
    except ServiceError as error:
        yield _event({"type": "error", **error.body})
    except Exception as error:
        log.error("stream: %s at %s", type(error).__name__, where(error))
        yield _event({"type": "error", **internal_error().body})
    finally:
        hearing.cancel()
        await asyncio.wait([hearing])
        await _close(rest)  # a task that is cancelled before it has begun closes nothing


async def _hear(pieces: AsyncIterator[Piece], line: asyncio.Queue[Piece | Exception | None]) -> None:
    try:
        async for piece in pieces:
            line.put_nowait(piece)
        line.put_nowait(None)
    except Exception as error:
        line.put_nowait(error)
    finally:
        await _close(pieces)


async def _close(pieces: AsyncIterator[Piece]) -> None:
    close = getattr(pieces, "aclose", None)
    if close:
        await close()


def _done(answer: Answer, prompt: str | None, logprobs: bool, tokens: answers.Tokens) -> dict[str, Any]:
    heard = math.ceil(answer.result.duration * TOKENS_A_SECOND)
    asked = len(tokens(prompt)) if prompt else 0
    written = len(tokens(answer.result.text))
    found: dict[str, Any] = {
        "type": "transcript.text.done",
        "text": answer.result.text,
        # OpenAI's event knows usage in tokens only.
        "usage": {
            "type": "tokens",
            "input_tokens": heard + asked,
            "input_token_details": {"audio_tokens": heard, "text_tokens": asked},
            "output_tokens": written,
            "total_tokens": heard + asked + written,
        },
        "resonance": answers.voice_of(answer),
    }
    if logprobs:
        found["logprobs"] = answers.word_logprobs(answer.result.segments)
    return found


def _event(data: dict[str, Any]) -> str:
    return f"event: {data['type']}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
