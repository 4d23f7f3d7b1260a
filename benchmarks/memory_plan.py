"""Predicted and measured GPU memory of training, for every size, with LoRA in 16, 8 and 4 bits and with full fine-tuning.

    python benchmarks/memory_plan.py --out benchmarks/results/memory_plan.json      about 8 minutes on an H200
    python benchmarks/memory_plan.py --sizes tiny,small --minutes 2

Each line is two steps and one evaluation of the package's own trainer on random weights and random features: what
`resonance.model.memory` predicts beside `torch.cuda.max_memory_allocated`. The last line is `error X.X%`, the largest
error of all of them. Nothing else should use the GPU. Without one this ends with exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine

SIZES = ("tiny", "base", "small", "medium", "large-v3")
KINDS: dict[str, dict[str, Any]] = {
    "LoRA 16-bit": {},
    "LoRA 8-bit": {"quantization": "8bit"},
    "LoRA 4-bit": {"quantization": "4bit"},
    "full": {"finetuning": "full"},
}
BATCHES: tuple[dict[str, Any], ...] = (
    {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "positions": 250, "label_tokens": 40},
    {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "positions": 1500, "label_tokens": 100},
    {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 1,
        "positions": 1500,
        "label_tokens": 100,
        "gradient_checkpointing": True,
    },
)
GENERATED = 64  # tokens, prompt included
PROMPT = 4
STEPS = 2  # the first makes the optimiser's states, the second holds them from its start
HOPPER_WORKSPACES = 2 * ((32 << 20) - 8_519_680)  # what cuBLAS takes there beyond what is predicted for other cards
GIB = machine.GIBIBYTE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), help="separated by commas")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing after that")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("This measures GPU memory, and PyTorch sees no CUDA GPU here.")
    until = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure_all(given.sizes.split(","), Path(folder), torch.device("cuda"), until))
    if not rows:
        sys.exit("Nothing was measured: give more --minutes.")
    errors = [row[part]["error_percent"] for row in rows for part in ("training", "evaluation")]
    worst, median = max(map(abs, errors)), statistics.median(map(abs, errors))
    values = {"measured": rows, "error_percent": worst, "median_error_percent": median}
    machine.report(values, given.out)
    print(f"median error {median:.1f}% of {len(errors)}")
    print(f"error {worst:.1f}%")


def measure_all(sizes: list[str], folder: Path, device: Any, until: float) -> Iterator[dict[str, Any]]:
    import torch

    from resonance.model.job import TrainingJob
    from resonance.model.memory import predict
    from resonance.model.sizes import PUBLISHED

    print(f"{'':42}{'training, GiB':>26}{'evaluation, GiB':>28}{'reserved':>11}")
    print(f"{'':42}{'predicted measured error':>26}{'predicted measured error':>28}")
    for size in sizes:
        shape = PUBLISHED[size]
        model = write_model(folder / size, shape, device)
        for kind, settings in KINDS.items():
            for batch in BATCHES:
                job = TrainingJob(shape, **settings, **batch, generation_tokens=GENERATED)
                if time.monotonic() > until or predict(job).on_card > torch.cuda.mem_get_info()[1]:
                    continue
                row = {"size": size, "kind": kind, **batch, **measure(job, model, device)}
                show(row)
                yield row


def show(row: dict[str, Any]) -> None:
    batch = f"{row['per_device_train_batch_size']} x {row['positions'] / 50:g} s, {row['label_tokens']} tokens"
    checkpoints = ", ckpt" if row.get("gradient_checkpointing") else ""
    parts = (row["training"], row["evaluation"])
    numbers = (f"{p['predicted'] / GIB:10.2f}{p['measured'] / GIB:9.2f}{p['error_percent']:+6.1f}%" for p in parts)
    title = f"{row['size']:9}{row['kind']:12}{batch}{checkpoints}"
    print(f"{title:44}{'  '.join(numbers)}{row['training']['reserved'] / GIB:11.2f}", flush=True)


def write_model(folder: Path, shape: Any, device: Any) -> Path:
    """A random checkpoint of `shape` in 16 bits, with the tokenizer of the made-up model."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    import made_up

    made_up.write_model(folder)
    generation = GenerationConfig.from_pretrained(folder)
    numbers = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)}
    end = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), generation.eos_token_id)
    config = WhisperConfig(**numbers, **end, decoder_start_token_id=generation.decoder_start_token_id)
    with device:
        model = WhisperForConditionalGeneration(config).to(torch.bfloat16)
    generation.suppress_tokens = [generation.eos_token_id]  # each text is as long as it may be
    model.generation_config = generation
    model.generation_config._from_model_config = False
    model.save_pretrained(folder)
    return folder


def measure(job: Any, folder: Path, device: Any) -> dict[str, Any]:
    """Peaks of `STEPS` steps and of an evaluation by the trainer, and what is predicted for each."""
    import torch

    from resonance.model.memory import predict

    trainer = make_trainer(job, folder, device)
    found: dict[str, Any] = {}
    plan = predict(job)
    stays = plan.peak - plan.fullest.total + (HOPPER_WORKSPACES if on_hopper() else 0)
    for part, run, moment in (
        ("training", trainer.train, plan.training),
        ("evaluation", trainer.evaluate, plan.evaluation),
    ):
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        predicted, measured = stays + moment.total, torch.cuda.max_memory_allocated()
        free, total = torch.cuda.mem_get_info()
        found[part] = {
            "moment": moment.name,
            "predicted": predicted,
            "measured": measured,
            "error_percent": round(100 * (predicted / measured - 1), 2),
            "reserved": torch.cuda.max_memory_reserved(),
            "outside_of_torch": total - free - torch.cuda.memory_reserved(),
        }
    del trainer, run
    gc.collect()
    torch.cuda.empty_cache()
    return found


def on_hopper() -> bool:
    import torch

    return torch.cuda.get_device_capability()[0] == 9


def make_trainer(job: Any, folder: Path, device: Any) -> Any:
    """The package's trainer on batches of random features, all of one length."""
    import torch
    from transformers.trainer_utils import SaveStrategy

    from resonance.config import TrainConfig
    from resonance.train.arguments import training_arguments
    from resonance.train.build import choose_weights, load_base
    from resonance.train.trainer import WhisperTrainer

    names = ("finetuning", "quantization", "precision", "optim", "gradient_checkpointing")
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    config = TrainConfig(
        model_name_or_path=str(folder),
        train_file=folder / "unused.json",
        output_dir=folder / "run",
        max_steps=STEPS,
        warmup_steps=0,
        validation_split=0.0,
        dataloader_num_workers=0,
        **{name: getattr(job, name) for name in (*names, *sizes)},
    )
    whisper = load_base(config, device)
    arguments = training_arguments(config, folder / "run", job.precision, metric=None, train_rows=1)
    arguments.save_strategy = SaveStrategy.NO
    start = whisper.model.generation_config.decoder_start_token_id

    def collate(clips: list[Any]) -> dict[str, torch.Tensor]:
        return {
            "input_features": torch.randn(len(clips), job.shape.num_mel_bins, 2 * job.positions),
            "decoder_input_ids": torch.full((len(clips), job.label_tokens), start),
            "labels": torch.randint(50_000, (len(clips), job.label_tokens)),
        }

    clips = job.per_device_train_batch_size * STEPS
    return WhisperTrainer(
        model=choose_weights(whisper, config),
        args=arguments,
        train_dataset=Numbers(clips),
        eval_dataset=Numbers(job.per_device_eval_batch_size),
        data_collator=collate,
        train_durations=[job.positions / 50] * clips,
        prompt_length=PROMPT,
        num_beams=job.generation_num_beams,
        max_length=job.generation_tokens,
        label_smoothing=0.0,
        keep_checkpoints=None,
    )


class Numbers:
    """A data set of `count` clips without contents."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, _draw: Any) -> int:
        return 0


if __name__ == "__main__":
    main()
