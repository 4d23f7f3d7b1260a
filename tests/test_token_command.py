"""`resonance token`: made, listed and revoked as somebody at a terminal does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from resonance.cli import run
from resonance.serve.tokens import TokenFile


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESONANCE_HOME", str(tmp_path))
    return tmp_path / "tokens.json"


def test_a_token_is_shown_once_and_then_only_its_beginning(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["token", "create", "--name", "phone", "--patient", "anna"]) == 0
    printed = capsys.readouterr()
    secret = printed.out.rstrip("\n")  # alone, so that a script can take it
    said = printed.err.splitlines()
    assert "phone" in said[0] and "anna" in said[0]
    assert "not stored" in said[-1]
    assert secret not in printed.err
    token = TokenFile(path).find(secret)
    assert token and (token.scope, token.patient) == ("patient", "anna")
    assert run(["token", "list"]) == 0
    listed = capsys.readouterr().out
    assert token.prefix in listed and "phone" in listed and secret not in listed


@pytest.mark.parametrize(
    ("flags", "scope"), [([], "all"), (["--admin"], "admin"), (["--base"], "base"), (["--patient=ben"], "patient")]
)
def test_the_flags_say_what_a_token_is_for(path: Path, flags: list[str], scope: str) -> None:
    assert run(["token", "create", "--name", "x", *flags]) == 0
    assert [token.scope for token in TokenFile(path).tokens()] == [scope]


def test_a_revoked_token_stays_in_the_list_as_such(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["token", "create", "--name", "visit", "--admin", "--days", "3"])
    secret = capsys.readouterr().out.strip()
    run(["token", "list"])
    assert "; until " in capsys.readouterr().out
    assert run(["token", "revoke", "visit"]) == 0
    assert "revoked" in capsys.readouterr().out
    assert TokenFile(path).find(secret) is None
    run(["token", "list"])
    assert "revoked" in capsys.readouterr().out


def test_an_expired_token_is_listed_as_such(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["token", "create", "--name", "visit", "--days", "0.0000001"])
    capsys.readouterr()
    run(["token", "list"])
    assert "expired" in capsys.readouterr().out


def test_without_tokens_the_list_says_how_to_make_one(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["token", "list"]) == 0
    assert "resonance token create" in capsys.readouterr().out
    assert not path.exists()


def test_another_file_may_be_given(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    assert run(["token", "create", "--name", "x", "--tokens", str(other)]) == 0
    assert len(TokenFile(other).tokens()) == 1
    assert not path.exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["create"], "--name"),
        (["create", "--name", "x", "--admin", "--base"], "not allowed with"),
        (["create", "--name", "x", "--patient", "../y"], "--patient"),
        (["create", "--name", "x", "--days", "0"], "--days"),
        (["create", "--name", "x", "--days", "soon"], "--days"),
        (["create", "--name", ""], "--name"),
        (["revoke", "nobody"], "resonance token list"),
        (["revoke"], "NAME"),
        (["crate"], "Did you mean create?"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(
    path: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["token", *argv]) == 2
    assert words in capsys.readouterr().err
    assert not path.exists()
