"""`python whisper_lora_finetune.py …` as in older notes: `resonance train` with the defaults those notes count on.

Every setting of `resonance train` is taken too. With --resume or --config there are no defaults but its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from resonance.cli import leave, report_error, run
from resonance.config import TrainConfig
from resonance.config_io import parse
from resonance.data.formats import load_manifest
from resonance.errors import ResonanceError
from resonance.messages import _

DEFAULTS = {
    "num_train_epochs": "3",
    "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "2",
    "learning_rate": "5e-4",
    "logging_steps": "50",
    "lora_r": "8",
    "lora_alpha": "32",
    "lora_dropout": "0.1",
    "target_modules": "q_proj,k_proj,v_proj,out_proj,fc1,fc2",
}
EVAL_STEPS = "500"


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    parts = [(*argument.partition("="), following) for argument, following in zip(argv, [*argv[1:], ""], strict=True)]
    flags = {name[2:].replace("-", "_"): value if equals else following for name, equals, value, following in parts}
    if flags.keys() & {"resume", "resume_from_checkpoint", "config"}:
        return run(["train", *argv])
    argv = [*argv, *(f"--{name}={value}" for name, value in DEFAULTS.items() if name not in flags)]
    if "eval_steps" not in flags and ("save_steps" in flags or "max_steps" not in flags):
        argv += [f"--eval_steps={flags.get('save_steps', EVAL_STEPS)}"]
    try:
        config = parse(TrainConfig, argv, "whisper_lora_finetune.py")
        steps = count_steps(config)
    except ResonanceError as error:
        return report_error(error)
    if config.warmup_steps >= steps:
        # Those notes were written for hours of speech: 100 recordings are not trained for 500 steps.
        print(
            _("The warm-up of {warmup:g} steps is as long as the whole training of {steps}. A tenth is used.").format(
                warmup=config.warmup_steps, steps=steps
            ),
            file=sys.stderr,
        )
        argv += ["--warmup_steps=0.1"]
    return run(["train", *argv])


def count_steps(config: TrainConfig) -> int:
    """Updates of the model, as far as the list of recordings tells. Raises ManifestError where it cannot be read."""
    if config.max_steps is not None:
        return config.max_steps
    source = config.train_file or config.dataset_dir or Path()
    rows = len(load_manifest(source, dataset_dir=config.dataset_dir, json_file=config.json_file).utterances)
    if not config.validation_file:
        rows -= round(rows * config.validation_split)
    rows = min(rows, config.max_train_samples or rows)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return max(round(-(-rows // batch) * (config.num_train_epochs or 1)), 1)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
