"""Ids of people, as far as they may become names of folders."""

from __future__ import annotations

import re

from resonance.messages import _
from resonance.serve.faults import ServiceError

MAX_LETTERS = 64

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_WINDOWS_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(\..*)?", re.IGNORECASE)


def is_name(text: str) -> bool:
    """Whether `text` can be the name of a folder, and of nothing but that, on every system."""
    return (
        len(text) <= MAX_LETTERS
        and _ID.fullmatch(text) is not None
        and not text.endswith(".")  # Windows leaves it out: anna. would be anna
        and _WINDOWS_DEVICE.fullmatch(text) is None
    )


def check_patient_id(text: str) -> str:
    """`text` itself. Raises ServiceError 400 where it is no id; what was sent is not repeated."""
    if isinstance(text, str) and is_name(text):
        return text
    raise ServiceError(
        400,
        "invalid_patient_id",
        _("This is not the id of a patient."),
        _(
            "An id has 1 to {most} of the letters a–z and A–Z, digits, “_”, “-” and “.”; it neither begins nor ends with a "
            "dot, and is no name that Windows keeps for itself, such as con."
        ).format(most=MAX_LETTERS),
        param="patient_id",
    )
