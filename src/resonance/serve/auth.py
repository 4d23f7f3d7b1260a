"""Who asks, what he may, and how often."""

from __future__ import annotations

import ipaddress
import math
import socket
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from resonance.config_serve import ServeConfig
from resonance.errors import ConfigError
from resonance.messages import _
from resonance.serve.faults import ServiceError
from resonance.serve.tokens import MANAGE, TokenFile

FAILURES_PER_MINUTE = 30  # wrong tokens from one address
MAX_BUCKETS = 10_000  # 3 MB
LONGEST_HEADER = 512


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a token."""

    account: str  # the token's name; with authentication off, the client's address
    admin: bool
    patient: str | None  # the only one that the token opens; meant, too, where a request names none
    base_only: bool = False

    def allow(self, patient: str | None) -> None:
        """Raise ServiceError 403 unless the caller may transcribe for this patient, or with the base model (None).

        Whether there is such a patient has no influence. “manage” asks for what `allow_manage` does, and so no token but an
        admin's opens a patient of that name.
        """
        if self.admin:
            return
        if patient == MANAGE:
            self.allow_manage()
        if patient is None and self.patient is not None:
            raise _not_yours(_("This token does not open the base model."))
        if patient is not None and (self.base_only or self.patient not in (None, patient)):
            raise _not_yours(_("This token does not open this patient's model."))

    def allow_base(self) -> None:
        """Raise ServiceError 403 unless the caller may use the base model without an adapter."""
        self.allow(None)

    def allow_manage(self) -> None:
        """Raise ServiceError 403 unless the caller may list patients and change adapters."""
        if not self.admin:
            raise _not_yours(_("This token does not manage adapters."))


class Auth:
    """Turns the Authorization header into a caller. Safe to use from several threads."""

    def __init__(self, token_file: TokenFile, config: ServeConfig) -> None:
        self._tokens = token_file
        self._off = config.auth == "off"
        self._requests = _Buckets(config.requests_per_minute)
        self._failures = _Buckets(FAILURES_PER_MINUTE)
        self._lock = threading.Lock()

    @classmethod
    def from_config(cls, config: ServeConfig) -> Auth:
        """Raises ConfigError when there is a file with tokens and it cannot be used."""
        file = TokenFile(config.tokens)
        if config.auth == "token":
            file.tokens()
        return cls(file, config)

    def caller(self, authorization: str | None, client_host: str) -> Caller:
        """Raises ServiceError 401 token_missing or token_invalid, 429 too_many_requests, 503 tokens_unreadable."""
        if self._off:
            return Caller(client_host, admin=True, patient=None)
        with self._lock:
            try:
                caller = self._holder(authorization)
            except ServiceError as refusal:
                # Of wrong tokens alone: behind one address, a proxy's, there may be all who have right ones.
                if refusal.status == 401:
                    _refuse_beyond(self._failures, _network(client_host))
                raise
            _refuse_beyond(self._requests, caller.account)
        return caller

    def _holder(self, authorization: str | None) -> Caller:
        if not authorization:
            raise ServiceError(
                401,
                "token_missing",
                _("The request has no token."),
                _("Send the header “Authorization: Bearer” with a token of resonance token create."),
            )
        scheme, _space, secret = authorization.strip().partition(" ")
        try:
            right = scheme.lower() == "bearer" and len(authorization) <= LONGEST_HEADER
            token = self._tokens.find(secret.strip()) if right else None
        except ConfigError:
            raise ServiceError(
                503,
                "tokens_unreadable",
                _("The service cannot read its tokens."),
                _("The operator finds the reason with resonance token list."),
                retry_after=10,
            ) from None
        if token is None:
            # The same for unknown, expired and revoked ones: who has a wrong token learns nothing.
            raise ServiceError(
                401,
                "token_invalid",
                _("The token is not valid."),
                _("Check that it was copied whole. It may have expired or been revoked: ask for a new one."),
            )
        return Caller(token.name, token.scope == "admin", token.patient, base_only=token.scope == "base")


class _Buckets:
    """For each key a bucket of permits that fills up evenly to one minute's. Those used longest ago are forgotten."""

    def __init__(self, per_minute: int) -> None:
        self._size, self._per_second = float(per_minute), per_minute / 60
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # permits, and when they were counted

    def take(self, key: str) -> float:
        """Take a permit. Seconds until there is one, if there is none."""
        now = time.monotonic()
        level, counted = self._levels.pop(key, (self._size, now))
        level = min(self._size, level + (now - counted) * self._per_second)
        missing = max(0.0, 1 - level)
        self._levels[key] = (level if missing else level - 1, now)
        if len(self._levels) > MAX_BUCKETS:
            self._levels.popitem(last=False)
        return missing / self._per_second


def check_exposure(config: ServeConfig) -> None:
    """Raise ConfigError where everybody who reaches the address, or every web page, could use all voices and replace them."""
    if config.auth == "off" and "*" in config.cors_origins:
        raise ConfigError(
            [_("--cors_origins * would let every web page use a service without tokens. Name the pages.")]
        )
    if config.auth == "off" and not config.insecure and not is_loopback(config.host):
        raise ConfigError(
            [
                _(
                    "--auth off lets everybody who reaches {host} hear with every person's model and replace it. Use --auth "
                    "token, or --host 127.0.0.1; --insecure allows it all the same."
                ).format(host=config.host or "''")
            ]
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address, whatever the name stands for. Raises ConfigError for an unknown name."""
    if not host:  # every network
        return False
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host.strip("[]"), None)}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            [_("--host {host}: no address has this name ({reason}).").format(host=host, reason=reason)]
        ) from None
    addresses = [ipaddress.ip_address(address.partition("%")[0]) for address in found]
    return all((getattr(address, "ipv4_mapped", None) or address).is_loopback for address in addresses)


def _network(client_host: str) -> str:
    """The address, of IPv6 the first 64 bits: one household has as many addresses as it likes below these."""
    try:
        address = ipaddress.ip_address(client_host.partition("%")[0])
    except ValueError:
        return client_host[:100]
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)


def _refuse_beyond(buckets: _Buckets, key: str) -> None:
    if wait := buckets.take(key):
        raise ServiceError(
            429,
            "too_many_requests",
            _("Too many requests in a short time."),
            _("Send it again after the seconds that Retry-After gives."),
            retry_after=max(1, math.ceil(wait)),
        )


def _not_yours(message: str) -> ServiceError:
    return ServiceError(403, "not_yours", message, _("Ask whoever runs the service for a token that does."))
