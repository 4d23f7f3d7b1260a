"""What machines cost by the hour, from a file that users edit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from resonance.errors import ConfigError
from resonance.messages import _
from resonance.plan.devices import Device, named

PRICES = Path(__file__).parent / "prices.yaml"


@dataclass(frozen=True, slots=True)
class Price:
    """A machine with one GPU. Currencies are kept as they are."""

    name: str
    device: Device
    per_hour: float
    currency: str


def read_prices(path: Path | None) -> list[Price]:
    """The machines in a file, or in the one that comes with the package. Raises ConfigError naming the entry."""
    file = path or PRICES
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([_("{path}: cannot be read ({reason}).").format(path=file, reason=error.strerror)]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([_("{path}: not YAML ({reason}).").format(path=file, reason=error)]) from None
    if not isinstance(entries, list):
        raise ConfigError(
            [_("{path}: a list of machines is expected, each with gpu, per_hour, currency.").format(path=file)]
        )
    return [_price(entry, file, number) for number, entry in enumerate(entries, 1)]


def _price(entry: Any, file: Path, number: int) -> Price:
    try:
        gpu, per_hour, currency = str(entry["gpu"]), float(entry["per_hour"]), str(entry["currency"])
        if not per_hour >= 0:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            [
                _("{path}: entry {number} needs gpu, per_hour (a number) and currency; found {entry}.").format(
                    path=file, number=number, entry=entry
                )
            ]
        ) from None
    return Price(str(entry.get("name", gpu)), named(gpu), per_hour, currency)
