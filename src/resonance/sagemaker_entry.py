"""What every process of a SageMaker job runs: `python -m resonance.sagemaker_entry`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from resonance.cli import leave, run
from resonance.launch.container import train_in_container


def main(defaults: Mapping[str, str] | None = None) -> None:
    leave(train_in_container(run, sys.argv[1:], defaults))


if __name__ == "__main__":
    main()
