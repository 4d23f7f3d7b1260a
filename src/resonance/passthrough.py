"""Settings of `Seq2SeqTrainingArguments` that Resonance does not name itself: which exist, and what they take.

The names are read from the source of the installed transformers, because importing it takes seconds.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resonance.messages import _

TRUE_WORDS = frozenset({"true", "yes", "on", "y", "t", "1"})
FALSE_WORDS = frozenset({"false", "no", "off", "n", "f", "0"})
NONE_WORDS = frozenset({"none", "null"})


@dataclass(frozen=True)
class Argument:
    """What one training argument takes, as its annotation in transformers says."""

    kinds: frozenset[str]  # of "bool", "int", "float", "str", "list", "dict", "None"
    choices: tuple[str, ...]  # () where any text will do


@functools.cache
def arguments() -> Mapping[str, Argument]:
    """All fields of `Seq2SeqTrainingArguments` of the installed transformers, by name."""
    classes = _classes()
    found: dict[str, Argument] = {}
    for owner in ("TrainingArguments", "Seq2SeqTrainingArguments"):
        for statement in classes[owner].body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                found[statement.target.id] = _argument(statement.annotation, classes)
    return found


def typed(name: str, value: Any) -> Any:
    """`value`, as typed by somebody (text) or given by a program, as the training argument `name` takes it.

    Raises ValueError where the name is owned by Resonance, gone from transformers or unknown, or the value does not fit.
    """
    gone = removed().get(name)
    if gone is not None:
        raise ValueError(gone)
    argument = arguments().get(name)
    if argument is None:
        raise ValueError(_("transformers has no such training argument."))
    converted = _converted(argument, value)
    if name in owned():
        accepted, reason = owned()[name]
        if converted not in accepted:
            raise ValueError(reason)
    return converted


def is_known(name: str) -> bool:
    """Whether `typed` has more to say about `name` than that it is unknown."""
    return name in removed() or name in arguments()


def takes_bool(name: str) -> bool:
    """Whether the training argument `name` is true or false, so that its bare flag means true."""
    return name in arguments() and "bool" in arguments()[name].kinds


def removed() -> dict[str, str]:
    """Training arguments of older transformers, and what to give instead."""
    batch = _("Gone from transformers. Give per_device_train_batch_size or per_device_eval_batch_size.")
    automatic = _("Gone from transformers 5. The device is found by itself: leave the setting out.")
    precision = _("Gone from transformers 5. Give precision: fp32, fp16 or bf16.")
    return {
        "evaluation_strategy": _("Renamed by transformers 5. Give eval_strategy: steps, epoch or no."),
        "warmup_ratio": _("Gone from transformers 5. Give warmup_steps: below 1 it is a share of all steps."),
        "group_by_length": _("Gone from transformers 5. Clips of similar length always share a batch here."),
        "overwrite_output_dir": _(
            "Gone from transformers 5. A folder with results is never overwritten: "
            "give another output_dir, or resume to continue."
        ),
        "logging_dir": _("Gone from transformers 5. TensorBoard's files are always in the folder runs of output_dir."),
        "tokenizer": _("Gone from transformers 5. The tokenizer is taken from model_name_or_path."),
        "save_safetensors": _("Gone from transformers 5. Weights are always saved as safetensors."),
        "adafactor": _("Gone from transformers 5. Give optim: adafactor."),
        "push_to_hub_model_id": _("Gone from transformers 5. Give hub_model_id."),
        "push_to_hub_token": _("Gone from transformers 5. Give hub_token."),
        "fp16_opt_level": precision,
        "fp16_backend": precision,
        "half_precision_backend": precision,
        "no_cuda": _("Gone from transformers 5. Give use_cpu: true."),
        "use_mps_device": automatic,
        "dispatch_batches": automatic,
        "split_batches": automatic,
        "per_gpu_train_batch_size": batch,
        "per_gpu_eval_batch_size": batch,
    }


def owned() -> dict[str, tuple[tuple[Any, ...], str]]:
    """Training arguments that Resonance sets itself: the values that equal what it does, and why no other."""
    length = _("Clips of similar length always share a batch: leave the setting out.")
    loss = _("The loss is divided by the label tokens of the whole effective batch: leave the setting out.")
    text = _(
        "Only true works: error rates come from text the model generates. To skip evaluation give eval_strategy no."
    )
    save = _("Checkpoints are written with each evaluation; give save_steps for another distance in steps.")
    return {
        "remove_unused_columns": (
            (False,),
            _("Only false works: Whisper's features would be removed as unused columns."),
        ),
        "label_names": ((["labels"],), _("Whisper's labels are always named labels: leave the setting out.")),
        "predict_with_generate": ((True,), text),
        "prediction_loss_only": ((False,), text),
        "report_to": (
            ("tensorboard", ["tensorboard"]),
            _("TensorBoard's files are always written. For Weights & Biases give use_wandb."),
        ),
        "greater_is_better": ((False,), _("Only false works: error rates are better when lower.")),
        "average_tokens_across_devices": ((), loss),
        "train_sampling_strategy": ((), length),
        "length_column_name": ((), length),
        "generation_config": ((), _("Give generation_max_length and generation_num_beams instead.")),
        "auto_find_batch_size": (
            (False,),
            _("Only false works: a run that is out of memory finds smaller settings by itself."),
        ),
        "save_only_model": ((False,), _("Only false works: a run could not be resumed from such a checkpoint.")),
        "ignore_data_skip": (
            (False,),
            _("Only false works: a resumed run would see other data than one that was never stopped."),
        ),
        "save_strategy": (("steps", "epoch"), save),
        "disable_tqdm": ((True,), _("Only true works: Resonance prints its own progress line.")),
        "do_train": (
            (True,),
            _("Only true works: this command trains. To measure a model use resonance evaluate."),
        ),
        "do_eval": ((True,), _("Only true works: to switch evaluation off give eval_strategy no.")),
        "do_predict": (
            (False,),
            _("Only false works: this command trains. To turn speech into text use resonance transcribe."),
        ),
        "logging_first_step": ((True,), _("Only true works: the first step is always logged.")),
        "logging_nan_inf_filter": ((False,), _("Only false works: a loss that is not a number must be seen.")),
        "gradient_checkpointing_kwargs": (
            ({"use_reentrant": False},),
            _("Only use_reentrant false works where parts of the model are frozen: leave the setting out."),
        ),
        "activation_checkpointing": ((), _("Give gradient_checkpointing instead.")),
        "activation_checkpointing_kwargs": ((), _("Give gradient_checkpointing, without further settings, instead.")),
    }


def choices(name: str) -> tuple[str, ...]:
    """The values that the training argument `name` takes, () where any text will do."""
    return arguments()[name].choices


def _classes() -> dict[str, ast.ClassDef]:
    spec = importlib.util.find_spec("transformers")  # finds the folder, imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("transformers")
    folder = Path(spec.submodule_search_locations[0])
    return {
        node.name: node
        for file in ("trainer_utils.py", "training_args.py", "training_args_seq2seq.py")
        for node in ast.parse((folder / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }


def _argument(annotation: ast.expr, classes: Mapping[str, ast.ClassDef]) -> Argument:
    kinds: set[str] = set()
    values: list[str] = []
    for part in _parts(annotation):
        if isinstance(part, ast.Constant) and part.value is None:
            kinds.add("None")
        elif isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name):
            kinds.add(part.value.id)
        elif isinstance(part, ast.Name) and part.id in classes:  # an enumeration: NAME = "value"
            assigned = [s.value for s in classes[part.id].body if isinstance(s, ast.Assign)]
            values += [v.value for v in assigned if isinstance(v, ast.Constant) and isinstance(v.value, str)]
            kinds.add("str")
        elif isinstance(part, ast.Name):
            kinds.add(part.id)
    return Argument(frozenset(kinds & {"bool", "int", "float", "str", "list", "dict", "None"}), tuple(values))


def _parts(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        return _parts(annotation.left) + _parts(annotation.right)
    return [annotation]


def _converted(argument: Argument, value: Any) -> Any:
    for kind, convert in _CONVERSIONS.items():
        if kind.rstrip("1") in argument.kinds:
            try:
                found = convert(value)
            except (ValueError, TypeError):
                continue
            if kind != "str" or not argument.choices or found in argument.choices:
                return found
    raise ValueError(_("It must be {expected}.").format(expected=_expected(argument)))


def _none(value: Any) -> None:
    if value is not None and str(value).lower() not in NONE_WORDS:
        raise ValueError(value)


def _bool(value: Any) -> bool:
    word = str(value).lower()
    if word not in TRUE_WORDS | FALSE_WORDS:
        raise ValueError(value)
    return word in TRUE_WORDS


def _int(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    return int(value)


def _float(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _dict(value: Any) -> dict[str, Any]:
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise ValueError(value)
    return found


def _list(value: Any) -> list[Any]:
    if isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",")]
    if isinstance(value, (list, tuple)):
        return list(value)
    raise ValueError(value)


def _str(value: Any) -> str:
    if not isinstance(value, str) or not value or value.startswith("{"):
        raise ValueError(value)
    return value


def _one_item_list(value: Any) -> list[Any]:
    return [_str(value)]


# From the narrowest to the widest. A single word is text where text is taken ("all-linear"), else a list of one.
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "None": _none,
    "bool": _bool,
    "int": _int,
    "float": _float,
    "dict": _dict,
    "list": _list,
    "str": _str,
    "list1": _one_item_list,
}


def _expected(argument: Argument) -> str:
    names = {
        "bool": _("true or false"),
        "int": _("a whole number"),
        "float": _("a number"),
        "list": _("a list separated by commas"),
        "dict": _('a mapping such as {"name": value}'),
        "str": _("one of {choices}").format(choices=", ".join(argument.choices)) if argument.choices else _("text"),
        "None": _("none"),
    }
    return _(" or ").join(text for kind, text in names.items() if kind in argument.kinds)
