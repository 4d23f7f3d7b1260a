"""Weights, gradients and optimiser states divided among processes: DeepSpeed's ZeRO and PyTorch's FSDP, through accelerate.

What both need to know is generated from the settings of the training, so that nothing is said twice.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from resonance.config import ZERO_STAGES, TrainConfig
from resonance.errors import ConfigError, MissingExtraError
from resonance.messages import _

WRAPPED = ["WhisperEncoderLayer", "WhisperDecoderLayer"]  # what FSDP gathers and gives back as one


def sharding_arguments(config: TrainConfig, on_cpu: bool) -> dict[str, Any]:
    """The arguments of transformers that switch on what `config` asks for; none where it asks for nothing.

    Raises MissingExtraError without the package, ConfigError for a file that cannot be used or a processor that cannot.
    """
    if config.fsdp and on_cpu:  # accelerate would train on without it, and say nothing
        raise ConfigError([_("--fsdp needs GPUs; here the processor would train. Leave it out, or give --deepspeed.")])
    if config.fsdp:
        return {
            "fsdp": True,
            "fsdp_config": {"transformer_layer_cls_to_wrap": WRAPPED, "state_dict_type": "FULL_STATE_DICT"},
        }
    if config.deepspeed is None:
        return {}
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError(_('--deepspeed needs the deepspeed package: pip install "resonance-asr[deepspeed]".'))
    return {"deepspeed": deepspeed_settings(config)}


def deepspeed_settings(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration. "auto" is filled in from the training arguments by transformers.

    Source of the names: https://www.deepspeed.ai/docs/config-json/
    """
    assert config.deepspeed is not None
    if config.deepspeed not in ZERO_STAGES:
        return _from_file(Path(config.deepspeed).expanduser(), config)
    stage = ZERO_STAGES[config.deepspeed]
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "zero_optimization": zero | {"reduce_bucket_size": "auto"},
        "zero_allow_untested_optimizer": True,  # PyTorch's own, the same as without DeepSpeed
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    }


def _from_file(path: Path, config: TrainConfig) -> dict[str, Any]:
    """A configuration of the user's own, which may leave to "auto" what the training settings say."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            [
                _("--deepspeed {value} is neither {stages} nor a file that can be read: {reason}").format(
                    value=config.deepspeed, stages=", ".join(ZERO_STAGES), reason=error.strerror or error
                )
            ]
        ) from error
    except ValueError as error:
        raise ConfigError([_("--deepspeed {path} is not JSON: {reason}").format(path=path, reason=error)]) from error
    if not isinstance(found, dict):
        raise ConfigError([_("--deepspeed {path}: a JSON object is expected.").format(path=path)])
    ours = {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
    }
    problems = [
        _('--deepspeed {path}: {name} is {found}, but the training says {ours}. Give "auto" there.').format(
            path=path, name=name, found=found[name], ours=value
        )
        for name, value in ours.items()
        if found.get(name, "auto") not in ("auto", value)
    ]
    if problems:
        raise ConfigError(problems)
    return found | dict.fromkeys(ours, "auto")
