"""Second moments of gradients, for rules relative to them: the optimizer's, or kept here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from karikomi.errors import InvalidArgument
from karikomi.torch.distributed.dtensors import local

_DECAY = 0.999  # Adam's default


class Moments:
    """The running mean of squared gradients per parameter: the optimizer's own, or one kept here.

    ``v = decay * v + (1 - decay) * g^2`` without bias correction, as Adam's ``exp_avg_sq``.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers
        self._own: dict[str, torch.Tensor] = {}

    def of(self, name: str, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the second moments of a parameter's local part; ``None`` before its first step."""
        for optimizer in self._optimizers:
            kept = optimizer.state.get(parameter, {}).get("exp_avg_sq")
            if kept is not None:
                return local(kept)
        return self._own.get(name)

    def follow(
        self,
        parameters: Mapping[str, torch.Tensor],
        *,
        skip: torch.Tensor | None = None,
        scale: torch.Tensor | float | None = None,
    ) -> None:
        """Update the moments with clipped gradients, `scale` being that of an AMP scaler, unless `skip` is true."""
        for name, parameter in parameters.items():
            if parameter.grad is None or self._kept_elsewhere(parameter):
                continue
            gradient = local(parameter.grad)
            gradient = gradient.to_dense() if gradient.layout is not torch.strided else gradient
            own = self._own.setdefault(name, torch.zeros_like(gradient, dtype=torch.float32))
            wide = gradient.to(own.dtype)
            wide = wide if scale is None else wide / scale
            after = (own * _DECAY).addcmul_(wide, wide, value=1.0 - _DECAY)
            own.copy_(after if skip is None else torch.where(skip, own, after))

    def kept(self) -> dict[str, torch.Tensor]:
        """Return the moments that are in no optimizer, for a checkpoint."""
        return {name: moments.clone() for name, moments in self._own.items()}

    def load(self, kept: Mapping[str, Any] | None, parameters: Mapping[str, torch.Tensor]) -> None:
        """Restore the moments that `kept` returned."""
        own = {}
        for name, moments in (kept or {}).items():
            if name not in parameters:
                continue
            fits = isinstance(moments, torch.Tensor)
            if not fits or moments.shape != local(parameters[name]).shape:
                raise InvalidArgument("these second moments do not fit", where=name)
            own[name] = moments.to(local(parameters[name]).device, copy=True)
        self._own = own

    def _kept_elsewhere(self, parameter: torch.Tensor) -> bool:
        adam = (torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam, torch.optim.NAdam)
        return any(
            isinstance(optimizer, adam) or "exp_avg_sq" in optimizer.state.get(parameter, {})
            for optimizer in self._optimizers
        )


def relative(gradient: torch.Tensor, moments: torch.Tensor | None) -> torch.Tensor:
    """Return ``g / sqrt(v)``: 0 where there is no history, NaN where g is not finite and has none."""
    dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
    if moments is None:
        return dense * 0.0
    root = moments.to(torch.promote_types(dense.dtype, torch.float32)).sqrt()
    most = torch.finfo(root.dtype).max
    # A finite gradient stays finite, however small its history.
    quotient = (dense / root).clamp_(-most, most)
    return torch.where((root > 0) & torch.isfinite(dense), quotient, dense * 0.0)
