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

    def again(self) -> ServiceError:
        """A copy: one object raised in several threads would collect all their tracebacks."""
        return ServiceError(
            self.status, self.code, self.message, self.hint, param=self.param, retry_after=self.retry_after
        )


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY_SECONDS = 5


def draining() -> ServiceError:
    """The service stops: whoever still waits, or comes now, is answered by the next one."""
    return ServiceError(
        503,
        "draining",
        _("The service is about to stop."),
        _("Send it again after the seconds that Retry-After gives."),
        retry_after=RETRY_SECONDS,
    )


def loading() -> ServiceError:
    """There is no model yet."""
    return ServiceError(
        503,
        "loading",
        _("The model is being loaded."),
        _("Send it again after the seconds that Retry-After gives."),
        retry_after=RETRY_SECONDS,
    )


def not_ready(reason: str) -> ServiceError:
    """The model does not answer now."""
    return ServiceError(
        503,
        "not_ready",
        _("The model does not answer: {reason}").format(reason=reason),
        _("Try again later."),
        retry_after=RETRY_SECONDS,
    )


def broken(reason: str) -> ServiceError:
    """The model will hardly answer before somebody has done something about it."""
    return ServiceError(
        503,
        "broken",
        _("The service cannot transcribe: {reason}").format(reason=reason),
        _("Ask whoever runs the service to look at its log and to start it again."),
        retry_after=60,
    )


def too_many_connections() -> ServiceError:
    """As many requests and sockets as may be are open."""
    return ServiceError(
        503,
        "too_many_connections",
        _("More connections are open than the service takes."),
        _("Send it again after the seconds that Retry-After gives."),
        retry_after=RETRY_SECONDS,
    )


def store_unreachable(retry_after: int = RETRY_SECONDS) -> ServiceError:
    """The adapters cannot be read now; whoever needs none, or has his in memory, is answered all the same."""
    return ServiceError(
        503,
        "adapter_store_unreachable",
        _("The place where the adapters are kept cannot be read now."),
        _("Try again in a moment. The log of the service says more."),
        retry_after=retry_after,
    )


def adapter_memory_full() -> ServiceError:
    return ServiceError(
        503,
        "adapter_memory_full",
        _("The memory for adapters is full, and all that it holds are in use."),
        _("Try again in a moment. If this happens often, start the service with a larger --adapter_memory."),
        retry_after=1,
    )


def deadline_passed() -> ServiceError:
    return ServiceError(
        504,
        "deadline_passed",
        _("The request took longer than the service allows."),
        _("Send it again later, or a shorter recording."),
    )


def invalid_settings(reason: str) -> ServiceError:
    """Nothing can be decoded with what the request asks for."""
    return ServiceError(400, "invalid_settings", reason, _("Change what the message names, or leave it out."))


def inference_failed() -> ServiceError:
    return ServiceError(
        500,
        "inference_failed",
        _("The model failed on this recording. The service's log says where."),
        _("Send the recording in another way, such as in shorter pieces, and tell whoever runs the service."),
    )


def out_of_memory() -> ServiceError:
    return ServiceError(
        503,
        "out_of_memory",
        _("The memory of the service does not suffice for this recording now."),
        _("Try again later, with shorter recordings or fewer beams."),
        retry_after=RETRY_SECONDS,
    )
