from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from resonance import config_help
from resonance.config import CurveConfig, TrainConfig
from resonance.config_help import help_page
from resonance.config_io import dump_yaml, from_mapping, load_yaml, parse
from resonance.config_recognizer import EvaluateConfig, TranscribeConfig
from resonance.errors import ConfigError, RunFolderError

NEEDED = ["--train_file", "train.json", "--output_dir", "out"]


def train(*argv: str) -> TrainConfig:
    return parse(TrainConfig, [*NEEDED, *argv], "resonance train")


def problems_of(*argv: str, model: type[BaseModel] = TrainConfig, needed: bool = True) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(model, [*(NEEDED if needed else []), *argv], "resonance train")
    return list(caught.value.problems)


def file_with(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Row of the specification, flag and value as its users type them, setting, and what it becomes.
KNOWN_FLAGS = [
    ("A1", "--per_device_train_batch_size 4", "per_device_train_batch_size", 4),
    ("A1", "--per_device_eval_batch_size 2", "per_device_eval_batch_size", 2),
    ("A1", "--gradient_accumulation_steps 2", "gradient_accumulation_steps", 2),
    ("A1", "--use_8bit=True", "quantization", "8bit"),
    ("A1", "--use_8bit=False", "quantization", "none"),
    ("A1", "--max_audio_len 25", "max_audio_len", 25.0),
    ("A1", "--fp16=True", "precision", "fp16"),
    ("A1", "--fp16=False", "precision", "fp32"),
    ("A1", "--base_model openai/whisper-large-v3", "model_name_or_path", "openai/whisper-large-v3"),
    ("B2", "--model_name_or_path openai/whisper-tiny", "model_name_or_path", "openai/whisper-tiny"),
    ("B2", "--cache_dir ./models", "cache_dir", Path("models")),
    ("B2", "--train_file a.json", "train_file", Path("a.json")),
    ("B2", "--validation_file b.json", "validation_file", Path("b.json")),
    ("B2", "--max_train_samples 100", "max_train_samples", 100),
    ("B2", "--max_eval_samples 10", "max_eval_samples", 10),
    ("B2", "--output_dir result", "output_dir", Path("result")),
    ("B2", "--num_train_epochs 3", "num_train_epochs", 3.0),
    ("B2", "--learning_rate 1e-3", "learning_rate", 0.001),
    ("B2", "--warmup_steps 50", "warmup_steps", 50.0),
    ("B2", "--logging_steps 25", "logging_steps", 25),
    ("B2", "--save_steps 200", "save_steps", 200),
    ("B2", "--eval_steps 50", "eval_steps", 50),
    ("B2", "--fp16", "precision", "fp16"),
    ("B2", "--gradient_checkpointing", "gradient_checkpointing", True),
    ("B2", "--lora_r 64", "lora_r", 64),
    ("B2", "--lora_alpha 128", "lora_alpha", 128),
    ("B2", "--lora_dropout 0.1", "lora_dropout", 0.1),
    ("B2", "--use_wandb", "use_wandb", True),
    ("B2", "--use_wandb --wandb_project whisper", "wandb_project", "whisper"),
    ("C3", "--target_modules q_proj,v_proj", "target_modules", ["q_proj", "v_proj"]),
    ("C3", "--max_steps 800", "max_steps", 800),
    ("C3", "--validation_split 0.1", "validation_split", 0.1),
    ("C3", "--eval_strategy steps", "eval_strategy", "steps"),
    ("D3", "--dataset_dir data", "dataset_dir", Path("data")),
    ("D3", "--dataset_dir data --json_file map.json --train_file none", "json_file", "map.json"),
    ("D3", "--language zh", "language", "zh"),
    ("D3", "--task translate", "task", "translate"),
    ("D3", "--max_steps 1024 --warmup_steps 500", "max_steps", 1024),
    ("E2", "--dataloader_num_workers 4", "dataloader_num_workers", 4),
    ("E2", "--generation_max_length 448", "generation_max_length", 448),
    ("E2", "--max_steps 5000 --predict_with_generate --report_to tensorboard", "max_steps", 5000),
    ("E2", "--gradient_checkpointing False", "gradient_checkpointing", False),
    ("HF", "--bf16", "precision", "bf16"),
    ("HF", "--fp16 False --bf16 True", "precision", "bf16"),
    ("HF", "--fp16 False --bf16 False", "precision", "fp32"),
    ("HF", "--load_in_8bit True", "quantization", "8bit"),
    ("HF", "--load_in_8bit False --load_in_4bit", "quantization", "4bit"),
    ("HF", "--resume_from_checkpoint true", "resume", True),
    ("HF", "--seed=7 --seed 8", "seed", 8),
    ("HF", "--target_modules q_proj k_proj --seed 1", "target_modules", ["q_proj", "k_proj"]),
    ("HF", "--per-device-train-batch-size=3", "per_device_train_batch_size", 3),
    ("HF", "--save_total_limit none", "save_total_limit", None),
    ("HF", "--quantization none", "quantization", "none"),
    ("HF", "--audio_context 12.5 --max_audio_len 11", "audio_context", 12.5),
    ("HF", "--adam_beta2 0.98 --tf32", "extra", {"adam_beta2": 0.98, "tf32": True}),
    ("HF", "--run_name 007", "run_name", "007"),
    ("HF", "--run_name=--odd", "run_name", "--odd"),
]


@pytest.mark.parametrize(("row", "flags", "name", "value"), KNOWN_FLAGS, ids=[f"{r} {f}" for r, f, *_ in KNOWN_FLAGS])
def test_training_takes_the_flags_people_know(row: str, flags: str, name: str, value: Any) -> None:
    assert getattr(train(*flags.split()), name) == value


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--model_path adapter --audio_path a.wav", "audio_path", Path("a.wav")),
        ("--model_path adapter --audio_list l.txt", "audio_list", Path("l.txt")),
        ("--model_path adapter --audio_path a.wav --output_file o.json", "output_file", Path("o.json")),
        ("--model_path adapter --audio_path a.wav --language Chinese", "language", "zh"),
        ("--model_path adapter --audio_path a.wav --task translate", "task", "translate"),
        ("--model_path adapter --audio_path a.wav --return_timestamps", "return_timestamps", True),
        ("--model_path adapter --audio_path a.wav --return_timestamps segment", "return_timestamps", True),
        ("--model_path adapter --audio_path a.wav --return_timestamps=False", "return_timestamps", False),
        ("--model_path adapter --audio_path a.wav --device cpu", "device", "cpu"),
        ("--model_path adapter --audio_path a.wav --per_device_eval_batch_size 3", "batch_size", 3),
    ],
)
def test_transcription_takes_the_flags_people_know(flags: str, name: str, value: Any) -> None:  # row B4
    assert getattr(parse(TranscribeConfig, flags.split(), "resonance transcribe"), name) == value


def test_evaluation_takes_its_data_under_each_known_name() -> None:
    for flag in ("--test_file", "--validation_file", "--test_data"):
        config = parse(EvaluateConfig, ["--model_path", "m", flag, "t.json"], "resonance evaluate")
        assert config.test_file == Path("t.json")


def test_later_layers_win(tmp_path: Path) -> None:
    low = file_with(tmp_path / "low.yaml", "lora_r: 4\nlora-alpha: 8\nseed: 1\nadam_beta1: 0.8\nadam_beta2: 0.8\n")
    high = file_with(tmp_path / "high.yaml", "lora_alpha: 16\nseed: 2\nadam_beta2: 0.9\n")
    config = train("--config", str(low), "--seed", "3", "--config", str(high))
    assert (config.lora_r, config.lora_alpha, config.seed, config.lora_dropout) == (4, 16, 3, 0.05)
    assert config.extra == {"adam_beta1": 0.8, "adam_beta2": 0.9}


@pytest.mark.parametrize(
    ("text", "flags", "precision"),
    [
        ("bf16: true", "--fp16", "fp16"),
        ("fp16: true", "--precision bf16", "bf16"),
        ("precision: fp16", "--fp16=False", "fp32"),
        ("precision: auto", "--fp16=False", "fp32"),
        ("bf16: true", "--fp16=False", "bf16"),  # "not fp16" says nothing about bf16
        ("fp16: false", "", "fp32"),
    ],
)
def test_other_names_for_a_setting_follow_the_layers(tmp_path: Path, text: str, flags: str, precision: str) -> None:
    path = file_with(tmp_path / "run.yaml", text)
    assert train("--config", str(path), *flags.split()).precision == precision


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--fp16 --bf16", ("--fp16", "--bf16")),
        ("--fp16 --precision bf16", ("--fp16", "--precision")),
        ("--precision fp16 --fp16=False", ("--precision", "--fp16")),
        ("--use_8bit --load_in_4bit", ("--use_8bit", "--load_in_4bit")),
        ("--use_8bit --quantization none", ("--use_8bit", "--quantization")),
        ("--base_model a --model_name_or_path b", ("--base_model", "--model_name_or_path")),
    ],
)
def test_names_that_contradict_each_other_are_both_named(flags: str, names: tuple[str, str]) -> None:
    (problem,) = problems_of(*flags.split())
    assert all(name in problem for name in names)


def test_all_problems_are_told_at_once_with_their_place(tmp_path: Path) -> None:
    path = file_with(tmp_path / "run.yaml", "# recipe\nlora_r: abc\nlanguage: Chinse\nwarmup_ratio: 0.1\nseed: 1\n")
    found = problems_of(
        *["--config", str(path), "--learning-rat", "1", "stray", "--finetuning", "full", "--quantization", "8bit"],
        *["--target_modules", "q_proj,vproj", "--adam_beta2", "x", "--use_8bit=perhaps", "--max_steps"],
        needed=False,
    )
    expected = [
        "command line: 'stray' belongs to no setting",
        "command line: --max_steps needs a value: a whole number (at least 1)",
        "command line: --learning-rat is not a setting. Did you mean --learning_rate?",
        "command line: --use_8bit is 'perhaps'. It must be true or false.",
        "--output_dir is needed",
        f"{path}, line 3: language is 'Chinse'",
        f"{path}, line 2: lora_r is 'abc'. It must be a whole number (at least 1, at most 512).",
        "command line: --target_modules is 'q_proj,vproj'. Whisper has no modules named 'vproj'",
        f"{path}, line 4: warmup_ratio is '0.1'. Gone from transformers 5. Give warmup_steps",
        "command line: --adam_beta2 is 'x'. It must be a number.",
        "train_file is needed",
        "quantization 8bit holds weights that cannot be trained",
    ]
    assert len(found) == len(expected), "\n".join(found)
    for text in expected:
        assert any(problem.startswith(text) for problem in found), (text, found)


def test_a_disagreement_says_where_each_side_came_from(tmp_path: Path) -> None:
    path = file_with(tmp_path / "run.yaml", "eval_steps: 500\n")
    (problem,) = problems_of("--config", str(path), "--max_steps", "60")
    assert problem.endswith(f"(eval_steps: {path}, line 1; --max_steps: command line)")


def test_a_disagreement_with_a_wrong_setting_is_not_made_up() -> None:
    found = problems_of("--eval_steps", "1000", "--num_train_epochs", "three")
    assert len(found) == 1
    assert "--num_train_epochs is 'three'" in found[0]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--learning_rte", "--learning_rate"),
        ("--batch_size", "--per_device_train_batch_size"),
        ("--epochs", "--num_train_epochs"),
        ("--adam_beta_2", "--adam_beta2"),
        ("--max_step", "--max_steps"),  # flags are never abbreviated
    ],
)
def test_an_unknown_flag_gets_the_nearest_name(typed: str, meant: str) -> None:
    (problem,) = problems_of(typed, "3")
    assert problem == f"command line: {typed} is not a setting. Did you mean {meant}?"


def test_an_unknown_flag_like_no_other_points_to_the_help() -> None:
    assert problems_of("--zzzz", "1", "2") == [
        "command line: '2' belongs to no setting. "
        "Settings are given as --name value; put quotes around a value with spaces.",
        "command line: --zzzz is not a setting. --help lists all settings.",
    ]


@pytest.mark.parametrize("text", ["--seed=", "--cache_dir=", "--output_dir= --seed 1", "--adam_beta2="])
def test_an_empty_value_is_an_error_not_a_default(text: str) -> None:
    (problem,) = problems_of(*text.split(" "))
    assert "is empty" in problem or "is ''" in problem


def test_yaml_words_mean_what_their_setting_says(tmp_path: Path) -> None:
    path = file_with(
        tmp_path / "run.yaml",
        "eval_strategy: no\nlanguage: no\nlearning_rate: 3e-4\nrun_name: 0123\nfp16: yes\nseed: 010\n"
        "cache_dir: ~\nsave_total_limit: none\nquantization: none\ntarget_modules: [q_proj, fc1]\n"
        "wandb_project: 'none'\nuse_wandb: True\nlr_scheduler_type: cosine_with_restarts\n"
        "lr_scheduler_kwargs: {num_cycles: 2, name: '3', ratio: 1e-2, on: true}\n",
    )
    config = train("--config", str(path))
    assert (config.eval_strategy, config.language, config.learning_rate) == ("no", "no", 3e-4)
    assert (config.run_name, config.precision, config.seed) == ("0123", "fp16", 10)
    assert (config.cache_dir, config.save_total_limit, config.quantization) == (None, None, "none")
    assert (config.target_modules, config.wandb_project) == (["q_proj", "fc1"], "none")
    assert config.extra == {"lr_scheduler_kwargs": {"num_cycles": 2, "name": "3", "ratio": 0.01, "on": True}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"seed: 1\nlora_r: 2\nseed: 3\n", "run.yaml, line 3: seed is already set in line 1"),
        (b"lora_r: 1\n\tseed: 2\n", "run.yaml, line 2, column 1: a tab"),
        (b"target_modules: [q_proj\nseed: 2\n", "run.yaml, line 2, column 5: not YAML"),
        (b"seed: 1: 2\n", "run.yaml, line 1, column 8: not YAML"),
        (b"- seed\n- 1\n", "run.yaml: holds no settings"),
        (b"seed\n", "run.yaml: holds no settings"),
        (b"seed: &x [*x]\n", "run.yaml: has an alias"),
        (b"[a, b]: 1\n", "run.yaml, line 1: a setting's name must be one word"),
        ("run_name: 共鸣\n".encode("gbk"), "run.yaml: is not UTF-8"),
        (b"seed: \x00\n", "run.yaml: is not YAML"),
        (b"seed: 1\n---\nseed: 2\n", "run.yaml, line 2, column 1: not YAML"),
        (b"seed:\n", "run.yaml, line 1: seed is empty. It must be a whole number"),
        (b"seed: [1, 2]\n", "run.yaml, line 1: seed is ['1', '2']. It must be a whole number"),
        (b"seed: {a: 1}\n", "run.yaml, line 1: seed is {'a': 1}. It must be a whole number"),
    ],
)
def test_a_broken_yaml_file_is_told_by_place(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    (problem,) = problems_of("--config", str(path))
    assert problem.startswith(f"{tmp_path}{os.sep}{message}")


def test_yaml_with_a_byte_order_mark_or_nothing_in_it_is_fine(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes("\ufeffseed: 5\r\nrun_name: 共鸣\r\n".encode())
    config = train("--config", str(tmp_path / "bom.yaml"))
    assert (config.seed, config.run_name) == (5, "共鸣")
    assert train("--config", str(file_with(tmp_path / "empty.yaml", "# nothing\n"))).seed == 42


def test_a_config_file_that_is_not_there_is_the_only_problem_told(tmp_path: Path) -> None:
    (problem,) = problems_of("--config", str(tmp_path / "none.yaml"), needed=False)
    assert "none.yaml: cannot be read" in problem
    assert problems_of("--config") == ["command line: --config needs the path of a YAML file."]


TEXTS = [
    "no",
    "none",
    "null",
    "~",
    "0123",
    "3e-4",
    "2024-01-01",
    "a: b # c",
    "中文 😀 ",
    " '\"\\ ",
    "x\ty\nz",
    "-",
    "1:30",
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_from_a_dumped_config(tmp_path: Path, text: str) -> None:
    config = TrainConfig(
        train_file=Path(text),
        output_dir=Path("out"),
        run_name=text,
        extra={"optim_args": text, "fsdp_config": {"a": text}},
    )
    dump_yaml(config, tmp_path / "config.yaml")
    loaded = load_yaml(TrainConfig, tmp_path / "config.yaml")
    assert (loaded.train_file, loaded.run_name) == (config.train_file, text)
    assert loaded.extra["fsdp_config"] == {"a": text}


OTHER_VALUES: dict[str, Any] = {
    "feature_cache_dir": None,
    "feature_cache": "none",  # agree with no change of the recordings
    "model_name_or_path": "m",
    "target_modules": ["fc1", "fc2"],
    "language": "zh",
    "lr_scheduler_type": "cosine",
    "optim": "adafactor",
    "audio_context": 20.25,
    "max_audio_len": 12.0,
    "eval_strategy": "epoch",
    "save_steps": 100,
    "load_best_model_at_end": False,
    "quantization": "4bit",
    "finetuning": "lora",  # its other values exclude quantization
    "deepspeed": "zero1",
    "fsdp": False,  # excludes deepspeed
    "nnodes": 3,
    "node_rank": 2,
    "rdzv": "10.0.0.1:29400",
    "json_file": None,  # excludes train_file
    "streaming": False,  # excludes num_train_epochs and more
    "skip_broken": False,  # needs streaming
    "num_train_epochs": 1 / 3,
    "learning_rate": 1e-05,
    "extra": {"adam_epsilon": 1e-08, "tf32": None, "lr_scheduler_kwargs": {"a": [1, 0.5, True, None, "1"]}},
}


def another_value(name: str, config: TrainConfig) -> Any:
    """A value that is not the default, made from the setting's type where the table above has none."""
    field, value = TrainConfig.model_fields[name], getattr(config, name)
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    kind, _bounds = config_help.alternatives(field)[0]
    if kind is bool:
        return not value
    if kind is int:
        return (value or 0) + 1 if name != "generation_max_length" else 7
    if kind is float:
        return (value or 0) + 0.1
    if kind in (str, Path):
        return kind(f"some {name}")
    return next(choice for choice in reversed(kind.__args__) if choice != value)


def test_every_setting_comes_back_from_a_dumped_config(tmp_path: Path) -> None:
    default = train()
    config = TrainConfig.model_validate({name: another_value(name, default) for name in TrainConfig.model_fields})
    same = [name for name in TrainConfig.model_fields if getattr(config, name) == getattr(default, name)]
    assert same == ["json_file", "feature_cache_dir", "feature_cache", "streaming", "skip_broken", "finetuning", "fsdp"]
    for one in (
        config,
        train("--streaming", "--skip_broken", "--max_steps", "7", "--train_file", "s3://bucket/shards"),
        default,
        train("--num_train_epochs", "2"),
        train("--finetuning", "full", "--validation_split", "0"),
        train("--feature_cache_dir", "features"),
    ):
        dump_yaml(one, tmp_path / "config.yaml")
        assert load_yaml(TrainConfig, tmp_path / "config.yaml") == one
        assert from_mapping(TrainConfig, one.model_dump()) == one
        plain = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))  # as other programs read it
        expected = one.model_dump(mode="json")
        assert plain == expected | expected.pop("extra")


def test_writing_a_config_leaves_the_old_one_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    dump_yaml(train(), path)
    before = path.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(RunFolderError, match="No space left"):
        dump_yaml(train("--seed", "1"), path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_a_mapping_of_texts_gives_the_same_as_flags() -> None:
    texts = {"train-file": "train.json", "output_dir": "out", "max_steps": "1024", "fp16": "true", "use_wandb": "False"}
    texts |= {"target_modules": "q_proj,k_proj", "save_total_limit": "null", "adam_beta2": "0.98", "language": "zh"}
    flags = [part for name, text in texts.items() for part in (f"--{name}", text)]
    assert from_mapping(TrainConfig, texts) == parse(TrainConfig, flags, "resonance train")
    typed = {"max_steps": 1024, "fp16": True, "use_wandb": False, "adam_beta2": 0.98, "save_total_limit": None}
    assert from_mapping(TrainConfig, texts | typed | {"target_modules": ["q_proj", "k_proj"]}) == from_mapping(
        TrainConfig, texts
    )


def test_a_mapping_with_mistakes_names_its_source() -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(
            TrainConfig, {"train_file": "a", "output_dir": "b", "lora_r": True, "lora_s": "1"}, "hyperparameters"
        )
    assert caught.value.problems == (
        "hyperparameters: lora_s is not a setting. Did you mean lora_r?",
        "hyperparameters: lora_r is 'True'. It must be a whole number (at least 1, at most 512).",
    )


@pytest.mark.parametrize("model", [TrainConfig, CurveConfig, EvaluateConfig, TranscribeConfig])
def test_help_lists_every_flag_within_80_columns(model: type[BaseModel]) -> None:
    page = help_page(model, "resonance train", width=80)
    assert max(map(len, page.splitlines())) <= 80
    for name in {*model.model_fields, *getattr(model, "aliases", {})} - {"extra"}:
        assert f"--{name}" in page
    assert all(title in page.splitlines() for title in getattr(model, "groups", {}).values())


def test_help_shows_defaults_choices_and_bounds() -> None:
    page = " ".join(help_page(TrainConfig, "resonance train", width=80).split())
    assert "--finetuning lora|full|frozen_encoder What is trained" in page
    assert "(default: 16; at least 1, at most 512)" in page
    assert "(default: q_proj,v_proj)" in page
    assert "(required)" in page
    assert "--fp16 means fp16" in page


def test_help_in_chinese_stays_within_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    def chinese(english: str) -> str:
        return "训练时使用的录音数量，越多越好。" * 6 if english.endswith(".") and " " in english else english

    monkeypatch.setattr(config_help, "_", chinese)
    lines = help_page(TrainConfig, "resonance train", width=80).splitlines()
    columns = [sum(2 if character > "\u2e7f" else 1 for character in line) for line in lines]
    assert max(columns) <= 80
    assert max(columns) > 74
    assert not any(line.strip().startswith(("，", "。")) for line in lines)


def test_asking_for_help_prints_it_and_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as caught:
            parse(TrainConfig, ["--broken", flag], "resonance train")
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith("Usage: resonance train --output_dir PATH")
