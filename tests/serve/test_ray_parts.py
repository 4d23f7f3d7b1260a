"""What the engine ray is made of, without a running Ray: settings, errors as values, marks, who is asked again."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

from resonance.config_serve import ServeConfig
from resonance.errors import DataError, MissingExtraError, ModelError, ResonanceError
from resonance.serve import ray_app, remote_service
from resonance.serve.app import failed
from resonance.serve.remote_service import RemoteService
from resonance.serve.replica import Mistake, mark

sys.path.insert(0, str(Path(__file__).parent))
from serving import request

PEOPLE = [f"p{i}" for i in range(8)]


def settings(**given: Any) -> ServeConfig:
    return ServeConfig.model_validate({"model": "somebody/whisper", "engine": "ray", **given})


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=re.escape('pip install "resonance-asr[ray]"')):
        ray_app.serve_with_ray(settings())


def test_copies_come_and_go_only_where_the_settings_leave_room() -> None:
    assert ray_app.scaling(settings(min_replicas=3)) == {"num_replicas": 3}
    wanted = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 16}
    assert ray_app.scaling(settings(max_replicas=4)) == {"autoscaling_config": wanted}


def test_paths_are_whole_before_they_go_to_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    found = ray_app.settled(settings(model="model", adapters="voices", tokens="tokens.json"))
    assert (found.model, found.adapters) == (str(tmp_path / "model"), tmp_path / "voices")
    assert found.tokens == tmp_path / "tokens.json" and found.audit_log is None
    away = ray_app.settled(settings(adapters="s3://bucket/voices"))
    assert (away.model, away.adapters) == ("somebody/whisper", "s3://bucket/voices")
    assert away.tokens is not None and away.tokens.is_absolute()


def test_an_error_of_a_copy_is_told_as_one_of_the_same_process() -> None:
    request = Request({"type": "http", "state": {"request_id": "1"}, "headers": []})
    pending, found = [DataError, ModelError], set[type[ResonanceError]]()
    while pending:
        found.add(kind := pending.pop())
        pending += kind.__subclasses__()
    for kind in sorted(found, key=lambda kind: kind.__name__):
        error = kind("what is wrong")
        here, there = failed(request, error), failed(request, Mistake.of(error).error())
        assert (there.status_code, there.body) == (here.status_code, here.body), kind
    assert {failed(request, kind("")).status_code for kind in found} == {400, 422, 500, 503}


@dataclass
class Asked:
    """Stands in for the copies: each time it is asked, the next of `ends` comes out."""

    ends: list[Any]
    seconds: list[float] = field(default_factory=list)

    def options(self, **_given: Any) -> Asked:
        return self

    def remote(self, _request: Any, seconds: float) -> Asked:
        self.seconds.append(seconds)
        return self

    def __await__(self) -> Iterator[Any]:
        yield from asyncio.sleep(0.05).__await__()
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def asked(*ends: Any) -> tuple[Any, list[float]]:
    """What comes of a request, and the seconds that each copy was given."""
    copies = Asked([*ends])
    service = RemoteService(settings(), copies, None, bytes(32))
    service._loaded = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_service, "_lost_copy", lambda: LookupError("copy_lost"))
        try:
            found = asyncio.run(service.transcribe(request(np.zeros(160, np.float32), "anna")))
        except LookupError as error:
            return str(error), copies.seconds
    return found, copies.seconds


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own use of pydantic
def test_another_copy_is_asked_only_where_one_has_died_over_the_request_and_only_once() -> None:
    exceptions = pytest.importorskip("ray.exceptions", reason="Ray is not installed")
    died, away = exceptions.ActorDiedError(), exceptions.ActorUnavailableError("no answer", None)
    answer, seconds = asked(died, "text")
    assert answer == "text" and len(seconds) == 2 and seconds[1] < seconds[0] - 0.04  # not the whole time again
    assert asked(died, died, "text")[0] == "copy_lost"  # a recording that kills copies does not get the third
    answer, seconds = asked(away, "text")  # it may be at work on it
    assert answer == "copy_lost" and len(seconds) == 1


def test_ray_is_told_marks_that_are_no_ids_and_others_at_each_start() -> None:
    marks = {mark(person, key) for person in PEOPLE for key in (bytes(32), bytes([1] * 32))}
    assert len(marks) == 2 * len(PEOPLE) and mark("p0", bytes(32)) == mark("p0", bytes(32))
    assert all(re.fullmatch("[0-9a-f]{24}", each) for each in marks)
