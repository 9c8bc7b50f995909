"""Fold a factor into the step of a fused optimizer, through its `grad_scale` and `found_inf`.

Fused Adam, AdamW, SGD and Adagrad divide gradients by `grad_scale` while they read them, as used by
AMP scalers; a factor folded there needs no separate pass over the gradients.
"""

from __future__ import annotations

from typing import Any

import torch

from karikomi.torch.distributed.dtensors import is_sharded
from karikomi.torch.internals import takes_grad_scale

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
_LARGEST = 1e30  # scale / factor has to stay well inside float32


class Fold:
    """The two attributes of an optimizer during a step, and their previous values."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._possible = foldable(optimizer)
        self._before: dict[str, Any] | None = None
        self._ours: dict[str, Any] = {}

    def take(self, factor: float, scale: float = 1.0) -> bool:
        """Fold `factor / scale` (of an AMP scaler) into the coming step; return false where that is not possible."""
        fits = 0.0 < factor < 1.0 and scale / factor < _LARGEST
        if not (fits and self._possible and fused(self._optimizer)):
            return False
        device = self._optimizer.param_groups[0]["params"][0].device
        inverse = torch.full((), 1.0 / factor, device=device)
        known = getattr(self._optimizer, "grad_scale", None)
        self.set(inverse if known is None else known * inverse, None)
        return True

    def set(self, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
        """Set the attributes, keeping their previous values for `restore`."""
        own = self._optimizer.__dict__
        if self._before is None:
            self._before = {key: own[key] for key in ("grad_scale", "found_inf") if key in own}
        given = {"grad_scale": grad_scale, "found_inf": found_inf}
        self._ours |= {key: value for key, value in given.items() if value is not None}
        own.update(self._ours)

    def restore(self) -> None:
        """Restore the previous values; safe to call at any time."""
        if self._before is None:
            return
        own = self._optimizer.__dict__
        # After a failed step they may have been set again elsewhere.
        for key in [key for key, value in self._ours.items() if own.get(key) is value]:
            del own[key]
            if key in self._before:
                own[key] = self._before[key]
        self._before, self._ours = None, {}


def foldable(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step of this optimizer takes `grad_scale`: fused, torch's own, one device."""
    if type(optimizer) not in _FUSED or not fused(optimizer) or not takes_grad_scale(optimizer):
        return False
    tensors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Of a sharded parameter the factor would have to be a tensor on the same mesh.
    return len({tensor.device for tensor in tensors}) == 1 and not any(map(is_sharded, tensors))


def fused(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer is fused now: loading a state may change that."""
    return all(group.get("fused") for group in optimizer.param_groups)
