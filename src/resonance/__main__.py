"""`python -m resonance` and the `resonance` command."""

from __future__ import annotations

import sys


def main() -> None:
    from resonance.cli import leave, run

    leave(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
