"""Bound the weights of a torch module in place, after ``step()``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from niwaki import conduct
from niwaki.errors import InvalidArgument, NonFinite, Refused
from niwaki.outcome import Outcome
from niwaki.rule import Quantity, Rule, Scope, State
from niwaki.select import select
from niwaki.torch.clip import representable, scale_
from niwaki.torch.measure import norm, on_host, peak, unit_norms
from niwaki.torch.tensors import named, unit_axes


@torch.no_grad()
def bound_(
    module: nn.Module,
    rule: Rule,
    state: State | None = None,
    *,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> tuple[Outcome, State]:
    """Bring the weights of a module within a bound, in place, and return ``(outcome, state)``.

    `state`: what the last call returned, ``None`` for a fresh one; plain data, in which what was
    learned of a tensor or unit goes with the tensor's name. Rules per unit act on the tensors whose
    layer declares a unit axis (Linear, Conv, Embedding, recurrent and attention weights); what is
    left alone, with the reason, is in ``outcome.left_alone``.
    `only`, `exclude`: globs over parameter names.

    Raises `NonFinite` naming the tensor when a weight is not finite: no bound can mend it.

    >>> import torch, niwaki as nw
    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
    >>> outcome, state = bound_(layer, nw.bound.Clamp(2.0), only="weight")
    >>> layer.weight.tolist(), outcome.share_at_bound
    ([[2.0, -2.0]], 1.0)
    """
    conduct.check_rule(rule, Quantity.WEIGHT, where="torch.bound_")
    if not isinstance(module, nn.Module):
        raise InvalidArgument(
            "bounds act on a module", where="torch.bound_", got=type(module).__name__
        )
    found = named(module, where="torch.bound_")
    chosen = select(found, only=only, exclude=exclude, where="torch.bound_")
    return bound_named(module, {name: found[name] for name in chosen}, rule, state)


def bound_named(
    module: nn.Module,
    found: Mapping[str, torch.Tensor],
    rule: Rule,
    state: Mapping[str, Any] | None,
) -> tuple[Outcome, State]:
    """Do what `bound_` does to these parameters of a module only."""
    axes, left_alone = targets(module, rule, found)
    numbers = _measured(rule, found, axes)
    norms = np.concatenate(list(numbers.values()))
    _check_finite(numbers)
    owners_of = [name for name, part in numbers.items() for _ in part]
    verdict, after = conduct.judge_named(rule, owners_of, norms, state, present=np.isfinite(norms))
    if verdict.limit is not None:
        owners = [found[name] for name in numbers]
        limits = map(representable, verdict.limit.tolist(), owners)
        verdict = verdict._replace(limit=np.array(list(limits), dtype=np.float64))
    at_bound, entries, start = 0, 0, 0
    for name, axis in axes.items():
        part = slice(start, start + len(numbers[name]))
        start = part.stop
        reached, counted = _apply(found[name], axis, norms[part], verdict, part)
        at_bound, entries = at_bound + reached, entries + counted
    outcome = Outcome(
        names=tuple(owners_of),
        norms=norms,
        after=conduct.norms_after(norms, verdict, xp=np),
        skipped=False,
        element_wise=rule.scope is Scope.ELEMENT,
        left_alone=left_alone,
        share_at_bound=at_bound / max(entries, 1),
    )
    return outcome, after


def targets(
    module: nn.Module, rule: Rule, found: Mapping[str, torch.Tensor]
) -> tuple[dict[str, int | None], dict[str, str]]:
    """Return ``(name -> unit axis, name -> why it is left alone)``; refuses a rule without any target."""
    floating = {name: None for name, tensor in found.items() if tensor.is_floating_point()}
    if not floating:
        raise Refused("no selected tensor is floating", where="torch.bound_")
    if rule.scope is not Scope.UNIT:
        return dict(floating), {name: "not floating" for name in found if name not in floating}
    axes, reasons = unit_axes(module)
    chosen: dict[str, int | None] = {name: axes[name] for name in found if name in axes}
    if not chosen:
        raise Refused(
            "no selected tensor has a unit axis",
            where="torch.bound_",
            got=", ".join(f"{name} ({reasons[name]})" for name in list(found)[:5]),
        )
    return chosen, {name: reasons[name] for name in found if name not in chosen}


def _measured(
    rule: Rule, found: Mapping[str, torch.Tensor], axes: Mapping[str, int | None]
) -> dict[str, np.ndarray]:
    if rule.scope is Scope.UNIT:
        units = {
            name: unit_norms(found[name], axis) for name, axis in axes.items() if axis is not None
        }
        return {name: numbers.cpu().double().numpy() for name, numbers in units.items()}
    size = peak if rule.scope is Scope.ELEMENT else norm
    numbers = on_host([size(found[name]) for name in axes])
    return {name: np.array([number]) for name, number in zip(axes, numbers, strict=True)}


def _check_finite(numbers: Mapping[str, np.ndarray]) -> None:
    for name, values in numbers.items():
        if not np.all(np.isfinite(values)):
            raise NonFinite(
                f"non-finite weights in {name}",
                where="torch.bound_",
                hint="load the last good checkpoint: no bound can mend them",
            )


def _apply(
    tensor: torch.Tensor,
    axis: int | None,
    norms: np.ndarray,
    verdict: conduct.Verdict,
    part: slice,
) -> tuple[int, int]:
    if verdict.limit is not None:
        limit = float(verdict.limit[part][0])
        if norms[0] < limit:
            return 0, tensor.numel()
        if norms[0] > limit:
            tensor.clamp_(-limit, limit)
        return int((tensor.abs() >= limit).sum()), tensor.numel()
    factors = verdict.factor[part]
    if np.any(factors != 1.0):
        if axis is None:
            scale_(tensor, float(factors[0]))
        else:
            shape = [1] * tensor.dim()
            shape[axis] = -1
            scale = torch.as_tensor(factors, device=tensor.device).reshape(shape)
            # Only units over the bound are written, so that the others keep their bits.
            tensor.copy_(torch.where(scale < 1, (tensor * scale).to(tensor.dtype), tensor))
    return int(np.count_nonzero(factors < 1.0)), len(factors)
