"""`entry.py` as in older notes: trains inside a SageMaker container, with the defaults those notes count on.

Settings are the job's hyper-parameters and the flags, under the names of `resonance train`. torchrun starts it once for every
GPU; `sagemaker_torchrun.sh` starts torchrun. Jobs of `resonance sagemaker submit` do not use these defaults.
"""

from __future__ import annotations

import os
import sys

from resonance.cli import leave, run
from resonance.errors import ConfigError
from resonance.launch.container import Folders, hyperparameters, read_flags, train_in_container

DEFAULTS = {
    "model_name_or_path": "openai/whisper-large-v3",
    "finetuning": "full",
    "max_steps": "1024",
    "per_device_train_batch_size": "16",
    "learning_rate": "1e-5",
    "warmup_steps": "500",
}
OTHER_NAMES = {"base_model": "model_name_or_path", "num_train_epochs": "max_steps"}


def main(argv: list[str]) -> int:
    """Train and return the exit code."""
    return train_in_container(run, argv, defaults(argv))


def defaults(argv: list[str]) -> dict[str, str]:
    """The defaults for what is not given. A warm-up longer than the training is left to `resonance train`."""
    try:
        given = hyperparameters(Folders.of(os.environ), os.environ) | read_flags(argv)
    except ConfigError:
        return {}  # told by the training itself
    kept = DEFAULTS.copy()
    for name in {"base_model", "num_train_epochs"} & given.keys():
        del kept[OTHER_NAMES[name]]
    steps = given.get("max_steps", kept.get("max_steps", ""))
    if not steps.isdigit() or int(steps) <= int(kept["warmup_steps"]):
        del kept["warmup_steps"]
    return kept


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
