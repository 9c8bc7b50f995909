"""The gradient of a penalty, added to those of a step before they are masked and clipped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.prune.penalties.penalty import Penalty, check_penalty
from karikomi.torch.sparse_training.penalties import slopes

WHERE = "torch.attach(penalty)"


def check_attachable(rule: object) -> None:
    """Raise an error for what is no penalty, and for one on masked weights: a step holds those at zero."""
    if isinstance(rule, Penalty) and rule.of_marked:
        raise Unsupported(
            f"{type(rule).__name__} needs masks of weights that are not zero yet",
            where=WHERE,
            hint="add it to the loss: kk.torch.penalty(model, rule, step=step, masks=masks)",
        )
    check_penalty(rule, None, where=WHERE)


def check_effective(model: nn.Module, rule: Penalty, held: Mapping[str, torch.Tensor]) -> None:
    """Raise `Unsupported` where nothing that is held is penalised."""
    if not _gradients(model, rule, held, step=0):
        raise Unsupported(
            "the optimizer holds nothing that is penalised",
            where=WHERE,
            got=", ".join(list(held)[:3]) or "no parameter that requires a gradient",
        )


def add_gradients_(
    model: nn.Module,
    rule: Penalty,
    held: Mapping[str, torch.Tensor],
    *,
    step: int,
    scale: torch.Tensor | None,
) -> None:
    """Add the gradient of a penalty to ``.grad`` of the parameters that are held, as a term of the loss would.

    `step`: counted from 0. `scale`: the scale of an AMP scaler that the gradients contain.
    """
    for name, gradient in _gradients(model, rule, held, step=step).items():
        parameter = held[name]
        gradient = gradient if scale is None else gradient * scale
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _gradients(
    model: nn.Module, rule: Penalty, held: Mapping[str, torch.Tensor], *, step: int
) -> dict[str, torch.Tensor]:
    if not held:
        return {}
    found = slopes(model, rule, step=step)
    return {name: found[id(weight)] for name, weight in held.items() if id(weight) in found}
