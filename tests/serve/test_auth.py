"""Who asks: what each token opens, what everybody else is told, and how often one may ask."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resonance.config_serve import ServeConfig
from resonance.errors import ConfigError
from resonance.serve import auth, tokens
from resonance.serve.auth import Auth, Caller, check_exposure
from resonance.serve.faults import ServiceError
from resonance.serve.tokens import TokenFile


def config_of(**changes: Any) -> ServeConfig:
    return ServeConfig(model="m", **changes)


class Clock:
    """time.monotonic() for the limits alone."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(auth, "time", clock)
    return clock


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "tokens.json")


def fault_of(guard: Auth, header: str | None, host: str = "192.0.2.1") -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        guard.caller(header, host)
    assert caught.value.hint
    return caught.value


def allows(caller: Caller, patient: str | None) -> bool:
    try:
        caller.allow(patient)
    except ServiceError as fault:
        assert (fault.status, fault.code) == (403, "not_yours")
        return False
    return True


@pytest.mark.parametrize(
    ("scope", "patient", "opened"),
    [
        ("admin", None, {"anna", "ben", None, "manage"}),
        ("all", None, {"anna", "ben", None}),
        ("patient", "anna", {"anna"}),
        ("base", None, {None}),
    ],
)
def test_a_token_opens_what_it_is_for_and_nothing_else(
    file: TokenFile, scope: tokens.Scope, patient: str | None, opened: set[str | None]
) -> None:
    _token, secret = file.create("phone", scope, patient=patient)
    caller = Auth(file, config_of()).caller(f"Bearer {secret}", "192.0.2.1")
    assert (caller.account, caller.patient) == ("phone", patient)
    assert {what for what in ("anna", "ben", None, "manage") if allows(caller, what)} == opened
    for check, what in ((caller.allow_base, None), (caller.allow_manage, "manage")):
        if what in opened:
            check()
        else:
            with pytest.raises(ServiceError):
                check()


def test_a_refusal_does_not_tell_whether_there_is_such_a_patient() -> None:
    caller = Caller("phone", admin=False, patient="anna")
    said = []
    for patient in ("ben", "nobody"):
        with pytest.raises(ServiceError) as caught:
            caller.allow(patient)
        said.append(caught.value.body)
    assert said[0] == said[1]
    assert "ben" not in str(said[0])


@pytest.mark.parametrize("header", [None, ""])
def test_no_token_is_401(file: TokenFile, header: str | None) -> None:
    fault = fault_of(Auth(file, config_of()), header)
    assert (fault.status, fault.code) == (401, "token_missing")


def test_a_wrong_expired_or_revoked_token_is_401_with_the_same_words(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "CHECK_SECONDS", 0.0)
    guard = Auth(file, config_of())
    _token, old = file.create("old", "admin", days=1e-9)
    _token, gone = file.create("gone", "admin")
    assert guard.caller(f"Bearer {gone}", "192.0.2.1").admin
    file.revoke("gone")
    headers = [
        f"Bearer {old}",
        f"Bearer {gone}",
        "Bearer",
        "Bearer x",
        f"Basic {gone}",
        gone,
        "Bearer " + "x" * 100_000,
    ]
    faults = [fault_of(guard, header) for header in headers]
    assert {(fault.status, fault.code, fault.message) for fault in faults} == {
        (401, "token_invalid", "The token is not valid.")
    }


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER  {} ", " Bearer {}"])
def test_the_header_is_read_as_clients_write_it(file: TokenFile, form: str) -> None:
    _token, secret = file.create("phone", "all")
    assert Auth(file, config_of()).caller(form.format(secret), "192.0.2.1").account == "phone"


def test_each_token_has_its_own_limit_which_fills_up_again(file: TokenFile, clock: Clock) -> None:
    secrets = [file.create(name, "all")[1] for name in ("one", "other")]
    guard = Auth(file, config_of(requests_per_minute=6))
    for _ in range(6):
        guard.caller(f"Bearer {secrets[0]}", "192.0.2.1")
    fault = fault_of(guard, f"Bearer {secrets[0]}")
    assert (fault.status, fault.code, fault.retry_after) == (429, "too_many_requests", 10)
    assert isinstance(fault.retry_after, int)
    guard.caller(f"Bearer {secrets[1]}", "192.0.2.1")
    clock.now += 9.9
    assert fault_of(guard, f"Bearer {secrets[0]}").retry_after == 1
    clock.now += 0.1
    guard.caller(f"Bearer {secrets[0]}", "192.0.2.1")
    clock.now += 3600
    for _ in range(6):
        guard.caller(f"Bearer {secrets[0]}", "192.0.2.1")
    assert fault_of(guard, f"Bearer {secrets[0]}").status == 429


def test_whoever_waits_as_long_as_it_says_gets_in(file: TokenFile, clock: Clock) -> None:
    _token, secret = file.create("one", "all")
    guard = Auth(file, config_of(requests_per_minute=7))
    for _ in range(7):
        guard.caller(f"Bearer {secret}", "192.0.2.1")
    for _ in range(20):
        clock.now += fault_of(guard, f"Bearer {secret}").retry_after or 0
        guard.caller(f"Bearer {secret}", "192.0.2.1")


def test_wrong_tokens_are_limited_by_address_and_right_ones_from_there_are_not(file: TokenFile, clock: Clock) -> None:
    _token, secret = file.create("phone", "all")
    guard = Auth(file, config_of())
    statuses = [fault_of(guard, "Bearer x").status for _ in range(auth.FAILURES_PER_MINUTE + 3)]
    assert statuses == [401] * auth.FAILURES_PER_MINUTE + [429] * 3
    assert guard.caller(f"Bearer {secret}", "192.0.2.1").account == "phone"
    assert fault_of(guard, "Bearer x", "192.0.2.2").status == 401


def test_all_addresses_of_a_household_are_one(file: TokenFile, clock: Clock) -> None:
    guard = Auth(file, config_of())
    for i in range(auth.FAILURES_PER_MINUTE):
        assert fault_of(guard, None, f"2001:db8:1:2::{i:x}").status == 401
    assert fault_of(guard, None, "2001:db8:1:2:ffff::1").status == 429
    assert fault_of(guard, None, "2001:db8:1:3::1").status == 401


def test_memory_for_addresses_is_bounded(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_BUCKETS", 50)
    guard = Auth(file, config_of())
    for i in range(500):
        fault_of(guard, None, f"10.0.{i // 256}.{i % 256}")
    assert len(guard._failures._levels) == 50


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.floats(0, 30), max_size=60), per_minute=st.integers(1, 50))
def test_no_more_than_the_limit_passes_in_any_minute_after_the_first_burst(steps: list[float], per_minute: int) -> None:
    clock = Clock()
    buckets = auth._Buckets(per_minute)
    before, auth.time = auth.time, clock  # type: ignore[assignment]
    try:
        passed = 0
        for step in steps:
            clock.now += step
            passed += buckets.take("x") == 0
            assert passed <= per_minute + (clock.now - 1000) * per_minute / 60 + 1e-6
    finally:
        auth.time = before  # type: ignore[assignment]


def test_threads_that_ask_at_once_get_no_more_than_the_limit(file: TokenFile, clock: Clock) -> None:
    _token, secret = file.create("phone", "all")
    guard = Auth(file, config_of(requests_per_minute=50))
    passed: list[str] = []

    def ask() -> None:
        for _ in range(20):
            try:
                passed.append(guard.caller(f"Bearer {secret}", "192.0.2.1").account)
            except ServiceError as fault:
                assert fault.status == 429

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 50


def test_tokens_that_cannot_be_read_let_nobody_in(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CHECK_SECONDS", 0.0)
    _token, secret = file.create("phone", "all")
    guard = Auth(file, config_of())
    guard.caller(f"Bearer {secret}", "192.0.2.1")
    file.path.write_text("{", encoding="utf-8")
    fault = fault_of(guard, f"Bearer {secret}")
    assert (fault.status, fault.code) == (503, "tokens_unreadable")
    assert str(file.path) not in str(fault.body)
    with pytest.raises(ConfigError):
        Auth.from_config(config_of(tokens=file.path))


def test_a_request_costs_microseconds(file: TokenFile) -> None:
    for i in range(50):
        _token, secret = file.create(f"token {i}", "all")
    guard = Auth(file, config_of(requests_per_minute=10_000_000))
    guard.caller(f"Bearer {secret}", "192.0.2.1")
    begun = time.process_time()
    for _ in range(1000):
        guard.caller(f"Bearer {secret}", "192.0.2.1")
    assert time.process_time() - begun < 0.5


def test_with_authentication_off_everybody_is_an_admin_by_address(file: TokenFile) -> None:
    guard = Auth(file, config_of(auth="off", requests_per_minute=1))
    for _ in range(3):
        assert guard.caller(None, "127.0.0.1") == Caller("127.0.0.1", admin=True, patient=None)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"])
def test_authentication_may_be_off_for_this_machine_alone(host: str) -> None:
    check_exposure(config_of(auth="off", host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "::ffff:192.0.2.1", "0", "[::]", "8.8.8.8"])
def test_authentication_may_not_be_off_where_others_reach_the_service(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        check_exposure(config_of(auth="off", host=host))
    check_exposure(config_of(auth="off", host=host, insecure=True))
    check_exposure(config_of(auth="token", host=host))


def test_a_name_counts_as_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*addresses: str) -> None:
        found = [(0, 0, 0, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(auth.socket, "getaddrinfo", lambda *_: found)

    look_up("127.0.0.1", "192.0.2.7")
    with pytest.raises(ConfigError, match="--insecure"):
        check_exposure(config_of(auth="off", host="localhost.example"))
    look_up("127.0.1.1")
    check_exposure(config_of(auth="off", host="my-laptop"))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 300, "x\0y"])
def test_a_name_of_no_address_is_an_error(host: str) -> None:
    with pytest.raises(ConfigError):
        check_exposure(config_of(auth="off", host=host))


def test_every_web_page_may_not_use_a_service_without_tokens() -> None:
    with pytest.raises(ConfigError, match="--cors_origins"):
        check_exposure(config_of(auth="off", cors_origins=["*"]))
    check_exposure(config_of(cors_origins=["*"]))
