"""Settings that follow from recordings, model and device; and what happens where little or nothing fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resonance.config import TrainConfig
from resonance.model.sizes import PUBLISHED, USUAL
from resonance.plan.choose import Plan, best_plan
from resonance.plan.devices import Device, choose, processor
from resonance.plan.feature_cache import feature_cache
from resonance.plan.recordings import Recordings, made_up
from resonance.plan.settings import settings_of
from resonance.units import GIBIBYTE

ALL = {size: PUBLISHED[size] for size in USUAL}


def config(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"train_file": Path("labels.json"), "output_dir": Path("run"), **values})


def card(gib: float, name: str | None = None) -> Device:
    return choose(name, int(gib * GIBIBYTE))


def plan(gib: float, hours: float, seconds: float = 5.0, **values: Any) -> Plan:
    return best_plan(config(**values), ALL, card(gib), made_up(hours, seconds))


def value(plan: Plan, name: str) -> Any:
    return settings_of(plan, config())[name].value


@pytest.mark.parametrize(
    ("hours", "models"), [(0.1, {"small"}), (5, {"small", "medium"}), (30, {"medium", "large-v3"}), (80, {"large-v3"})]
)
def test_more_speech_gets_a_larger_model(hours: float, models: set[str]) -> None:
    assert plan(24, hours).model in models


@pytest.mark.parametrize("gib", [4, 6, 8, 12, 16, 24, 48])
@pytest.mark.parametrize(("hours", "seconds"), [(0.1, 3.0), (20, 10.0), (100, 30.0)])
def test_what_is_planned_fits_with_some_memory_left(gib: float, hours: float, seconds: float) -> None:
    found = plan(gib, hours, seconds)
    assert found.fits and found.needed <= 0.92 * gib * GIBIBYTE
    batch, times = (value(found, n) for n in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    assert batch * times == (8 if hours < 10 else 16)


def test_less_memory_never_gets_a_larger_model_or_batch() -> None:
    found = [plan(gib, 100, 30.0) for gib in (3, 4, 6, 8, 12, 16, 24, 48)]
    sizes = [p.shape.parameters for p in found]
    assert sizes == sorted(sizes)
    large = [
        value(p, "per_device_train_batch_size")
        for p in found
        if p.model == "large-v3" and not p.job.gradient_checkpointing
    ]
    assert large == sorted(large) and len(set(large)) > 1


def test_sixteen_gigabytes_hold_large_v3_in_16_bits_with_batches_of_four_at_30_seconds() -> None:
    # The third row of the recommendations that users know by heart, which are for LoRA on q_proj and v_proj.
    found = plan(16, 100, 30.0, target_modules=["q_proj", "v_proj"])
    assert (found.model, value(found, "quantization"), value(found, "per_device_train_batch_size")) == (
        "large-v3",
        "none",
        4,
    )


def test_what_the_user_gives_is_kept_and_said() -> None:
    given = {"per_device_train_batch_size": 2, "quantization": "8bit", "max_steps": 77, "lora_r": 8}
    found = plan(8, 0.5, **given)
    for name in ("per_device_train_batch_size", "quantization", "max_steps"):
        assert settings_of(found, config(**given))[name] == (given[name], "as you gave it")
    assert found.job.lora_r == 8 and found.steps == 77


def test_a_model_that_is_named_is_not_exchanged() -> None:
    found = best_plan(config(), {"medium": PUBLISHED["medium"]}, card(1.0), made_up(0.1, 3.0))
    assert found.model == "medium" and not found.fits
    assert found.needed > found.room


def test_where_nothing_fits_the_least_that_would_be_needed_is_told() -> None:
    found = best_plan(config(), ALL, card(0.5), made_up(1, 30.0))
    assert not found.fits and found.model == "tiny"
    assert found.job.per_device_train_batch_size == 1 and found.job.gradient_checkpointing


def test_memory_that_other_programs_hold_is_not_planned_with() -> None:
    crowded = replace(card(24), free=4 * GIBIBYTE)
    assert best_plan(config(), ALL, crowded, made_up(100, 30.0)).needed < 4 * GIBIBYTE


def test_a_processor_gets_a_model_that_is_done_in_hours_and_no_quantisation() -> None:
    found = best_plan(config(), ALL, replace(processor(), flops=1e11, free=64 * GIBIBYTE), made_up(2, 10.0))
    assert found.duration.total < 6 * 3600 and found.model in ("base", "tiny")
    assert value(found, "quantization") == "none" and value(found, "precision") == "fp32"


def test_one_long_recording_decides_about_the_memory() -> None:
    short = made_up(0.2, 3.0)
    with_outlier = Recordings((*short.train_seconds, 30.0), 0, short.label_tokens, False)
    shapes = {"small": PUBLISHED["small"]}
    one, other = (best_plan(config(per_device_train_batch_size=8), shapes, card(24), r) for r in (short, with_outlier))
    assert other.needed > 2 * one.needed
    assert with_outlier.usual_longest == 3.0


def test_one_recording_is_enough_for_a_plan() -> None:
    found = best_plan(config(), ALL, card(8), made_up(0.001, 3.0))
    assert found.recordings.clips == 1 and value(found, "per_device_train_batch_size") == 1


def test_accumulation_that_is_given_is_kept_and_the_batch_follows() -> None:
    for times in (2, 3):
        found = plan(8, 1, gradient_accumulation_steps=times)
        assert found.rung.gradient_accumulation_steps == times
        assert 4 <= found.rung.effective_batch <= 8
    tight = best_plan(
        config(gradient_accumulation_steps=2), {"large-v3": PUBLISHED["large-v3"]}, card(6), made_up(1, 30.0)
    )
    assert tight.fits and tight.rung.gradient_accumulation_steps == 2


def test_a_batch_that_is_given_is_accumulated_to_one_that_works_well() -> None:
    found = plan(8, 1, per_device_train_batch_size=2)
    assert (found.rung.per_device_train_batch_size, found.rung.gradient_accumulation_steps) == (2, 4)


def test_steps_leave_room_for_the_warm_up_and_the_measurements_that_are_given() -> None:
    assert plan(24, 100, warmup_steps=500, auto=True).steps >= 1000
    assert plan(24, 1, eval_steps=1000, auto=True).steps >= 1000
    assert plan(24, 5, save_steps=100).eval_steps == 100


def test_half_precision_on_a_processor_is_counted_as_it_is_trained() -> None:
    found = best_plan(config(precision="fp16"), {"base": PUBLISHED["base"]}, processor(), made_up(0.1, 3.0))
    assert found.job.precision == "fp32"


def test_a_longer_training_takes_longer_and_a_faster_card_less() -> None:
    recordings, shapes = made_up(1, 5.0), {"small": PUBLISHED["small"]}
    seconds = {
        (name, steps): best_plan(config(max_steps=steps), shapes, choose(name, None), recordings).duration.total
        for name in ("T4", "RTX 4090")
        for steps in (500, 1000)
    }
    assert seconds["T4", 1000] > 1.5 * seconds["T4", 500]
    assert seconds["RTX 4090", 1000] < seconds["T4", 1000]


@pytest.mark.parametrize(
    ("hours", "gib", "method"),
    [
        (0.2, 8, ("lora", "q_proj,v_proj", 1e-3)),
        (0.2, 80, ("lora", "q_proj,v_proj", 1e-3)),
        (20, 12, ("lora", "all-linear", 2e-4)),
        (300, 24, ("lora", "all-linear", 2e-4)),  # large-v3 does not fit whole: better it in part than medium whole
        (300, 80, ("full", None, 1e-5)),
    ],
)
def test_more_speech_and_memory_train_more_of_the_model(hours: float, gib: float, method: tuple[Any, ...]) -> None:
    found = plan(gib, hours, 10.0)
    chosen = {name: reasoned.value for name, reasoned in settings_of(found, config()).items()}
    assert (chosen["finetuning"], chosen.get("target_modules"), chosen["learning_rate"]) == method
    assert found.fits


@pytest.mark.parametrize(
    "given",
    [{"finetuning": "lora"}, {"lora_r": 8}, {"target_modules": ["q_proj"]}, {"learning_rate": 1e-3}],
)
def test_who_settles_a_part_of_the_method_gets_no_other_one(given: dict[str, Any]) -> None:
    found = plan(80, 300, 10.0, **given)
    assert found.config.finetuning == "lora" and found.config.target_modules != ["all-linear"]
    assert {name: getattr(found.config, name) for name in given} == given


def test_weights_held_in_8_bits_are_not_trained_whole() -> None:
    assert plan(80, 300, 10.0, quantization="8bit").config.finetuning == "lora"


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, "disk"),
        ({"workers": 16}, "none"),  # prepare it fast enough
        ({"passes": 1.2}, "none"),
        ({"hours": 5000.0}, "none"),  # more than a fifth of the disk
        ({"gain_db": 6.0}, "none"),
        ({"clips_per_second": 50.0}, "none"),
    ],
)
def test_features_are_kept_where_preparing_them_would_hold_up_the_gpu(changes: dict[str, Any], kept: str) -> None:
    given = {"passes": 3.0, "clips_per_second": 600.0, "workers": 4} | {
        k: v for k, v in changes.items() if k not in ("hours", "gain_db")
    }
    settings = {k: v for k, v in changes.items() if k == "gain_db"}
    recordings = made_up(changes.get("hours", 20.0), 5.0)
    chosen, reason = feature_cache(config(**settings), card(24), recordings, 80, **given)
    assert chosen == kept and reason


def test_several_processes_share_the_effective_batch_the_measuring_and_what_zero_divides() -> None:
    alone, eight = (plan(24, 60, 10.0, nproc=n, model_name_or_path="medium", finetuning="lora") for n in (1, 8))
    assert alone.effective_batch == eight.effective_batch == 16
    assert value(eight, "per_device_train_batch_size") * value(eight, "gradient_accumulation_steps") == 2
    assert eight.steps == alone.steps and eight.duration.evaluation < alone.duration.evaluation
    assert eight.duration.training < alone.duration.training
    given = {"nproc": 8, "finetuning": "full", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    needed = [plan(80, 60, 10.0, **given, **how).needed for how in ({}, {"deepspeed": "zero1"}, {"deepspeed": "zero3"})]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == 3
    assert plan(80, 60, 10.0, **given, fsdp=True).needed == needed[2]
