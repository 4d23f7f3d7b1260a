"""What a request can be refused for. One class, one JSON shape, whatever the route."""

from __future__ import annotations

from typing import Any

from resonance.errors import ResonanceError
from resonance.messages import _


class ServiceError(ResonanceError):
    """A request that is not answered with a transcript.

    status: of HTTP; code: for programs, never translated; hint: what the caller can do; retry_after: whole seconds after
    which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        hint: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint
        self.param, self.retry_after = param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error shape, and the hint."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code, "hint": self.hint}
        return {"error": error}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def draining() -> ServiceError:
    """The service stops: whoever still waits, or comes now, is answered by the next one."""
    return ServiceError(
        503,
        "draining",
        _("The service is about to stop."),
        _("Send it again after the seconds that Retry-After gives."),
        retry_after=5,
    )
