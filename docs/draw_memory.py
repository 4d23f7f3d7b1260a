"""Draws the plots of docs/explanation/memory*.md from the model of the bytes: python docs/draw_memory.py"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from resonance.model.job import TrainingJob
from resonance.model.memory import MemoryPlan, predict
from resonance.model.sizes import PUBLISHED
from resonance.units import GIBIBYTE, POSITIONS_PER_SECOND

FOLDER = Path(__file__).parent / "explanation"
WIDTH, LEFT, RIGHT = 720, 190, 70
COLOURS = {
    "weights": "#4c72b0",
    "adapters": "#8172b3",
    "gradients": "#55a868",
    "optimizer": "#937860",
    "activations": "#dd8452",
    "logits": "#c44e52",
    "working": "#8c8c8c",
    "driver": "#cccccc",
}
SMALL = TrainingJob(PUBLISHED["small"], label_tokens=30, per_device_eval_batch_size=0)


def seconds(job: TrainingJob, length: float) -> TrainingJob:
    return replace(job, positions=round(length * POSITIONS_PER_SECOND))


JOBS: dict[str, TrainingJob] = {
    "small, LoRA, 8 × 3 s": seconds(SMALL, 3),
    "small, LoRA, 8 × 30 s": seconds(SMALL, 30),
    "… with checkpointing": replace(seconds(SMALL, 30), gradient_checkpointing=True),
    "… in 8 bits": replace(seconds(SMALL, 30), quantization="8bit"),
    "small, full, 8 × 3 s": replace(seconds(SMALL, 3), finetuning="full"),
    "small, full, 8 × 30 s": replace(seconds(SMALL, 30), finetuning="full"),
    "large-v3, LoRA, 8 × 3 s": replace(seconds(SMALL, 3), shape=PUBLISHED["large-v3"]),
    "large-v3, LoRA, 1 × 30 s": replace(seconds(SMALL, 30), shape=PUBLISHED["large-v3"], per_device_train_batch_size=1),
}


def parts(plan: MemoryPlan) -> dict[str, int]:
    return {name: size for name, size in plan.parts.items() if name in COLOURS} | {"driver": plan.on_card - plan.peak}


def bars(plans: dict[str, MemoryPlan]) -> str:
    """Where the memory of each job goes, as stacked bars."""
    row, top = 34, 46
    scale = (WIDTH - LEFT - RIGHT) / max(plan.on_card for plan in plans.values())
    drawn = []
    at = 8.0
    for name, colour in COLOURS.items():
        drawn.append(f'<rect x="{at}" y="8" width="12" height="12" fill="{colour}"/>')
        drawn.append(f'<text x="{at + 16}" y="18">{name}</text>')
        at += 26 + 7.4 * len(name)
    for index, (name, plan) in enumerate(plans.items()):
        y, x = top + index * row, float(LEFT)
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        for part, size in parts(plan).items():
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="22" fill="{COLOURS[part]}"/>')
            x += size * scale
        drawn.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{plan.on_card / GIBIBYTE:.1f} GiB</text>')
    return svg(top + row * len(plans), drawn)


def lines(names: Sequence[str]) -> str:
    """Memory by the length of the longest recording, LoRA, batch 8."""
    height, top, bottom = 320, 16, 36
    width, lengths = WIDTH - 120, range(1, 31)
    found = {
        n: [predict(seconds(replace(SMALL, shape=PUBLISHED[n]), s)).on_card / GIBIBYTE for s in lengths] for n in names
    }
    highest = max(24.0, *(max(values) for values in found.values()))
    drawn = []

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - value / highest)

    for tick in (0, 4, 8, 12, 16, 24):
        drawn.append(f'<line x1="64" x2="{width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>')
        drawn.append(f'<text x="58" y="{y(tick) + 4:.1f}" text-anchor="end">{tick} GiB</text>')
    for tick in (1, 5, 10, 15, 20, 25, 30):
        drawn.append(
            f'<text x="{64 + (width - 64) * tick / 30:.1f}" y="{height - 16}" text-anchor="middle">{tick} s</text>'
        )
    for (name, values), colour in zip(found.items(), list(COLOURS.values())[2:], strict=False):
        points = " ".join(f"{64 + (width - 64) * s / 30:.1f},{y(v):.1f}" for s, v in zip(lengths, values, strict=True))
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        drawn.append(f'<text x="{width + 8}" y="{y(values[-1]) + 4:.1f}" fill="{colour}">{name}</text>')
    return svg(height, drawn)


def svg(height: float, drawn: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="sans-serif" font-size="13">'
        f'<rect width="{WIDTH}" height="{height:g}" fill="#fff"/>' + "".join(drawn) + "</svg>\n"
    )


def pages() -> dict[str, str]:
    return {
        "memory_parts.svg": bars({name: predict(job) for name, job in JOBS.items()}),
        "memory_lengths.svg": lines(("large-v3", "medium", "small", "base")),
    }


def main() -> None:
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
