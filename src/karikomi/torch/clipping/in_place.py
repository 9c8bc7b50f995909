"""Clip the gradients of torch parameters in place, between ``backward()`` and ``step()``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.functional.unit_axes import UnitAxes
from karikomi.rule import Composite, Quantity, Rule, State
from karikomi.rules import decide
from karikomi.rules.outcome import Outcome
from karikomi.torch.clipping.given_norm import clip_by_given_norm
from karikomi.torch.clipping.host_step import AVAILABLE, Clipping
from karikomi.torch.clipping.joint_norms import Groups, Sharding
from karikomi.torch.clipping.second_moments import Moments
from karikomi.torch.internals import opaque
from karikomi.torch.modules.parameters import Parameters, check_parameters, check_values, named


@opaque
@torch.no_grad()
def clip_(
    parameters: Parameters,
    rule: Rule | Composite,
    state: State | None = None,
    *,
    nonfinite: str = "skip",
    optimizer: torch.optim.Optimizer | None = None,
    process_group: Groups | None = None,
    check_ranks: bool = False,
    total_norm: float | torch.Tensor | None = None,
    unit_axes: UnitAxes | None = None,
) -> tuple[Outcome, dict[str, Any]]:
    """Clip the ``.grad`` of parameters in place and return ``(outcome, state)``.

    `parameters`: a module (its names are reported), or an iterable of parameters or of
    ``(name, parameter)``; tied parameters count once. `state`: what the last call returned, ``None``
    for a fresh one; plain data, in which statistics are stored by tensor name. `nonfinite`:
    the policy for a step with a NaN or infinite gradient: ``skip`` (default) sets the gradients to ``None``,
    so that the optimizer changes neither parameters nor moments; ``zero`` zeroes only the bad tensors,
    ``zero_entries`` only their bad entries; ``pass`` leaves them; ``raise`` raises `NonFinite` naming them.
    `optimizer`: its second moments are used by `SPAM`, where it keeps some (Adam and variants); otherwise they are
    kept in the state. `process_group`, `check_ranks`: as for `attach`. Sharded parameters (DTensor) need neither.
    `total_norm`: the joint norm, of the order of the rule, where it was computed elsewhere
    (``torch.nn.utils.get_total_norm``, or over the stages of a pipeline); nothing is measured then, and the rule must
    be one of global scope. `unit_axes`: name or glob -> the axis whose index is one output unit, for rules per unit,
    where it is to be another than that of the layer, or where no module says it.

    Without any parameter it warns, measures 0 and returns the state as it is, as torch does. Raises
    `InvalidArgument` for tensors that can have no gradient, `Unsupported` for a rule that does not act on gradients.
    Reads the norms on the host; no tensor is multiplied that is not clipped.

    >>> import torch, karikomi as kk
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> outcome, state = clip_(model, kk.clip.ByGlobalNorm(1.0))
    >>> print(outcome)
    pre 5 -> post 1 x0.2 clipped; top: weight 100%
    """
    decide.check_rule(rule, Quantity.GRADIENT, where="torch.clip_", available=AVAILABLE)
    decide.check_policy(nonfinite, where="torch.clip_")
    parameters = parameters if isinstance(parameters, nn.Module) else _collected(parameters)
    if _is_empty(parameters):
        warnings.warn(
            "karikomi: torch.clip_ got no parameter, so nothing is clipped; was it an exhausted generator?",
            stacklevel=2,
        )
        return Outcome((), np.zeros(0), np.zeros(0), False), dict(state or {})
    found = named(parameters, where="torch.clip_")
    check_values(found, where="torch.clip_")
    check_parameters(found, where="torch.clip_")
    if total_norm is not None:
        return clip_by_given_norm(
            found, rule, total_norm, state or None, nonfinite=nonfinite, where="torch.clip_"
        )
    clipping = Clipping(
        found,
        rule,
        module=parameters if isinstance(parameters, nn.Module) else None,
        nonfinite=nonfinite,
        moments=Moments(*([] if optimizer is None else [optimizer])),
        sharding=Sharding.of(found, process_group, check_ranks=check_ranks, module=parameters),
        unit_axes=unit_axes,
        where="torch.clip_",
    )
    clipping.load(state or None)
    return clipping.step(), clipping.plain()


def _collected(parameters: Any) -> Any:
    is_tensor = isinstance(parameters, torch.Tensor)
    return list(parameters) if isinstance(parameters, Iterable) and not is_tensor else parameters


def _is_empty(parameters: Any) -> bool:
    if isinstance(parameters, nn.Module):
        return next(parameters.parameters(), None) is None
    return isinstance(parameters, list) and not parameters
