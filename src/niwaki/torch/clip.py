"""Clip the gradients of torch parameters in place, between ``backward()`` and ``step()``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from niwaki import conduct
from niwaki.errors import NonFinite, Refused
from niwaki.outcome import Outcome
from niwaki.rule import Quantity, Rule, Scope, State
from niwaki.torch.measure import norm, on_host, peak
from niwaki.torch.tensors import Parameters, check_parameters, named


@torch.no_grad()
def clip_(
    parameters: Parameters,
    rule: Rule,
    state: State | None = None,
    *,
    nonfinite: str = "skip",
) -> tuple[Outcome, State]:
    """Clip the ``.grad`` of parameters in place and return ``(outcome, state)``.

    `parameters`: a module (its names are reported), or an iterable of parameters or of
    ``(name, parameter)``; tied parameters count once. `state`: what the last call returned, ``None``
    for a fresh one; plain data, in which what was learned of a tensor goes with its name. `nonfinite`:
    what a step with a NaN or infinite gradient does: ``skip`` (default) sets the gradients to ``None``,
    so that the optimizer leaves parameters and moments alone; ``zero`` zeroes only the bad tensors;
    ``pass`` leaves them; ``raise`` raises `NonFinite` naming them.

    Raises `InvalidArgument` when nothing is there to clip, `Refused` for a rule that does not act on
    gradients. Reads the norms on the host; no tensor is multiplied that is not clipped.

    >>> import torch, niwaki as nw
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> outcome, state = clip_(model, nw.clip.ByGlobalNorm(1.0))
    >>> print(outcome)
    pre 5 -> post 1 x0.2 clipped; top: weight 100%
    """
    conduct.check_rule(rule, Quantity.GRADIENT, where="torch.clip_")
    conduct.check_policy(nonfinite, where="torch.clip_")
    found = named(parameters, where="torch.clip_")
    check_parameters(found, where="torch.clip_")
    names, norms, present = measure_gradients(found, rule, where="torch.clip_")
    verdict, state = judge_gradients(found, norms, rule, state, present, nonfinite)
    if nonfinite == "raise" and verdict.bad.any():
        culprits = [name for name, bad in zip(names, verdict.bad, strict=True) if bad]
        raise NonFinite(
            f"non-finite gradient in {', '.join(culprits[:5])}",
            where="torch.clip_",
            hint="nothing was changed",
        )
    skip = bool(verdict.skip)
    apply_gradients(found, norms, verdict, skip=skip)
    return describe(rule, names, norms, verdict, skip=skip, nonfinite=nonfinite), state


def measure_gradients(
    found: dict[str, torch.Tensor], rule: Rule, *, where: str
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Return ``(names, norms, present)``, one number per parameter, on the host."""
    if rule.scope is Scope.ELEMENT:
        _refuse_complex(found, where=where)
    size = peak if rule.scope is Scope.ELEMENT else norm
    gradients = [parameter.grad for parameter in found.values()]
    present = np.array([gradient is not None for gradient in gradients])
    norms = np.zeros(len(gradients))
    norms[present] = on_host([size(gradient) for gradient in gradients if gradient is not None])
    return tuple(found), norms, present


def judge_gradients(
    found: dict[str, torch.Tensor],
    norms: np.ndarray,
    rule: Rule,
    state: Mapping[str, Any] | None,
    present: np.ndarray,
    nonfinite: str,
) -> tuple[conduct.Verdict, State]:
    """Return the verdict, with limits as the gradients round them, and the plain state after it."""
    verdict, after = conduct.judge_named(
        rule, list(found), norms, state, present=present, nonfinite=nonfinite
    )
    if verdict.limit is not None:
        gradients = [parameter.grad for parameter in found.values()]
        limits = [
            limit if gradient is None else representable(limit, gradient)
            for limit, gradient in zip(verdict.limit.tolist(), gradients, strict=True)
        ]
        verdict = verdict._replace(limit=np.array(limits, dtype=np.float64))
    return verdict, after


def apply_gradients(
    found: dict[str, torch.Tensor], norms: np.ndarray, verdict: conduct.Verdict, *, skip: bool
) -> None:
    """Scale, clamp, zero or drop gradients as the verdict says; touches nothing that stays as it is."""
    for index, parameter in enumerate(found.values()):
        if parameter.grad is None:
            continue
        if skip:
            parameter.grad = None
        elif verdict.factor[index] != 1.0:
            _scale_(parameter, float(verdict.factor[index]))
        elif verdict.bad[index]:
            continue
        elif verdict.limit is not None and norms[index] > verdict.limit[index]:
            _clamp_(parameter, float(verdict.limit[index]))


def describe(
    rule: Rule,
    names: tuple[str, ...],
    norms: np.ndarray,
    verdict: conduct.Verdict,
    *,
    skip: bool,
    nonfinite: str,
) -> Outcome:
    """Return the outcome of a verdict that was applied."""
    return Outcome(
        names=names,
        norms=norms,
        after=conduct.norms_after(norms, verdict, xp=np),
        skipped=skip,
        element_wise=rule.scope is Scope.ELEMENT,
        nonfinite_policy=nonfinite,
    )


def representable(limit: float, tensor: torch.Tensor) -> float:
    """Return a limit as the tensor's dtype rounds it: what stands there is not above it."""
    return float(torch.tensor(limit, dtype=torch.float64).to(tensor.dtype))


def scale_(tensor: torch.Tensor, factor: float) -> None:
    """Multiply in place by a factor in [0, 1]; zero writes zeros even over NaN."""
    if factor == 0.0:
        tensor.zero_()
    elif factor < 1e-30:
        # A float32 kernel would flush such a factor; its root twice keeps the digits.
        root = math.sqrt(factor)
        tensor.mul_(root).mul_(root)
    else:
        tensor.mul_(factor)


def _scale_(parameter: torch.Tensor, factor: float) -> None:
    gradient = _coalesced(parameter)
    scale_(gradient._values() if gradient.is_sparse else gradient, factor)


def _clamp_(parameter: torch.Tensor, limit: float) -> None:
    gradient = _coalesced(parameter)
    (gradient._values() if gradient.is_sparse else gradient).clamp_(-limit, limit)


def _refuse_complex(found: dict[str, torch.Tensor], *, where: str) -> None:
    for name, parameter in found.items():
        if parameter.grad is not None and parameter.grad.is_complex():
            raise Refused(
                "complex entries have no order to clamp by",
                where=f"{where}: {name}",
                hint="use a rule by norm",
            )


def _coalesced(parameter: torch.Tensor) -> torch.Tensor:
    # A row that occurs twice in a sparse gradient is clipped by its sum, which is what the step applies.
    gradient = parameter.grad
    assert gradient is not None  # noqa: S101  (apply_gradients has looked)
    if gradient.is_sparse and not gradient.is_coalesced():
        parameter.grad = gradient = gradient.coalesce()
    return gradient
