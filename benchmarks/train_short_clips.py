"""Samples per second, peak memory and final loss of the stock recipe and of `resonance train`, on the same short clips.

    python benchmarks/train_short_clips.py                      full fine-tuning, 3 s clips made up here
    python benchmarks/train_short_clips.py --finetuning lora
    python benchmarks/train_short_clips.py --model FOLDER --data labels.json --language en

Each recipe trains in a process of its own, one after the other: stock (labels padded to 448), stock as in Hugging Face's
tutorial (labels padded to the longest of the batch), ours. The last line is `ratio X.XX`: our samples per second over the
first one's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

RECIPES = {
    "stock": "stock recipe, 30 s, labels padded to 448",
    "stock_longest": "stock recipe, 30 s, labels padded to the longest",
    "ours": "resonance train",
}
HELD_OUT_CLIPS = 16
QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def main() -> None:
    given = arguments()
    if not 0 < given.warmup < given.steps:
        sys.exit("--warmup must be at least 1 and below --steps.")
    if given.part == "prepare":
        prepare(given)
    elif given.part:
        measure(given)
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        run_part("prepare", folder)
        for recipe, title in RECIPES.items():
            run_part(recipe, folder)
            found[recipe] = json.loads((Path(folder) / f"{recipe}.json").read_text(encoding="utf-8"))
            show(title, found[recipe])
    ratio, longest = (
        found["ours"]["samples_per_second"] / found[stock]["samples_per_second"] for stock in ("stock", "stock_longest")
    )
    values = {
        "settings": machine.settings(given),
        **found,
        "ratio": round(ratio, 2),
        "ratio_to_longest": round(longest, 2),
    }
    machine.report(values, given.out)
    print(f"ratio to the stock recipe with labels padded to the longest: {longest:.2f}")
    print(f"ratio {ratio:.2f}")


def run_part(part: str, folder: str) -> None:
    """Run this script for one part of the work. In a process of its own, so that the memory is its own; this one stays
    small, because a process is born with its parent's size as its peak."""
    command = [sys.executable, *sys.argv, "--part", part, "--folder", folder]
    subprocess.run(command, env=os.environ | QUIET, check=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="folder of a Whisper checkpoint; left out, random weights of whisper-tiny's shape"
    )
    parser.add_argument("--data", type=Path, help="recordings and transcripts; left out, clips are made up")
    parser.add_argument("--language", default="en")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the made-up clips")
    parser.add_argument("--finetuning", choices=("full", "lora"), default="full")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="first steps, which are not measured")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--use_cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--part", choices=("prepare", *RECIPES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(given: argparse.Namespace) -> None:
    """Write the model and the clips, and the rows that are held out."""
    import made_up

    if given.model is None:
        made_up.write_model(given.folder / "model")
    clips = given.steps * given.batch
    if given.data is None:
        made_up.write_clips(given.folder / "train", clips, given.seconds, seed=0)
        made_up.write_clips(given.folder / "held_out", HELD_OUT_CLIPS, given.seconds, seed=1)
        return
    from resonance.data.formats import load_manifest, write_manifest

    rows = load_manifest(given.data).utterances
    random.Random(0).shuffle(rows)
    for name, part in (("held_out", rows[:HELD_OUT_CLIPS]), ("train", rows[HELD_OUT_CLIPS:][:clips])):
        (given.folder / name).mkdir()
        write_manifest(given.folder / name / "labels.json", part)


def settings_of(given: argparse.Namespace) -> Any:
    from resonance.config import TrainConfig

    return TrainConfig.model_validate(
        {
            "model_name_or_path": given.model or str(given.folder / "model"),
            "train_file": given.folder / "train" / "labels.json",
            "validation_split": 0.0,
            "language": given.language,
            "finetuning": given.finetuning,
            "max_steps": given.steps,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "learning_rate": given.learning_rate,
            "optim": given.optim,
            "per_device_train_batch_size": given.batch,
            "dataloader_num_workers": given.workers,
            "precision": given.precision,
            "logging_steps": 1,
            "output_dir": given.folder / given.part,
            "extra": {"use_cpu": True} if given.use_cpu else {},
        }
    )


def show(title: str, found: dict[str, Any]) -> None:
    print(
        f"{title}: {found['samples_per_second']:.2f} samples/s, {found['cpu_seconds_a_sample']:.2f} s of processor time a "
        f"sample, {found['peak_memory_gib']:.2f} GiB at most",
        flush=True,
    )
    print(
        f"  its own loss {found['final_loss']:.3f}; held-out loss a text token, before {found['held_out_loss_before']:.3f}, "
        f"after {found['held_out_loss']:.3f} at the clips' length, {found['held_out_loss_30s']:.3f} padded to 30 s",
        flush=True,
    )


def measure(given: argparse.Namespace) -> None:
    """Train with one recipe and write what it took."""
    config = settings_of(given)
    clock = start_clock()
    if given.part == "ours":
        from rich.console import Console

        from resonance.finetune import finetune

        finetune(config, Console(quiet=True))
    else:
        import stock_recipe

        stock_recipe.train(config, stock_recipe.LABEL_TOKENS if given.part == "stock" else None)
    seconds = [after - before for before, after in zip(clock.ended, clock.ended[1:], strict=False)]
    measured = seconds[given.warmup - 1 :]
    found = {
        # The median: a step that something else on the machine slowed down does not decide.
        "samples_per_second": round(given.batch / statistics.median(measured), 3),
        "cpu_seconds_a_sample": round((clock.cpu[-1] - clock.cpu[given.warmup - 1]) / len(measured) / given.batch, 4),
        "seconds_a_step": [round(s, 3) for s in seconds],
        "peak_memory_gib": round(clock.peak_bytes / machine.GIBIBYTE, 3),
        "peak_memory_of": clock.peak_of,
        "final_loss": round(clock.losses[-1], 4),
    }
    rows = load_rows(given.folder / "held_out" / "labels.json")
    for key, context in (("held_out_loss", "auto"), ("held_out_loss_30s", "full")):
        found[key] = round(held_out_loss(clock.model, config, rows, context), 4)
    found["held_out_loss_before"] = round(held_out_loss(untrained(config), config, rows, "auto"), 4)
    (given.folder / f"{given.part}.json").write_text(json.dumps(found), encoding="utf-8")


def load_rows(path: Path) -> list[Any]:
    from resonance.data.formats import load_manifest

    return list(load_manifest(path).utterances)


def start_clock() -> Any:
    """A clock in every Trainer that this process makes: the same for both recipes, from outside both."""
    import resource

    import torch
    from transformers import TrainerCallback, trainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        """When each step ended (wall clock and processor time), its loss, and the most memory in use until then."""

        def __init__(self) -> None:
            self.ended: list[float] = []
            self.cpu: list[float] = []
            self.losses: list[float] = []
            self.model: Any = None
            self.peak_bytes = 0
            self.peak_of = ""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_gpu = args.device.type == "cuda"
            if on_gpu:
                torch.cuda.synchronize()
            self.ended.append(time.perf_counter())
            self.cpu.append(time.process_time())
            self.peak_of = "GPU" if on_gpu else "process"
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            self.peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else resident

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            self.model = model

    clock = Clock()
    trainer.DEFAULT_CALLBACKS.append(clock)
    return clock


def untrained(config: Any) -> Any:
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(config.model_name_or_path)


def held_out_loss(model: Any, config: Any, rows: list[Any], length: str) -> float:
    """Mean loss a text token (and the end of text), each clip in a batch of its own at `length` of audio."""
    import torch

    from resonance.data.audio import read_audio
    from resonance.data.audio_context import AudioContext
    from resonance.data.batches import Clip, Collator
    from resonance.data.tokens import LabelTokenizer
    from resonance.model.context import allow_any_audio_context
    from resonance.model.load import load_tokenizer
    from resonance.transcribe.decoding import unwrap

    whisper = unwrap(model).eval()
    allow_any_audio_context(whisper)
    tokenizer, multilingual = load_tokenizer(config.model_name_or_path)
    encode = LabelTokenizer(tokenizer, multilingual, config.language, config.task).encode
    context = AudioContext(length, config.audio_margin, whisper.config.max_source_positions)  # type: ignore[arg-type]
    collate = Collator(context, whisper.config.num_mel_bins, tokenizer.eos_token_id)
    total = tokens = 0.0
    for row in rows:
        batch = collate([Clip(read_audio(row.audio, row.start, row.end), encode(row), None, 0)]).items()
        inputs = {name: value.to(whisper.device) for name, value in batch}
        labels = inputs.pop("labels")
        with torch.inference_mode():
            logits = whisper(**inputs).logits.float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        tokens += int(labels.ne(-100).sum())
    return total / tokens


if __name__ == "__main__":
    main()
