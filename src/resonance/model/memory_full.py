"""Whether an error means that the device has no memory left."""

from __future__ import annotations

import torch

# What torch says where it has no type for it: on a processor (Linux, Windows), on Apple's GPUs, and where the driver or
# cuBLAS asks for memory that another program has taken.
FULL = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_memory_full(error: BaseException) -> bool:
    """Whether `error` says that the device has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in FULL)
