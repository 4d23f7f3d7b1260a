from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from resonance import passthrough
from resonance.config import TrainConfig, batch_warning, effective_batch
from resonance.config_recognizer import EvaluateConfig, TranscribeConfig
from resonance.languages import LANGUAGES, OTHER_NAMES, language_code

MODELS = (TrainConfig, EvaluateConfig, TranscribeConfig)


def train(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({"train_file": "train.json", "output_dir": "out"} | settings)


def test_defaults_follow_the_settings_they_depend_on() -> None:
    assert (train().learning_rate, train(finetuning="full").learning_rate) == (1e-3, 1e-5)
    assert train(finetuning="frozen_encoder").learning_rate == 1e-5
    assert train(finetuning="full", learning_rate=2e-4).learning_rate == 2e-4
    assert (train().max_steps, train().num_train_epochs) == (500, None)
    assert (train(num_train_epochs=3).max_steps, train(num_train_epochs=3).num_train_epochs) == (None, 3)
    assert train(num_train_epochs=3, max_steps=7, warmup_steps=0).max_steps == 7
    assert train(max_steps=None).max_steps == 500
    assert train(max_steps=-1, num_train_epochs=2).max_steps is None  # how Hugging Face writes "not set"
    assert train(max_steps=60).eval_steps == 60
    assert train(max_steps=1024).eval_steps == 100
    without = train(validation_split=0)
    assert (without.eval_strategy, without.load_best_model_at_end) == ("no", False)
    assert train(validation_split=0, validation_file="v.json").eval_strategy == "steps"


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"train_file": None}, "train_file is needed"),
        ({"train_file": None, "json_file": "a.json"}, "Give dataset_dir"),
        ({"dataset_dir": "d", "json_file": "a.json"}, "train_file and json_file both"),
        ({"quantization": "4bit", "finetuning": "full"}, "quantization 4bit"),
        ({"quantization": "8bit", "finetuning": "frozen_encoder"}, "frozen_encoder"),
        ({"min_audio_len": 5, "max_audio_len": 5}, "min_audio_len 5 is not below max_audio_len 5"),
        ({"audio_context": 10}, "Give max_audio_len 9.4 or less"),
        ({"audio_context": 0.5}, "leaves 0 s"),
        ({"audio_context": 0.65, "max_audio_len": 1}, "leaves 0.05 s"),
        ({"warmup_steps": 20, "max_steps": 20}, "warmup_steps 20"),
        ({"eval_steps": 600}, "eval_steps 600 is more than max_steps 500"),
        ({"save_steps": 150}, "not a multiple of eval_steps 100"),
        ({"save_steps": 100, "eval_strategy": "epoch"}, "save_steps counts steps"),
        ({"eval_strategy": "steps", "validation_split": 0}, "needs data to measure on"),
        ({"eval_strategy": "no", "load_best_model_at_end": True}, "load_best_model_at_end needs"),
        ({"eval_strategy": "no", "early_stopping_patience": 3}, "early_stopping_patience needs"),
        ({"wandb_project": "p"}, "use_wandb is not"),
        ({"model_name_or_path": "openai/whisper-small.en", "language": "zh"}, "knows only English"),
        ({"model_name_or_path": "openai/whisper-small.en", "task": "translate"}, "cannot translate"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ValidationError, match=names):
        train(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"train_file": None, "dataset_dir": "d", "json_file": "a.json"},
        {"dataset_dir": "d"},
        {"audio_context": 10, "max_audio_len": 9.4},
        {"audio_context": 30},
        {"audio_context": "full"},
        {"quantization": "8bit", "precision": "fp16"},
        {"warmup_steps": 500, "num_train_epochs": 3},
        {"warmup_steps": 0.1, "max_steps": 20},
        {"eval_steps": 5000, "num_train_epochs": 3},
        {"save_steps": 200},
        {"save_steps": 150, "load_best_model_at_end": False},
        {"model_name_or_path": "openai/whisper-small.en", "language": "English"},
    ],
)
def test_settings_that_go_together_are_taken(settings: dict[str, Any]) -> None:
    train(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_r", 0),
        ("lora_dropout", 1),
        ("max_audio_len", 30.5),
        ("max_audio_len", 0),
        ("audio_context", 31),
        ("audio_context", "short"),
        ("generation_max_length", 449),
        ("learning_rate", float("nan")),
        ("max_steps", 0),
        ("per_device_train_batch_size", 0),
        ("validation_split", 1),
        ("target_modules", []),
        ("target_modules", ["all-linear", "q_proj"]),
        ("target_modules", ["query"]),
        ("optim", "adamw"),
        ("lr_scheduler_type", "cosin"),
        ("overwrite", True),
    ],
)
def test_values_out_of_bounds_and_unknown_names_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        train(**{name: value})
    assert next(e["loc"][0] for e in caught.value.errors() if e["type"] != "default_factory_not_called") == name


def test_target_modules_may_be_full_paths_inside_the_model() -> None:
    assert train(target_modules=["model.decoder.layers.0.self_attn.q_proj"]).target_modules[0].endswith("q_proj")
    assert train(target_modules=["all-linear"]).target_modules == ["all-linear"]


def test_a_home_folder_is_written_out() -> None:
    assert train(output_dir="~/out").output_dir == Path.home() / "out"
    assert train(model_name_or_path="~/whisper").model_name_or_path == str(Path.home() / "whisper")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        train().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("devices", [1, 3])
def test_effective_batch_counts_accumulation_and_devices(devices: int) -> None:
    assert effective_batch(train(per_device_train_batch_size=2, gradient_accumulation_steps=4), devices) == 8 * devices


@pytest.mark.parametrize(("batch", "warned"), [(7, True), (8, False), (32, False), (33, True)])
def test_effective_batches_outside_8_to_32_are_warned_about(batch: int, warned: bool) -> None:
    warning = batch_warning(train(per_device_train_batch_size=batch), 1)
    assert (warning is not None) == warned
    assert not warned or f"effective batch is {batch}" in str(warning)


@pytest.mark.parametrize(
    ("typed", "code"),
    [
        ("zh", "zh"),
        ("Chinese", "zh"),
        ("MANDARIN", "zh"),
        ("zh-TW", "zh"),
        ("zh_CN", "zh"),
        ("no", "no"),
        ("cantonese", "yue"),
        ("Haitian Creole", "ht"),
        ("en-US", "en"),
        (" English ", "en"),
        ("中文", "zh"),
    ],
)
def test_languages_are_known_by_code_and_name(typed: str, code: str) -> None:
    assert language_code(typed) == code
    assert train(language=typed).language == code


def test_an_unknown_language_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"Did you mean chinese \(zh\)"):
        language_code("chinse")
    with pytest.raises(ValueError, match="such as zh, Chinese"):
        language_code("klingon")


def test_languages_are_those_of_the_installed_tokenizer() -> None:
    source = transformers_folder() / "models/whisper/tokenization_whisper.py"
    tables = {
        node.targets[0].id: node.value
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert ast.literal_eval(tables["LANGUAGES"]) == LANGUAGES
    aliases = tables["TO_LANGUAGE_CODE"]
    assert isinstance(aliases, ast.Dict)
    theirs = {
        k.value: v.value for k, v in zip(aliases.keys, aliases.values, strict=True) if isinstance(k, ast.Constant)
    }  # type: ignore[attr-defined]
    assert theirs == {name: code for name, code in OTHER_NAMES.items() if name.isascii()}


def transformers_folder() -> Path:
    spec = importlib.util.find_spec("transformers")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("adam_beta2", "0.98", 0.98),
        ("tf32", "none", None),
        ("tf32", "True", True),
        ("ddp_timeout", "3600", 3600),
        ("neftune_noise_alpha", "5", 5.0),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
        ("lr_scheduler_kwargs", {"num_cycles": 2}, {"num_cycles": 2}),
        ("project", "voices", "voices"),
        ("optim_target_modules", "all-linear", "all-linear"),
        ("optim_target_modules", "attn, mlp", ["attn", "mlp"]),
        ("include_for_metrics", "loss", ["loss"]),
        ("hub_strategy", "end", "end"),
        ("include_num_input_tokens_seen", "non_padding", "non_padding"),
    ],
)
def test_further_training_arguments_get_their_own_type(name: str, text: Any, value: Any) -> None:
    found = train(extra={name: text}).extra[name]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("adam_beta2", "high", "a number"),
        ("adam_beta2", "nan", "a number"),
        ("ddp_timeout", "1.5", "a whole number"),
        ("tf32", "maybe", "true or false or none"),
        ("hub_strategy", "always", "end, every_save"),
        ("lr_scheduler_kwargs", "{broken", "mapping"),
        ("no_such_argument", "1", "no such training argument"),
        ("learning_rate", "1", "setting of its own"),
        ("fp16", "true", "setting of its own"),
        ("warmup_ratio", "0.1", "warmup_steps"),
        ("evaluation_strategy", "steps", "eval_strategy"),
        ("overwrite_output_dir", "True", "never overwritten"),
        ("remove_unused_columns", "True", "Only false"),
        ("predict_with_generate", "False", "Only true"),
        ("report_to", "wandb", "use_wandb"),
        ("label_names", "targets", "always named labels"),
        ("train_sampling_strategy", "random", "similar length"),
        ("average_tokens_across_devices", "False", "leave the setting out"),
        ("save_strategy", "epoch", "with each evaluation"),
        ("save_strategy", "no", "with each evaluation"),
    ],
)
def test_further_training_arguments_that_cannot_be_passed_on_are_refused(name: str, value: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        train(extra={name: value})


def test_arguments_that_equal_what_is_done_anyway_are_taken_and_not_passed_on() -> None:
    same = {"remove_unused_columns": "False", "predict_with_generate": "True", "report_to": "tensorboard"}
    assert (
        train(extra=same | {"save_strategy": "steps", "greater_is_better": False, "label_names": "labels"}).extra == {}
    )
    assert train(eval_strategy="epoch", extra={"save_strategy": "epoch"}).extra == {}
    assert train(eval_strategy="no", extra={"save_strategy": "steps"}).extra == {}


def test_lists_of_argument_names_match_the_installed_transformers() -> None:
    known = set(passthrough.arguments())
    assert set(passthrough.removed()) & known == set()
    assert set(passthrough.owned()) <= known
    ours = set(TrainConfig.model_fields) | set(TrainConfig.aliases)
    assert ours & (set(passthrough.owned()) | set(passthrough.removed())) == set()
    # Every name of transformers' own list is there, inherited ones too.
    assert {"adam_beta1", "dataloader_prefetch_factor", "sortish_sampler", "predict_with_generate"} <= known


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_has_help_of_one_paragraph_and_every_group_and_alias_a_setting(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert "\n\n" not in field.description, name
    fields = list(model.model_fields)
    groups = getattr(model, "groups", {})
    assert next(iter(groups)) == fields[0]
    assert set(groups) <= set(fields)
    for alias, meaning in getattr(model, "aliases", {}).items():
        assert alias not in fields
        assert (meaning if isinstance(meaning, str) else meaning.setting) in fields


def test_the_exact_one_of_two_ways_to_name_recordings_is_needed() -> None:
    for wrong in ({}, {"audio_path": "a.wav", "audio_list": "l.txt"}):
        with pytest.raises(ValidationError, match="either audio_path"):
            TranscribeConfig.model_validate({"model_path": "m"} | wrong)
    with pytest.raises(ValidationError, match="dataset_dir, which is missing"):
        EvaluateConfig.model_validate({"model_path": "m", "json_file": "labels.json"})
    EvaluateConfig.model_validate({"model_path": "m", "dataset_dir": "d", "json_file": "test.json"})


def test_importing_the_settings_is_quick_and_loads_no_heavy_package() -> None:
    script = """
import sys, time
from pydantic import BaseModel, Field, ConfigDict, AfterValidator, ValidationInfo, model_validator
class Warm(BaseModel):
    x: int = Field(1, ge=0)
import yaml
start = time.process_time()
import resonance.config, resonance.config_io
took = time.process_time() - start
resonance.config_io.from_mapping(resonance.config.TrainConfig, {"train_file": "a", "output_dir": "b", "tf32": "true"})
heavy = sorted({"torch", "transformers", "peft", "numpy", "rich"} & sys.modules.keys())
print(took, *heavy)
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    assert all(len(run.stdout.split()) == 1 for run in runs), runs[0].stdout
    assert min(float(run.stdout) for run in runs) < 0.15
