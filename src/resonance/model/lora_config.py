"""PEFT's `adapter_config.json`, as far as plain LoRA goes; every other kind of adapter is refused by its name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resonance.errors import AdapterError
from resonance.messages import _

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 512  # as for --lora_r

_MAX_BYTES = 1 << 20
_MOST_NAMES = 1000  # large-v3 has 512 linear layers that can be updated
_LONGEST_NAME = 48  # characters; model.decoder.layers.31.encoder_attn.out_proj has 44
# In which expressions may match a name, all of them together; 100,000 take up to 3 ms, and nothing else in the process moves.
_MOST_WAYS = 100_000
# What is read below, what shapes training only, and what says nothing about weights. Anything else that is set changes what
# the matrices mean: DoRA, aLoRA, QALoRA, and whatever comes next.
_UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # PEFT takes it as false for torch's linear layers
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
_BASE_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal")  # beginnings that leave the base's weights alone

Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Which layers an adapter updates, with which rank and scaling; PEFT's rules."""

    r: int
    alpha: float
    rslora: bool
    ranks: Patterns
    alphas: Patterns
    targets: re.Pattern[str]
    excluded: re.Pattern[str] | None

    def updates(self, layer: str) -> bool:
        """Whether the adapter is said to have matrices for `layer`."""
        return bool(self.targets.fullmatch(layer)) and not (self.excluded and self.excluded.fullmatch(layer))

    def rank(self, layer: str) -> int:
        return int(_first(self.ranks, layer, self.r))

    def scaling(self, layer: str) -> float:
        rank = self.rank(layer)
        return _first(self.alphas, layer, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def read_settings(folder: Path) -> LoraSettings:
    """What `adapter_config.json` says. Raises AdapterError where it is damaged or asks for more than plain LoRA."""
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
        _check_kind(folder, config)
        return _settings(config)
    except OSError as error:
        raise AdapterError(
            _("{path}: cannot be read ({reason}).").format(path=path, reason=error.strerror or error)
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, re.error) as error:
        raise AdapterError(
            _("{path} is damaged: {reason}. Copy the adapter again.").format(path=path, reason=str(error)[:200])
        ) from None


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise AdapterError(
            _("The adapter {folder} is of the kind {found}; only LoRA can be used. Train it with Resonance.").format(
                folder=folder, found=str(config["peft_type"])[:40]
            )
        )
    others = [
        name
        for name in sorted(config)
        if (name not in _UNDERSTOOD and config[name])
        or (name == "bias" and config[name] != "none")
        or (name == "init_lora_weights" and config[name] not in _BASE_UNCHANGED)
    ]
    if others:
        raise AdapterError(
            _(
                "The adapter {folder} was trained with {names}, which changes more than the matrices that are exchanged from "
                "person to person. Train it without."
            ).format(folder=folder, names=", ".join(f"{name}={config[name]!r:.40}" for name in others[:5]))
        )


def _settings(config: dict[str, Any]) -> LoraSettings:
    _check_expressions(config)
    ranks, alphas = _patterns(config.get("rank_pattern")), _patterns(config.get("alpha_pattern"))
    r, alpha = config["r"], config["lora_alpha"]
    for rank in (r, *(value for _key, value in ranks)):
        if type(rank) is not int or not 0 < rank <= MAX_RANK:
            raise ValueError(f"r={rank!r:.40}, 1 … {MAX_RANK}")
    for value in (alpha, *(value for _key, value in alphas)):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"lora_alpha={value!r:.40}")
    excluded = config.get("exclude_modules")
    return LoraSettings(
        r,
        alpha,
        bool(config.get("use_rslora")),
        ranks,
        alphas,
        _layers(config["target_modules"]),
        _layers(excluded) if excluded else None,
    )


def _layers(names: str | Sequence[str]) -> re.Pattern[str]:
    """Ends of names of layers, or one expression over whole names (`BaseTuner.check_target_module_exists`)."""
    if isinstance(names, str):
        return re.compile(names)
    if len(names) > _MOST_NAMES:
        raise ValueError("too many names of layers")
    return re.compile(rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in names)})")


def _patterns(found: dict[str, Any] | None) -> Patterns:
    """The first whose expression matches the end of a name counts (`peft.utils.other.get_pattern_key`)."""
    return tuple((re.compile(rf"(.*\.)?({key})$"), value) for key, value in (found or {}).items())


def _check_expressions(config: dict[str, Any]) -> None:
    """Raise ValueError where names of layers could not be matched at once, whoever wrote the expressions."""
    ways = 0
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            ways += _ways(config[name])
    for name in ("rank_pattern", "alpha_pattern"):
        keys = config.get(name) or {}
        if len(keys) > _MOST_NAMES:
            raise ValueError("too many patterns")
        ways += sum(8 * _ways(f"({key})") for key in keys)  # a name has at most 7 parts before the one that is matched
    if ways > _MOST_WAYS:
        raise ValueError("expressions too involved; give the names of the layers")


def _ways(text: str) -> int:
    """In how many ways, at most, an expression may match one name, all of which are tried where it does not."""
    plain = text.replace("(?:", "(")
    # A repeated group has exponentially many; flags, references and the like are not counted below.
    if len(text) > 1000 or re.search(r"\)[*+{]|\(\?|\\[1-9]", plain):
        raise ValueError(f"expression too involved: {text[:80]}; give the names of the layers")
    repetitions = len(re.findall(r"[*+{]", plain))
    choices = math.prod(part.count("|") + 1 for part in re.split(r"[()]", plain))
    return math.comb(_LONGEST_NAME + repetitions, repetitions) * int(2 ** plain.count("?")) * choices


def _first(patterns: Patterns, layer: str, otherwise: float) -> float:
    return next((value for expression, value in patterns if expression.match(layer)), otherwise)
