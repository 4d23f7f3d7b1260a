"""Number formats by device."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def training_precision(wanted: Literal["auto", "fp32", "fp16", "bf16"], device: torch.device) -> Precision:
    """bf16 on NVIDIA GPUs from Ampere on, fp16 on older ones, fp32 elsewhere, unless asked for another.

    fp16 on a CPU has no kernels worth using; it falls back to fp32 there, so that one configuration runs everywhere.
    """
    if wanted == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if wanted == "fp16" and device.type != "cuda":
        return "fp32"
    return wanted


def inference_dtype(device: torch.device) -> torch.dtype:
    """float16 on a CUDA GPU, float32 elsewhere."""
    return torch.float16 if device.type == "cuda" else torch.float32
