"""The devices that torch finds here."""

from __future__ import annotations

import torch


def cuda_failure(index: int) -> str | None:
    """Return why torch cannot use CUDA device number `index`, or None if it can."""
    built = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{built} is a build without CUDA"
    if not torch.cuda.is_available():
        return f"{built} finds no CUDA device"
    if index >= torch.cuda.device_count():
        return f"{built} finds {torch.cuda.device_count()} CUDA devices, numbered from 0"
    return None


def cuda_memory(index: int) -> tuple[str, int, int]:
    """Return the name of a CUDA device, and the free and total bytes of its memory."""
    free, total = torch.cuda.mem_get_info(index)
    return torch.cuda.get_device_name(index), free, total
