"""The file with the tokens: hashes alone, whole at any moment, and noticed when it changes."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from resonance.errors import ConfigError
from resonance.serve import tokens
from resonance.serve.tokens import TokenFile, default_path


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "sub" / "tokens.json")


def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CHECK_SECONDS", 0.0)


def edited(file: TokenFile, **changes: Any) -> None:
    content = json.loads(file.path.read_text(encoding="utf-8"))
    content["tokens"][0] |= changes
    file.path.write_text(json.dumps(content), encoding="utf-8")


def test_a_token_is_found_by_its_secret_which_is_nowhere_in_the_file(file: TokenFile) -> None:
    token, secret = file.create("phone", "patient", patient="anna")
    assert file.find(secret) == token
    assert (token.scope, token.patient) == ("patient", "anna")
    text = file.path.read_text(encoding="utf-8")
    assert secret not in text and secret[len(token.prefix) :] not in text
    assert hashlib.sha256(secret.encode()).hexdigest() in text
    assert secret.startswith(token.prefix) and len(secret) - len(token.prefix) > 32
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("wrong", ["", "rsn_", "x" * 10_000, "é", "\udcff", "rsn_" + "A" * 43])
def test_any_other_secret_finds_nothing(file: TokenFile, wrong: str) -> None:
    token, secret = file.create("phone", "all")
    assert file.find(wrong) is None
    assert file.find(secret[:-1]) is None
    assert file.find(token.sha256) is None
    assert file.find(token.prefix) is None


def test_secrets_do_not_repeat(file: TokenFile) -> None:
    assert len({file.create(f"token {i}", "all")[1] for i in range(20)}) == 20


def test_a_service_that_runs_notices_new_and_revoked_tokens(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokens.CHECK_SECONDS <= 2
    no_waiting(monkeypatch)
    running = TokenFile(file.path)
    assert running.find("rsn_x") is None  # there is no file yet
    token, secret = file.create("phone", "all")
    assert running.find(secret) == token
    file.revoke("phone")
    assert running.find(secret) is None
    file.path.unlink()
    assert running.find(secret) is None


def test_the_file_is_read_again_only_when_it_has_changed(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    no_waiting(monkeypatch)
    _token, secret = file.create("phone", "all")
    running = TokenFile(file.path)
    assert running.find(secret)
    monkeypatch.setattr(running, "tokens", lambda: pytest.fail("read again"))
    assert running.find(secret)


def test_a_token_ends_when_its_days_are_over(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    token, secret = file.create("visit", "all", days=2)
    assert file.find(secret) == token and not token.expired
    later = datetime.now(UTC) + timedelta(days=2, seconds=1)
    monkeypatch.setattr(tokens, "_now", lambda: later)
    assert token.expired
    assert file.find(secret) is None


@pytest.mark.parametrize("days", [0, -1, float("nan"), float("inf"), 1e12])
def test_days_that_make_no_sense_are_refused(file: TokenFile, days: float) -> None:
    with pytest.raises(ConfigError, match="--days"):
        file.create("visit", "all", days=days)
    assert file.tokens() == []


def test_a_name_is_free_again_when_its_token_is_revoked(file: TokenFile) -> None:
    _first, old = file.create("phone", "all")
    with pytest.raises(ConfigError, match="already"):
        file.create("phone", "admin")
    file.revoke("phone")
    token, new = file.create("phone", "admin")
    assert file.find(new) == token and file.find(old) is None
    assert [one.revoked is not None for one in file.tokens()] == [True, False]


@pytest.mark.parametrize("name", ["", " phone", "a\nb", "\u202ephone", "x" * 65])
def test_names_that_could_not_be_told_apart_are_refused(file: TokenFile, name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        file.create(name, "all")


@pytest.mark.parametrize("patient", ["../x", "", "a/b", "manage", "😀"])
def test_a_patient_that_cannot_be_is_refused(file: TokenFile, patient: str) -> None:
    with pytest.raises(ConfigError, match="--patient"):
        file.create("phone", "patient", patient=patient)


def test_a_token_is_revoked_by_name_or_beginning(file: TokenFile) -> None:
    one, secret = file.create("phone", "all")
    other, kept = file.create("nurse", "all")
    assert file.revoke(one.prefix).name == "phone"
    assert file.find(secret) is None and file.find(kept) == other
    for which in ("phone", "nobody", ""):
        with pytest.raises(ConfigError, match="no token"):
            file.revoke(which)


def test_a_beginning_that_is_another_ones_name_revokes_neither(file: TokenFile) -> None:
    one, secret = file.create("phone", "all")
    file.create(one.prefix, "all")
    with pytest.raises(ConfigError, match="several"):
        file.revoke(one.prefix)
    assert file.find(secret) == one


def test_tokens_made_at_the_same_time_are_all_there(file: TokenFile) -> None:
    makers = [threading.Thread(target=TokenFile(file.path).create, args=(f"t{i}", "all")) for i in range(8)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert sorted(token.name for token in file.tokens()) == [f"t{i}" for i in range(8)]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"tokens": 3}', '{"tokens": [{"name": "x"}]}', '{"tokens": [', '{"tokens": [3]}', "\x00"],
)
def test_a_damaged_file_is_an_error_that_names_it(file: TokenFile, content: str) -> None:
    file.path.parent.mkdir()
    file.path.write_text(content, encoding="utf-8")
    for use in (file.tokens, lambda: file.find("rsn_x"), lambda: file.create("x", "all"), lambda: file.revoke("x")):
        with pytest.raises(ConfigError, match=r"tokens\.json"):
            use()
    assert file.path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    "changes",
    [
        {"scope": "root"},
        {"scope": "patient"},
        {"patient": "anna"},
        {"scope": "patient", "patient": 3},
        {"expires": "soon"},
        {"expires": "2020-01-01"},
        {"revoked": True},
        {"sha256": None},
        {"more": 1},
    ],
)
def test_a_right_that_is_not_understood_is_not_given(file: TokenFile, changes: dict[str, Any]) -> None:
    file.create("phone", "all")
    edited(file, **changes)
    with pytest.raises(ConfigError):
        file.tokens()


def test_damage_while_the_service_runs_lets_nobody_in_until_it_is_mended(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_waiting(monkeypatch)
    _token, secret = file.create("phone", "all")
    running = TokenFile(file.path)
    assert running.find(secret)
    good = file.path.read_text(encoding="utf-8")
    file.path.write_text(good[:50], encoding="utf-8")
    for _ in range(2):
        with pytest.raises(ConfigError):
            running.find(secret)
    file.path.write_text(good, encoding="utf-8")
    assert running.find(secret)


def test_a_file_that_others_may_write_is_refused(file: TokenFile) -> None:
    file.create("phone", "all")
    file.path.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod 600"):
        file.tokens()
    file.path.chmod(0o440)  # of a Kubernetes secret
    assert len(file.tokens()) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_what_root_writes_belongs_to_whom_the_folder_belongs(file: TokenFile) -> None:
    file.path.parent.mkdir()
    os.chown(file.path.parent, 12345, 12345)
    file.create("phone", "all")
    assert {path.stat().st_uid for path in file.path.parent.iterdir()} == {12345}
    os.chown(file.path, 4321, 4321)
    file.create("nurse", "all")
    assert file.path.stat().st_uid == 4321


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        TokenFile(tmp_path / "file" / "tokens.json").create("x", "all")


def test_the_usual_place_is_the_folder_of_resonance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESONANCE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "tokens.json"
    monkeypatch.delenv("RESONANCE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".config" / "resonance" / "tokens.json"
