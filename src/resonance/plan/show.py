"""A plan on the screen and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resonance.messages import _
from resonance.model.job import TrainingJob
from resonance.model.memory import predict
from resonance.model.sizes import PUBLISHED, USUAL
from resonance.plan.choose import Plan, needed_bytes
from resonance.plan.prices import Price
from resonance.plan.settings import Reasoned
from resonance.units import GIBIBYTE

LONGEST_SHOWN = 24  # characters of a value: "openai/whisper-large-v3" is whole
LITTLE = 0.005  # GiB: parts below it are not shown


def print_plan(
    plan: Plan,
    chosen: Mapping[str, Reasoned],
    notes: Sequence[str],
    costs: Sequence[tuple[Price, float]],
    console: Console,
) -> None:
    """Settings with their reasons, memory by part, time, cost, and the table of all sizes."""
    console.print(facts(plan), soft_wrap=True)
    settings = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    settings.add_column(_("setting"), no_wrap=True)
    settings.add_column(_("value"), no_wrap=True)
    settings.add_column(_("because"), overflow="fold")  # Chinese has no spaces to break at
    for name, (value, reason) in chosen.items():
        settings.add_row(name, shown(value), reason)
    console.print(settings)
    console.print()
    console.print(memory_line(plan), soft_wrap=True)
    for name, size in plan.memory.parts.items():
        if size >= LITTLE * GIBIBYTE:
            console.print(f"  {size / GIBIBYTE:6.2f} GiB  {part_name(name)}")
    rest = plan.needed - plan.memory.peak
    console.print(f"  {rest / GIBIBYTE:6.2f} GiB  {rest_name(plan)}")
    console.print(time_line(plan), soft_wrap=True)
    for price, seconds in costs:
        console.print(f"  {price.name}: {cost_text(price, seconds)}", soft_wrap=True)
    for note in notes:
        console.print(note, style="yellow", soft_wrap=True)
    console.print()
    console.print(
        _("Memory for other sizes and methods, for these recordings (GiB; * does not fit here):"), soft_wrap=True
    )
    console.print(sizes_table(plan))


def facts(plan: Plan) -> str:
    recordings, device = plan.recordings, plan.device
    short = _("{model}, {steps} steps: about {time}, {needed:.1f} GiB").format(
        model=plan.model, steps=plan.steps, time=time_text(plan.duration.total), needed=plan.needed / GIBIBYTE
    )
    return "\n".join(
        [
            short,
            _("Recordings: {clips} to train on, {hours:.2f} hours, up to {longest:.1f} s; {held_out} held out").format(
                clips=recordings.clips,
                hours=recordings.hours,
                longest=recordings.longest,
                held_out=recordings.held_out,
            ),
            _("Device: {name}, {free:.1f} of {memory:.1f} GiB free").format(
                name=f"{plan.config.processes} x {device.name}" if plan.config.processes > 1 else device.name,
                free=device.free / GIBIBYTE,
                memory=device.memory / GIBIBYTE,
            ),
            "",
        ]
    )


def memory_line(plan: Plan) -> str:
    return _("Predicted memory at its fullest: {needed:.2f} GiB, of {room:.2f} GiB that can be planned with").format(
        needed=plan.needed / GIBIBYTE, room=plan.room / GIBIBYTE
    )


def time_line(plan: Plan) -> str:
    duration = plan.duration
    return _("Predicted time: {total} ({training} training, {evaluation} measuring)").format(
        total=time_text(duration.total),
        training=time_text(duration.training),
        evaluation=time_text(duration.evaluation),
    )


def time_text(seconds: float) -> str:
    if seconds < 100:
        return _("{seconds:.0f} s").format(seconds=seconds)
    if seconds < 100 * 60:
        return _("{minutes:.0f} min").format(minutes=seconds / 60)
    return _("{hours:.1f} h").format(hours=seconds / 3600)


def cost_text(price: Price, seconds: float) -> str:
    return _("{time}, {cost:.2f} {currency} at {per_hour:g} an hour").format(
        time=time_text(seconds), cost=price.per_hour * seconds / 3600, currency=price.currency, per_hour=price.per_hour
    )


def part_name(name: str) -> str:
    return {
        "weights": _("weights of the model"),
        "adapters": _("adapters"),
        "optimizer": _("optimiser"),
        "buckets": _("exchange between GPUs"),
        "gradients": _("gradients"),
        "activations": _("activations"),
        "logits": _("scores of all tokens (logits)"),
        "working": _("working space"),
    }[name]


def rest_name(plan: Plan) -> str:
    if plan.device.kind == "cuda":
        return _("the GPU's driver, and gaps that the allocator cannot use")
    return _("Python and its packages")


def sizes_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(_("model"), no_wrap=True)
    for heading, _changes in methods():
        table.add_column(heading, justify="right", overflow="fold")
    for name, needed in sizes(plan).items():
        table.add_row(name, *(Text(f"{size / GIBIBYTE:.1f}" + ("*" if size > plan.room else " ")) for size in needed))
    return table


def methods() -> list[tuple[str, dict[str, Any]]]:
    """The columns of the table: what each changes in the plan's job."""
    one = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    eight = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    plain = {"finetuning": "lora", "quantization": "none", "gradient_checkpointing": False}
    return [
        (_("LoRA, batch 8"), plain | eight),
        (_("LoRA, 8-bit, batch 8"), plain | eight | {"quantization": "8bit"}),
        (_("LoRA, batch 1"), plain | one),
        (_("LoRA, 8-bit, batch 1"), plain | one | {"quantization": "8bit"}),
        (_("full, batch 8"), plain | eight | {"finetuning": "full"}),
        (_("full, batch 1"), plain | one | {"finetuning": "full"}),
    ]


def sizes(plan: Plan) -> dict[str, list[int]]:
    """Bytes needed by size and method, at the plan's audio context and labels."""
    found = {}
    for name in reversed(USUAL):
        jobs: list[TrainingJob] = [
            replace(plan.job, shape=PUBLISHED[name], **changes) for _heading, changes in methods()
        ]
        found[name] = [needed_bytes(predict(job), plan.device) for job in jobs]
    return found


def shown(value: Any) -> str:
    """As it is typed; of a long path the end."""
    text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST_SHOWN else f"…{text[-LONGEST_SHOWN + 1 :]}"


def plan_json(
    plan: Plan, chosen: Mapping[str, Reasoned], notes: Sequence[str], costs: Sequence[tuple[Price, float]]
) -> dict[str, Any]:
    """For programs. Bytes and seconds; the settings are those that `resonance train` takes."""
    return {
        "format": 1,
        "fits": plan.fits,
        "predicted_peak_bytes": plan.needed,
        "available_bytes": plan.room,
        "predicted_seconds": round(plan.duration.total, 1),
        "settings": {name: value for name, (value, _reason) in chosen.items()},
        "reasons": {name: reason for name, (_value, reason) in chosen.items()},
        "memory": {**plan.memory.parts, "driver_and_gaps": plan.needed - plan.memory.peak},
        "seconds": {
            "training": round(plan.duration.training, 1),
            "evaluation": round(plan.duration.evaluation, 1),
            "start": plan.duration.start,
        },
        "costs": [
            {
                "name": price.name,
                "gpu": price.device.name,
                "seconds": round(seconds, 1),
                "amount": round(price.per_hour * seconds / 3600, 4),
                "currency": price.currency,
            }
            for price, seconds in costs
        ],
        "device": {
            "kind": plan.device.kind,
            "name": plan.device.name,
            "memory": plan.device.memory,
            "free": plan.device.free,
        },
        "recordings": {
            "train": plan.recordings.clips,
            "hours": round(plan.recordings.hours, 4),
            "longest_seconds": plan.recordings.longest,
            "held_out": plan.recordings.held_out,
            "longest_label_tokens": plan.recordings.longest_label,
        },
        "sizes": sizes(plan),
        "notes": list(notes),
    }
