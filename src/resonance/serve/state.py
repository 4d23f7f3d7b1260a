"""Whether the service takes requests, and what they are told where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resonance.serve.faults import ServiceError, broken, draining, loading


@dataclass(frozen=True, slots=True)
class State:
    """Whether requests are taken, and why not."""

    status: Literal["loading", "ready", "broken", "draining"]
    reason: str = ""  # of one that is broken

    @property
    def refusal(self) -> ServiceError:
        """503, with what keeps the service from answering."""
        if self.status == "draining":
            return draining()
        if self.status == "loading":
            return loading()
        return broken(self.reason)
