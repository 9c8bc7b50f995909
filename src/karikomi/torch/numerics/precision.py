"""In which type sums over data are kept: the widest that the device has."""

from __future__ import annotations

import torch


def wide(tensor: torch.Tensor) -> torch.dtype:
    """Return float64, or float32 on devices without it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
