"""`resonance plan` and `resonance train --auto`: measure the recordings, find the device, choose, show."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from resonance.config import TrainConfig
from resonance.config_io import from_mapping, write_settings
from resonance.config_plan import PlanConfig
from resonance.config_types import memory_bytes
from resonance.errors import ConfigError, ModelError
from resonance.messages import _
from resonance.model.builtin import folder_of
from resonance.model.sizes import PUBLISHED, USUAL, WhisperShape, published_shape, shape_from_config
from resonance.plan import calibration, devices
from resonance.plan.choose import Plan, best_plan, can_quantize, plan_for
from resonance.plan.prices import Price, read_prices
from resonance.plan.recordings import made_up, measure
from resonance.plan.settings import Reasoned, settings_of
from resonance.plan.show import plan_json, print_plan
from resonance.units import GIBIBYTE

Config = TypeVar("Config", bound=TrainConfig)
OUTLIER = 1.5  # times the usual longest, from which a recording is worth a note
HELD_BY_OTHERS = 0.15  # of a GPU's memory


def run(config: PlanConfig, console: Console) -> int:
    """Show the plan; write it where asked for. Raises ConfigError where nothing fits, with what would."""
    memory = memory_bytes(config.gpu_memory) if config.gpu_memory else None
    device = devices.choose(config.gpu, memory) if config.gpu or memory else device_of(config)
    to_screen = Console(stderr=True, markup=False, highlight=False) if config.print_json else console
    plan = make_plan(config, device, to_screen)
    chosen, notes = settings_of(plan, config), notes_on(plan, config)
    prices = read_prices(config.prices)
    costs = costs_of(plan, config, prices)
    if config.print_json:
        print(json.dumps(plan_json(plan, chosen, notes, costs), ensure_ascii=False, indent=1))
    else:
        print_plan(plan, chosen, notes, costs, console)
    if not plan.fits:
        raise ConfigError([nothing_fits(plan, config, costs)])
    if config.write:
        write(chosen, config)
        to_screen.print(_("Written: {path}. To train with it:").format(path=config.write), soft_wrap=True)
        to_screen.print(f"  {train_command(config)}", soft_wrap=True)
    return 0


def train_command(config: PlanConfig) -> str:
    """What to type to train as planned."""
    words = ["resonance", "train", "--config", str(config.write)]
    if config.hours is not None:
        words += ["--train_file", "labels.json"]
    if "output_dir" not in config.model_fields_set:
        words += ["--output_dir", str(config.output_dir)]
    return shlex.join(words)


def device_of(config: TrainConfig) -> devices.Device:
    """Where this machine will train with these settings."""
    return replace(devices.processor(), here=True) if config.extra.get("use_cpu") else devices.find()


def planned(config: Config, console: Console) -> Config:
    """`config` with what it leaves open chosen for this machine. Raises ConfigError where nothing fits."""
    plan = make_plan(config, device_of(config), console)
    chosen = settings_of(plan, config)
    print_plan(plan, chosen, notes_on(plan, config), (), console)
    if not plan.fits:
        raise ConfigError([nothing_fits(plan, config, ())])
    return from_mapping(type(config), settled(config, chosen) | {"auto": False}, _("plan"))


def make_plan(config: TrainConfig, device: devices.Device, console: Console) -> Plan:
    shapes, folder = shapes_of(config)
    if isinstance(config, PlanConfig) and config.hours is not None:
        recordings = made_up(config.hours, config.clip_seconds)
    else:
        recordings = measure(config, folder, console)
    return best_plan(config, shapes, device, recordings)


def shapes_of(config: TrainConfig) -> tuple[dict[str, WhisperShape], Path | None]:
    """The models to choose from, largest first, and the folder of the only one where the user named it."""
    if "model_name_or_path" not in config.model_fields_set:
        return {f"openai/whisper-{size}": PUBLISHED[size] for size in USUAL}, None
    name = config.model_name_or_path
    folder = checkpoint_folder(name, config.cache_dir)
    if folder:
        try:
            numbers = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return {name: shape_from_config(numbers)}, folder
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                _("{path} does not describe a Whisper model ({reason}).").format(
                    path=folder / "config.json", reason=error
                )
            ) from error
    shape = published_shape(name)
    if shape is None:
        raise ModelError(
            _(
                "{name} is not on this machine, so its size is not known. Download it first (`hf download {name}`), or plan "
                "for one of {names}."
            ).format(name=name, names=", ".join(f"openai/whisper-{size}" for size in PUBLISHED))
        )
    return {name: shape}, None


def checkpoint_folder(name: str, cache_dir: Path | None) -> Path | None:
    """Where the checkpoint's config.json lies on this machine; None where it does not."""
    folder = Path(folder_of(name))
    if (folder / "config.json").is_file():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name.rstrip("/"), "config.json", cache_dir=cache_dir)
    except HFValidationError:  # no name of the hub
        return None
    return Path(found).parent if isinstance(found, str) else None


def costs_of(plan: Plan, config: TrainConfig, prices: Sequence[Price]) -> list[tuple[Price, float]]:
    """Seconds on each machine of the price list whose card holds the best plan for it, the cheapest training first."""
    found = []
    for price in prices:
        there = best_plan(config, {plan.model: plan.shape}, price.device, plan.recordings)
        if there.fits:
            found.append((price, there.duration.total))
    return sorted(found, key=lambda item: (item[0].currency, item[0].per_hour * item[1]))


def notes_on(plan: Plan, config: TrainConfig) -> list[str]:
    """What the user should know and may want to change."""
    notes = []
    recordings, device = plan.recordings, plan.device
    longest = min(recordings.longest, config.max_audio_len)
    if longest > OUTLIER * recordings.usual_longest:
        usual = math.ceil(10 * recordings.usual_longest) / 10
        shorter = plan_for(
            plan.model, plan.shape, plan.config, device, recordings, replace(plan.rung, max_audio_len=usual)
        )
        notes.append(
            _(
                "Nearly all recordings are at most {usual:.1f} s long, the longest is {longest:.1f} s and decides about the "
                "memory: with --max_audio_len {usual:.1f} it would be {needed:.2f} GiB."
            ).format(usual=usual, longest=longest, needed=shorter.needed / GIBIBYTE)
        )
    if device.kind == "cuda" and device.free < (1 - HELD_BY_OTHERS) * device.memory:
        notes.append(
            _(
                "Other programs hold {held:.1f} GiB of the GPU; `nvidia-smi` shows which. The plan uses what is free."
            ).format(held=(device.memory - device.free) / GIBIBYTE)
        )
    if plan.job.quantization != "none":
        notes.append(
            _('{bits} weights need bitsandbytes: pip install "resonance-asr[quant]"').format(bits=plan.job.quantization)
        )
    if device.kind == "cpu":
        notes.append(
            _("There is no GPU here. With a rented one it would be much faster; resonance plan shows what that costs.")
        )
    if plan.learnt_from:
        notes.append(
            _("Corrected by what {count} earlier trainings took here ({file}).").format(
                count=plan.learnt_from, file=calibration.file()
            )
        )
    if not recordings.counted and not (isinstance(config, PlanConfig) and config.hours):
        notes.append(_("The lengths of the labels are estimated: the model's tokenizer is not on this machine."))
    return notes


def nothing_fits(plan: Plan, config: TrainConfig, costs: Sequence[tuple[Price, float]]) -> str:
    """The least that would be needed, what would fit instead, and what to rent."""
    smaller = [
        name
        for name in USUAL
        if PUBLISHED[name].parameters < plan.shape.parameters
        and best_plan(config, {name: PUBLISHED[name]}, plan.device, plan.recordings).fits
    ]
    lines = [
        _("{model} needs at least {needed:.2f} GiB, and {room:.2f} GiB can be planned with on {device}.").format(
            model=plan.model,
            needed=plan.needed / GIBIBYTE,
            room=plan.room / GIBIBYTE,
            device=plan.device.name,
        )
    ]
    elsewhere = replace(plan.device, here=False)
    if not can_quantize(plan.device) and can_quantize(elsewhere):
        quantized = best_plan(config, {plan.model: plan.shape}, elsewhere, plan.recordings)
        if quantized.fits and quantized.job.quantization != "none":
            lines.append(
                _('It would fit with {bits} weights: pip install "resonance-asr[quant]" and plan again.').format(
                    bits=quantized.job.quantization
                )
            )
    if smaller:
        lines.append(_("openai/whisper-{size} would fit.").format(size=smaller[0]))
    if costs:
        price, _seconds = costs[0]
        lines.append(
            _("It fits on {gpu}: {name}, {currency} {per_hour:g} an hour.").format(
                gpu=price.device.name, name=price.name, currency=price.currency, per_hour=price.per_hour
            )
        )
    return " ".join(lines)


def settled(config: TrainConfig, chosen: Mapping[str, Reasoned]) -> dict[str, Any]:
    """What the user gave for training and what was chosen."""
    own = PlanConfig.model_fields.keys() - TrainConfig.model_fields.keys()
    given: dict[str, Any] = config.model_dump(mode="json", include=config.model_fields_set - own)
    extra: dict[str, Any] = given.pop("extra", {})
    return given | extra | {name: value for name, (value, _reason) in chosen.items()}


def write(chosen: Mapping[str, Reasoned], config: PlanConfig) -> None:
    """The settings as a file for --config. Raises ConfigError where they disagree, RunFolderError where it cannot be written."""
    assert config.write is not None
    values = settled(config, chosen)
    from_mapping(TrainConfig, {"train_file": "labels.json", "output_dir": "run"} | values, _("plan"))
    write_settings(values, config.write)
