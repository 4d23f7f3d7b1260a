"""Windows of many people: in fair batches, each answered with its own transcript, whatever happens to the others."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resonance.errors import DataError
from resonance.serve.batcher import Batcher
from resonance.serve.fair_queue import FairQueue, Person, Room, Work
from resonance.serve.faults import ServiceError
from resonance.serve.metrics import Metrics
from resonance.serve.pace import Pace
from resonance.transcribe.mixed_engine import Row
from resonance.transcribe.recognizer import DecodeSettings, Transcript

sys.path.insert(0, str(Path(__file__).parent))
from scripted import WAIT, ScriptedEngine, clip, heard, number_of, voice

PROBE = Row(np.zeros(8000, np.float32), None, DecodeSettings("en"))
LATER = float("inf")
ANN, BO, CHEN = ("hospital", "ann"), ("hospital", "bo"), ("home", "chen")
Make = Callable[..., tuple[Batcher, ScriptedEngine]]


@pytest.fixture
def make() -> Iterator[Make]:
    """A function that starts a batcher with a scripted engine: gathers for ever unless it is told otherwise."""
    made: list[tuple[Batcher, ScriptedEngine]] = []

    def make(script: Callable[[Sequence[Row]], object] = lambda rows: None, **settings: Any) -> Any:
        engine = ScriptedEngine(script)
        usual: dict[str, Any] = {"batch_size": 8, "gather_seconds": 0.0, "longest_batch": 1e9}
        usual |= {"patient_seconds": 1e9, "stuck_seconds": 1e9}
        batcher = Batcher(engine, PROBE, observer=Metrics(), **usual | settings)
        made.append((batcher, engine))
        batcher.start()
        return batcher, engine

    yield make
    for batcher, engine in made:
        engine.go.set()
        batcher.close(lambda: ServiceError(503, "draining", "", ""))
        assert batcher.join(WAIT)


def row(number: int, *, name: str | None = None, seconds: float = 1.0, language: str | None = "en") -> Row:
    return Row(clip(number, seconds), voice(name) if name else None, DecodeSettings(language))


def while_busy(batcher: Batcher, engine: ScriptedEngine) -> Future[Transcript]:
    """The model has something to do until `engine.go` is set: what is submitted meanwhile waits."""
    engine.go.clear()
    engine.entered = threading.Semaphore(0)
    first = batcher.submit(row(0), ("nobody", None), LATER)
    assert engine.entered.acquire(timeout=WAIT)
    return first


def text_of(future: Future[Transcript]) -> str:
    return future.result(WAIT).text


def code_of(future: Future[Any]) -> tuple[int, str]:
    error = future.exception(WAIT)
    assert isinstance(error, ServiceError), error
    return error.status, error.code


# --- who is next ---


def works(*of: tuple[Person, int]) -> tuple[FairQueue, list[Work]]:
    queue, put = FairQueue(), []
    for number, (person, positions) in enumerate(of):
        put.append(Work(row(number), person, LATER, positions))
        queue.put(put[-1])
    return queue, put


def test_a_phrase_goes_into_the_batch_after_one_of_somebody_s_hour() -> None:
    queue, put = works(*[(ANN, 1500)] * 100, (BO, 100), (CHEN, 1500))
    batches = [queue.take(lambda positions: Room(4, 4)) for _ in range(3)]
    assert [work.person for work in batches[0]] == [ANN, CHEN, ANN, ANN]
    assert batches[1] == [put[100]]
    assert batches[2] == put[3:7]


def test_one_person_gets_no_more_of_a_batch_than_others_can_wait_for() -> None:
    queue, put = works(*[(ANN, 100)] * 5, *[(BO, 100)] * 2)
    assert queue.take(lambda positions: Room(8, 2)) == [put[0], put[5], put[1], put[6]]
    assert queue.take(lambda positions: Room(8, 2)) == put[2:4]


@pytest.mark.parametrize("whose", [ANN, CHEN])
def test_a_rare_audio_context_is_not_starved_by_a_common_one(whose: Person) -> None:
    """Neither that of somebody who has nothing else, nor that of somebody whose later windows ride in every batch."""
    queue, put = works(*[(BO, 100)] * 50, (whose, 1500), *[(ANN, 100)] * 50)
    batches = [queue.take(lambda positions: Room(2, 1)) for _ in range(3)]
    assert batches[0] == [put[0], put[51]]
    assert [put[50]] in batches


PEOPLE: list[Person] = [("x", None), ("x", "1"), ("x", "2"), ("y", "1")]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(PEOPLE), st.sampled_from([50, 100, 1500])), st.just("take"), st.just("remove")
        ),
        max_size=80,
    ),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_every_window_is_taken_once_in_its_turn(steps: list[Any], most: int, of_one: int) -> None:
    queue = FairQueue()
    waiting: list[Work] = []
    passed: dict[Work, int] = {}  # batches that went without it

    def take() -> None:
        batch = queue.take(lambda positions: Room(most, of_one))
        assert bool(batch) == bool(waiting) and len(batch) <= most and len({w.positions for w in batch}) <= 1
        for person in {work.person for work in batch}:
            own = [work for work in batch if work.person == person]
            same = [work for work in waiting if work.person == person and work.positions == own[0].positions]
            assert len(own) <= of_one and own == same[: len(own)]
        for work in batch:
            waiting.remove(work)
        for work in waiting:
            passed[work] += 1

    for step in steps:
        if step == "take":
            take()
        elif step == "remove" and waiting:
            assert queue.remove(waiting[0]) and not queue.remove(waiting[0])
            waiting.pop(0)
        elif step != "remove":
            work = Work(row(1, seconds=0.01), step[0], LATER, step[1])
            queue.put(work)
            waiting.append(work)
            ahead = sum(other.person == work.person for other in waiting)
            passed[work] = -ahead * len(PEOPLE)  # at most so many batches until all its person's older ones are served
        assert len(queue) == len(waiting) and set(queue) == set(waiting)
    while waiting:
        take()
    assert all(count <= 0 for count in passed.values())


# --- batches ---


def test_people_share_a_batch_and_each_gets_what_he_said(make: Make) -> None:
    batcher, engine = make()
    while_busy(batcher, engine)
    rows = [
        row(i, name=name, language=code)
        for i, (name, code) in enumerate([("ann", "en"), ("bo", "zh"), (None, "de")], 1)
    ]
    futures = [batcher.submit(each, ("home", each.adapter and each.adapter.name), LATER) for each in rows]
    engine.go.set()
    assert [text_of(future) for future in futures] == [heard(each) for each in rows]
    assert engine.batches[1:] == [[1, 2, 3]] and len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


def test_windows_of_other_audio_contexts_make_batches_of_their_own(make: Make) -> None:
    batcher, engine = make()
    while_busy(batcher, engine)
    futures = [batcher.submit(row(i, seconds=1 + i % 2), ANN, LATER) for i in range(1, 7)]
    engine.go.set()
    assert [text_of(future).split()[1] for future in futures] == [str(i) for i in range(1, 7)]
    assert engine.batches[1:] == [[1, 3, 5], [2, 4, 6]]


def test_a_window_waits_for_others_while_the_model_is_idle_but_not_for_more_than_fit(make: Make) -> None:
    batcher, engine = make(gather_seconds=10 * WAIT, batch_size=3)
    futures = [batcher.submit(row(i), ANN, LATER) for i in range(3)]
    assert [text_of(future).split()[1] for future in futures] == ["0", "1", "2"]
    assert engine.batches == [[0, 1, 2]]


def test_a_lone_window_is_decoded_when_the_gathering_is_over(make: Make) -> None:
    batcher, _engine = make(gather_seconds=0.01)
    assert text_of(batcher.submit(row(5), ANN, LATER)).startswith("base 5 ")


def test_who_has_just_been_answered_may_join_those_who_waited(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from resonance.serve import batcher as module

    monkeypatch.setattr(module, "PAUSE", 1e9)
    batcher, engine = make(gather_seconds=10 * WAIT, batch_size=2)
    engine.go.clear()
    first = [batcher.submit(row(i), ANN, LATER) for i in (1, 2)]
    assert engine.entered.acquire(timeout=WAIT)
    waited = batcher.submit(row(3), BO, LATER)
    engine.go.set()
    assert [text_of(future).split()[1] for future in first] == ["1", "2"]
    again = batcher.submit(row(4), ANN, LATER)
    assert text_of(waited) and text_of(again)
    assert engine.batches == [[1, 2], [3, 4]]


def test_batches_are_as_long_as_the_others_can_wait_as_measured(make: Make) -> None:
    batcher, engine = make(longest_batch=6.0)
    while_busy(batcher, engine)
    futures = [batcher.submit(row(i, seconds=2), ("x", str(i % 4)), LATER) for i in range(1, 9)]
    batcher.pace.took(2.0, 100, 1, 2.0)  # two seconds for each
    engine.go.set()
    for future in futures:
        text_of(future)
    assert engine.batches[1] == [1, 2, 3]


def test_the_pace_is_known_for_contexts_that_were_not_measured() -> None:
    pace = Pace()
    assert pace.window_seconds(100) is None and pace.throughput == 1.0
    pace.took(2.0, 100, 4, 8.0)
    assert pace.window_seconds(100) == 0.5 and pace.window_seconds(300) == 1.5 and pace.throughput == 4.0
    for _batch in range(50):
        pace.took(1.0, 100, 4, 8.0)
    assert pace.window_seconds(100) == pytest.approx(0.25, rel=1e-3) and pace.throughput == pytest.approx(8, rel=1e-3)


# --- who goes away ---


def test_what_nobody_waits_for_is_never_decoded(make: Make) -> None:
    batcher, engine = make()
    while_busy(batcher, engine)
    gone, late, kept = (
        batcher.submit(row(1), ANN, LATER),
        batcher.submit(row(2), BO, time.monotonic() - 1),
        batcher.submit(row(3), CHEN, LATER),
    )
    assert gone.cancel()
    engine.go.set()
    text_of(kept)
    assert engine.batches[1:] == [[3]]
    assert code_of(late) == (504, "deadline_passed")
    with pytest.raises(CancelledError):
        gone.result(0)


def test_somebody_who_goes_away_while_he_is_heard_harms_nobody(make: Make) -> None:
    batcher, engine = make()
    first = while_busy(batcher, engine)
    assert not first.cancel()  # too late
    engine.go.set()
    assert text_of(first).startswith("base 0 ")
    assert text_of(batcher.submit(row(1), ANN, LATER)).startswith("base 1 ")


# --- faults ---


def on(number: int, error: Callable[[], BaseException]) -> Callable[[Sequence[Row]], None]:
    """The model fails on every batch with that clip."""

    def script(rows: Sequence[Row]) -> None:
        if number in map(number_of, rows):
            raise error()

    return script


@pytest.mark.parametrize("place", range(1, 8))
def test_one_bad_window_fails_alone(place: int, make: Make) -> None:
    batcher, engine = make(on(place, lambda: ValueError("no such thing")))
    while_busy(batcher, engine)
    futures = {i: batcher.submit(row(i), ("x", str(i)), LATER) for i in range(1, 8)}
    engine.go.set()
    assert code_of(futures.pop(place)) == (500, "inference_failed")
    assert {i: int(text_of(future).split()[1]) for i, future in futures.items()} == {i: i for i in futures}
    assert batcher.fault is None
    assert len(engine.batches) <= 10  # the whole, halves, the culprit, and whether the model still answers


def test_settings_that_only_the_decoder_finds_wrong_are_refused_alone(make: Make) -> None:
    """A phrase may be too long in the language that is detected only then."""
    batcher, engine = make(on(2, lambda: DataError("the phrase “hold my hand” is too long")))
    while_busy(batcher, engine)
    futures = [batcher.submit(row(i), ANN, LATER) for i in (1, 2, 3)]
    engine.go.set()
    assert code_of(futures[1]) == (400, "invalid_settings")
    assert [text_of(futures[i]).split()[1] for i in (0, 2)] == ["1", "3"]


@pytest.mark.parametrize("error", [ValueError, DataError, SystemExit])
def test_what_somebody_wants_to_say_is_not_logged(
    error: type[BaseException], make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    batcher, _engine = make(on(1, lambda: error("hold my hand")))
    assert batcher.submit(row(1), ANN, LATER).exception(WAIT)
    assert error.__name__ in caplog.text and "scripted.py:" in caplog.text
    assert "hold my hand" not in caplog.text


def test_a_transcript_too_few_is_an_error_and_not_somebody_else_s_text(make: Make) -> None:
    batcher, engine = make()
    usual = engine.transcribe
    engine.transcribe = lambda rows: usual(rows)[1:] if len(rows) == 3 else usual(rows)  # type: ignore[method-assign]
    while_busy(batcher, engine)
    futures = [batcher.submit(row(i), ANN, LATER) for i in (1, 2, 3)]
    engine.go.set()
    assert [text_of(future).split()[1] for future in futures] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        MemoryError,
    ],
)
def test_a_batch_too_large_for_memory_is_halved_and_the_next_ones_are_smaller(
    error: Callable[[], BaseException], make: Make
) -> None:
    def script(rows: Sequence[Row]) -> None:
        if len(rows) > 2:
            raise error()

    batcher, engine = make(script)

    def eight() -> list[int]:
        engine.batches.clear()
        while_busy(batcher, engine)
        futures = [batcher.submit(row(i), ("x", str(i)), LATER) for i in range(1, 9)]
        engine.go.set()
        assert [int(text_of(future).split()[1]) for future in futures] == list(range(1, 9))
        return [len(batch) for batch in engine.batches[1:]]

    assert eight() == [8, 4, 2, 2, 4, 2, 2]
    assert eight() == [2, 2, 2, 2]
    assert batcher.fault is None
    assert any(max(eight()) > 2 for _time in range(20))  # more is tried again after a while


def test_a_window_that_does_not_fit_alone_is_refused_and_the_others_are_not(make: Make) -> None:
    batcher, engine = make(on(2, MemoryError))
    while_busy(batcher, engine)
    futures = [batcher.submit(row(i), ANN, LATER) for i in (1, 2, 3)]
    engine.go.set()
    assert code_of(futures[1]) == (503, "out_of_memory")
    assert text_of(futures[0]) and text_of(futures[2])


def test_an_error_keeps_nothing_of_the_batch_in_memory(make: Make) -> None:
    held: list[weakref.ref[Any]] = []

    def script(rows: Sequence[Row]) -> None:
        if number_of(rows[0]):
            computed = torch.zeros(10)
            held.append(weakref.ref(computed))
            raise ValueError("with what was computed in its traceback")

    batcher, _engine = make(script)
    failed = batcher.submit(row(1), ANN, LATER)
    assert code_of(failed) == (500, "inference_failed")
    text_of(batcher.submit(row(0), ANN, LATER))
    gc.collect()
    assert [ref() for ref in held] == [None]


def test_a_model_that_fails_on_everything_is_broken_until_it_answers_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resonance.serve import batcher as module

    monkeypatch.setattr(module, "EXAMINED_AGAIN", 0.01)
    works = threading.Event()

    def script(rows: Sequence[Row]) -> None:
        if not works.is_set():
            raise RuntimeError("CUDA error: device-side assert triggered")

    batcher, engine = make(script)
    while_busy(batcher, engine)
    futures = [batcher.submit(row(i), ANN, LATER) for i in range(1, 9)]
    engine.go.set()
    assert {code_of(future) for future in futures} <= {(500, "inference_failed"), (503, "broken")}
    assert batcher.fault is not None and "device-side" in batcher.fault
    works.set()
    assert batcher.check().result(WAIT) is None
    assert batcher.fault is None


def test_when_the_thread_ends_everybody_is_told(make: Make) -> None:
    batcher, engine = make(on(0, lambda: SystemExit("no")))
    first = while_busy(batcher, engine)
    waiting, asked = batcher.submit(row(1), ANN, LATER), batcher.check()
    engine.go.set()
    assert {code_of(future) for future in (first, waiting, asked, batcher.check())} == {(503, "broken")}
    with pytest.raises(ServiceError, match="SystemExit"):
        batcher.submit(row(2), BO, LATER)
    assert batcher.fault is not None


def test_a_batch_without_end_is_seen_and_so_is_its_end(make: Make) -> None:
    batcher, engine = make(stuck_seconds=0.0)
    first = while_busy(batcher, engine)
    assert batcher.fault is not None and "stuck" in batcher.fault
    asked = batcher.check(fresh_seconds=WAIT)
    assert not asked.done()
    engine.go.set()
    assert asked.result(WAIT) is None and text_of(first)
    assert batcher.fault is None


@pytest.mark.parametrize(("each", "patient", "stuck"), [(1e-4, 0.01, True), (1e-4, 1e9, False), (1e9, 0.01, False)])
def test_a_batch_is_stuck_when_it_takes_far_longer_than_batches_have(
    each: float, patient: float, stuck: bool, make: Make
) -> None:
    """So a large model on a slow machine is not, and one that was fast does not go unnoticed until the last deadline."""
    batcher, engine = make(patient_seconds=patient)
    batcher.pace.took(each, 50, 1, 1.0)
    while_busy(batcher, engine)
    time.sleep(0.02)
    assert (batcher.fault is not None) == stuck


# --- whether it answers ---


def test_an_idle_model_is_asked_and_not_again_at_once(make: Make) -> None:
    batcher, engine = make()
    for fresh_seconds, asked in [(1e9, 1), (1e9, 1), (0.0, 2)]:
        assert batcher.check(fresh_seconds).result(WAIT) is None
        assert len(engine.batches) == asked


def test_a_busy_model_has_answered_when_it_has_answered_anybody(make: Make) -> None:
    batcher, engine = make()
    while_busy(batcher, engine)
    asked = batcher.check()
    assert not asked.done()
    engine.go.set()
    assert asked.result(WAIT) is None
    assert engine.batches == [[0]]


def test_a_model_that_does_not_answer_is_not_ready(make: Make) -> None:
    batcher, _engine = make(on(0, lambda: RuntimeError("broken")))
    assert code_of(batcher.check()) == (503, "not_ready")


def test_closing_refuses_what_waits_and_finishes_what_is_under_way(make: Make) -> None:
    batcher, engine = make()
    first = while_busy(batcher, engine)
    waiting = batcher.submit(row(1), ANN, LATER)
    batcher.close(lambda: ServiceError(503, "draining", "stops", "", retry_after=5))
    assert code_of(waiting) == (503, "draining")
    with pytest.raises(ServiceError, match="stops"):
        batcher.submit(row(2), BO, LATER)
    engine.go.set()
    assert text_of(first)
    assert batcher.join(WAIT)
    assert engine.batches == [[0]]
