"""Bearer tokens: who may ask the service, and for whom. A file of hashes that commands write and the service reads."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from resonance.data.textfile import write_text_atomic
from resonance.errors import ConfigError
from resonance.messages import _
from resonance.serve.patients import MAX_LETTERS, is_name

Scope = Literal["admin", "all", "patient", "base"]

SECRET_BYTES = 32
SECRET_START = "rsn_"  # by which programs that look for leaked passwords can find it
PREFIX_LETTERS = len(SECRET_START) + 6
CHECK_SECONDS = 1.0  # between two looks at the file: so long a revoked token may still work
LOCK_SECONDS = 10.0
NAME_LETTERS = 64
MANAGE = "manage"  # what is asked for where adapters are changed: no id of a patient


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token, without its secret. Times are ISO 8601 in UTC.

    scope: `admin` manages adapters and uses all; `all` transcribes for every patient and with the base model; `patient`
    for one; `base` with the base model alone.
    """

    name: str
    scope: Scope
    patient: str | None
    prefix: str  # the beginning of the secret, to recognise it by
    sha256: str  # of the secret. It is 256 random bits: what makes passwords need a slow hash, guessing, cannot be done
    created: str
    expires: str | None = None
    revoked: str | None = None

    @property
    def expired(self) -> bool:
        return self.expires is not None and _now() >= datetime.fromisoformat(self.expires)

    @property
    def valid(self) -> bool:
        return self.revoked is None and not self.expired


class TokenFile:
    """The file with the tokens. Missing, it holds none."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        self._seen: tuple[int, ...] | None = None
        self._looked = -CHECK_SECONDS
        self._by_hash: dict[str, Token] = {}

    def tokens(self) -> list[Token]:
        """All of them as they are in the file now, the oldest first. Raises ConfigError when it cannot be used."""
        try:
            text = self.path.read_text(encoding="utf-8")
            if os.name == "posix" and self.path.stat().st_mode & 0o022:
                raise ConfigError(
                    [
                        _("{path}: others may write to the file with the tokens. Run: chmod 600 {path}").format(
                            path=self.path
                        )
                    ]
                )
            return [_token(row) for row in json.loads(text)["tokens"]]
        except FileNotFoundError:
            return []
        except OSError as error:
            reason = error.strerror or str(error)
        except (ValueError, TypeError, KeyError):
            reason = _("it is not a file of tokens")
        raise ConfigError([_("{path}: cannot be read ({reason}).").format(path=self.path, reason=reason)])

    def find(self, secret: str) -> Token | None:
        """The token with this secret, if it is valid now. Raises ConfigError when the file can no longer be used: nobody
        gets in then."""
        self._look()
        digest = _digest(secret)
        # By its hash: what the time of this look-up could tell of a stored hash does not lead to a secret.
        token = self._by_hash.get(digest)
        if token is None or not hmac.compare_digest(token.sha256, digest) or not token.valid:
            return None
        return token

    def create(
        self, name: str, scope: Scope, *, patient: str | None = None, days: float | None = None
    ) -> tuple[Token, str]:
        """A new token and its secret, which is nowhere else. Raises ConfigError for a name that is taken."""
        if not _usable_name(name):
            raise ConfigError([_("--name has 1 to {most} letters, without line breaks.").format(most=NAME_LETTERS)])
        if patient is not None and (patient == MANAGE or not is_name(patient)):
            raise ConfigError(
                [
                    _(
                        "--patient: this is not the id of a patient. It has letters, digits, “_”, “-” and “.”, {most} at most."
                    ).format(most=MAX_LETTERS)
                ]
            )
        secret = SECRET_START + secrets.token_urlsafe(SECRET_BYTES)
        token = Token(
            name=name,
            scope=scope,
            patient=patient,
            prefix=secret[:PREFIX_LETTERS],
            sha256=_digest(secret),
            created=_stamp(_now()),
            expires=_expiry(days),
        )
        with self._changing() as tokens:
            if any(other.name == name and other.revoked is None for other in tokens):
                raise ConfigError(
                    [
                        _("There is a token named {name} already. Choose another name, or revoke it first.").format(
                            name=name
                        )
                    ]
                )
            tokens.append(token)
        return token, secret

    def revoke(self, which: str) -> Token:
        """Revoke the token with this name or beginning. Raises ConfigError when there is none, or more than one."""
        with self._changing() as tokens:
            found = [i for i, token in enumerate(tokens) if which in (token.name, token.prefix) and not token.revoked]
            if len(found) != 1:
                if found:
                    text = _("{which}: several tokens have this name or beginning. Give the other of the two.")
                else:
                    text = _("{which}: no token has this name or beginning. resonance token list shows all.")
                raise ConfigError([text.format(which=which)])
            [place] = found
            tokens[place] = replace(tokens[place], revoked=_stamp(_now()))
            return tokens[place]

    def _look(self) -> None:
        if (now := time.monotonic()) - self._looked < CHECK_SECONDS:
            return
        seen = _state(self.path)
        if seen != self._seen:
            self._by_hash = {}
            self._by_hash = {token.sha256: token for token in self.tokens()}
            self._seen = seen
        self._looked = now

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        """The tokens, for a change that is written when the block ends without an error."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_name(f".{self.path.name}.lock")
            with FileLock(lock, timeout=LOCK_SECONDS):
                tokens = self.tokens()
                yield tokens
                owner = (self.path if self.path.exists() else self.path.parent).stat()
                text = json.dumps({"tokens": [asdict(token) for token in tokens]}, indent=1, ensure_ascii=False)
                write_text_atomic(self.path, [text, "\n"], mode=0o600)
                if os.name == "posix" and os.geteuid() == 0:  # else the service of another user could not read it
                    for path in (self.path, lock):
                        os.chown(path, owner.st_uid, owner.st_gid)
        except Timeout:
            raise ConfigError(
                [_("{path}: another program is changing it. Try again in a moment.").format(path=self.path)]
            ) from None
        except OSError as error:
            raise ConfigError(
                [
                    _("{path}: cannot be written ({reason}). Choose another folder or free some space.").format(
                        path=self.path, reason=error.strerror or error
                    )
                ]
            ) from error


def default_path() -> Path:
    """tokens.json in $RESONANCE_HOME, or in the user's folder for settings."""
    home = os.environ.get("RESONANCE_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".config" / "resonance") / "tokens.json"


def _state(path: Path) -> tuple[int, ...]:
    """Something that is another when the file is."""
    try:
        found = path.stat()
    except OSError:
        return ()
    # The inode too: files are replaced, and two changes may fall into one tick of the clock.
    return (found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode)


def _token(row: Any) -> Token:
    """Raises TypeError or ValueError for a row that is no token: a right that is not understood is not given."""
    token = Token(**row)
    texts = (token.name, token.prefix, token.sha256, token.created)
    if not all(isinstance(text, str) for text in texts) or token.scope not in get_args(Scope):
        raise ValueError
    if (token.scope == "patient") != isinstance(token.patient, str) or not isinstance(token.revoked, str | None):
        raise ValueError
    if token.expires is not None and datetime.fromisoformat(token.expires).tzinfo is None:
        raise ValueError
    return token


def _usable_name(name: str) -> bool:
    return (
        0 < len(name) <= NAME_LETTERS
        and name == name.strip()
        and not any(unicodedata.category(character)[0] in "CZ" and character != " " for character in name)
    )


def _expiry(days: float | None) -> str | None:
    if days is None:
        return None
    try:
        if not days > 0:
            raise OverflowError
        return _stamp(_now() + timedelta(days=days))
    except (OverflowError, ValueError):
        raise ConfigError([_("--days is {found}. It must be more than 0.").format(found=days)]) from None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC)


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
