"""Clip gradients by a joint norm that was computed elsewhere, as by pipeline stages or expert groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.rule import Composite, Rule, Scope, State, order_of
from karikomi.rules import checkpoint, decide
from karikomi.rules.outcome import Outcome
from karikomi.torch.numerics.scaling import scale_all_

NAME = "(given norm)"
"""The name of the number in the outcome."""


def clip_by_given_norm(
    found: Mapping[str, torch.Tensor],
    rule: Rule | Composite,
    total_norm: float | torch.Tensor,
    state: State | None,
    *,
    nonfinite: str,
    where: str,
) -> tuple[Outcome, dict[str, Any]]:
    """Scale the gradients of parameters by the factor that a rule decides from this norm; see `clip_`."""
    if isinstance(rule, Composite) or rule.scope is not Scope.GLOBAL or rule.needs:
        raise Unsupported(
            f"{type(rule).__name__} is not decided from one joint norm alone",
            where=f"{where}(total_norm)",
            hint="a rule of global scope is, such as ByGlobalNorm",
        )
    norms = np.array([_number(total_norm, where=where)])
    verdict, after = checkpoint.decide_named(
        rule, [NAME], norms, state, present=np.array([True]), nonfinite=nonfinite
    )
    if nonfinite == "raise" and verdict.bad.any():
        raise NonFinite("the given norm is not finite", where=where, hint="nothing was changed")
    skip, factor = bool(verdict.skip), float(verdict.factor[0])
    if skip:
        for parameter in found.values():
            parameter.grad = None
    elif factor != 1.0:
        _scale_(found, factor)
    left = decide.norms_after(norms, verdict, xp=np)
    outcome = Outcome((NAME,), norms, left, skip, nonfinite_policy=nonfinite, order=order_of(rule))
    return outcome, after


def _scale_(found: Mapping[str, torch.Tensor], factor: float) -> None:
    holders = [parameter for parameter in found.values() if parameter.grad is not None]
    gradients: Any = [parameter.grad for parameter in holders]
    if gradients:
        for parameter, gradient in zip(holders, scale_all_(gradients, factor), strict=True):
            parameter.grad = gradient


def _number(total_norm: Any, *, where: str) -> float:
    try:
        number = float(total_norm)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgument(
            "the total norm is one number", where=where, got=repr(total_norm)[:80]
        ) from error
    if number < 0.0:
        raise InvalidArgument("a norm is not negative", where=f"{where}(total_norm)", got=number)
    return number
