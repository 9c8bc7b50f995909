"""Networks in bfloat16 as float32, in which they are trained and rounded, with the types that they came in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

_ATTRIBUTE = "_karikomi_narrow"
_BYTES = 2


def widen_(module: nn.Module) -> nn.Module:
    """Cast a module with bfloat16 parameters to float32, which holds the same values, and keep their names on it.

    >>> widen_(nn.Linear(2, 1).bfloat16()).weight.dtype
    torch.float32
    """
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers()),
    }
    narrow = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    if narrow:
        module.float()
        module.__dict__[_ATTRIBUTE] = frozenset(narrow)
    return module


def given_bytes(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return name -> bytes of each array in the type that the module came in."""
    narrow: frozenset[str] = module.__dict__.get(_ATTRIBUTE, frozenset())
    return {n: array.size * _BYTES if n in narrow else array.nbytes for n, array in arrays.items()}
