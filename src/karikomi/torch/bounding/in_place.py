"""Bound the weights of a torch module in place, after ``step()``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.bound import spared
from karikomi.bound.entries import UNGIVEN
from karikomi.bound.standing import standing
from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.functional.unit_axes import UnitAxes, resolved_axes
from karikomi.rule import Composite, Quantity, Rule, Scope, State, order_of
from karikomi.rules import checkpoint, decide
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import alone
from karikomi.torch.bounding.heads import Logits, bound_heads, check_supplied, layers_of
from karikomi.torch.bounding.projections import NearestPoints
from karikomi.torch.bounding.sharded import MEND, ShardedWeights
from karikomi.torch.bounding.unsharded import apply_, count_at_bound, measured
from karikomi.torch.distributed.fsdp import reshard_
from karikomi.torch.internals import opaque
from karikomi.torch.modules.fan_in import fan_ins
from karikomi.torch.modules.parameters import (
    by_any_name,
    check_values,
    gains,
    keys_by_any_name,
    named,
)
from karikomi.torch.modules.parameters import unit_axes as axes_of_layers
from karikomi.torch.modules.parametrized import MASKED, computed_from, with_adapters
from karikomi.torch.numerics.orders import Axis
from karikomi.torch.numerics.scaling import representable

MEASURED = ("fan_in", "negative_part", "distance", "spectral_norm", "largest_logit")
"""The facts besides norms that are measured for rules on weights."""

VECTORS = "vectors"
WHERE = "torch.bound_"


@opaque
@torch.no_grad()
def bound_(
    module: nn.Module,
    rule: Rule,
    state: State | None = None,
    *,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    unit_axes: UnitAxes | None = None,
    logits: Logits | None = None,
) -> tuple[Outcome, State]:
    """Bring the weights of a module within a bound, in place, and return ``(outcome, state)``.

    `state`: what the last call returned, ``None`` for a fresh one; plain data, in which what was
    learned of a tensor or unit goes with the tensor's name, and with `SpectralCap` a tensor per weight.
    Rules per unit act on the tensors whose layer declares a unit axis (Linear, Conv, Embedding,
    recurrent and attention weights), and so does `SpectralCap`; `InitScaled` on those whose layer has a
    fan-in; what is left alone, with the reason, is in ``outcome.left_alone``. So are parameters that a layer
    computes its weight from (``spectral_norm``, ``weight_norm``, ``orthogonal``), and weights that an adapter is
    added to.
    `only`, `exclude`: globs over parameter names. Without `only`, rules per entry and per tensor spare the gains
    of normalisation layers (BatchNorm, LayerNorm, RMSNorm, also classes named like these); ``only="*"`` takes
    all. A `state` of a version that spared none continues to bound all. `unit_axes`: name or glob -> the axis whose
    index is one output unit, or the axes, where it is to be another than that of the layer. `logits`: for `QKClip`,
    attention's name -> largest logit per query head; without it, what `watch_logits` or `note_logits` has noted since
    last time.

    Of sharded weights (DTensor) the whole is meant: all ranks call this, decide alike, and bound what they
    have. `SpectralCap` gathers one weight at a time; `QKClip` is refused on them.

    Raises `NonFinite` naming the tensor when a weight is not finite: no bound can mend it.

    >>> import torch, karikomi as kk
    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
    >>> outcome, state = bound_(layer, kk.bound.Clamp(2.0), only="weight")
    >>> layer.weight.tolist(), outcome.share_at_bound
    ([[2.0, -2.0]], 1.0)
    """
    decide.check_rule(rule, Quantity.WEIGHT, where=WHERE, available=MEASURED)
    if not isinstance(module, nn.Module):
        raise InvalidArgument("bounds act on a module", where=WHERE, got=type(module).__name__)
    reshard_(module)
    found = named(module, where=WHERE)
    check_values(found, where=WHERE)
    spare = spared.spares(rule, only, state)
    others = left_alone_in(module, only=only, exclude=exclude, spare=spare, where=WHERE)
    chosen = {name: tensor for name, tensor in found.items() if name not in others}
    shapes = {name: tuple(tensor.shape) for name, tensor in chosen.items()}
    given = resolved_axes(keys_by_any_name(module, unit_axes), shapes, where=WHERE)
    outcome, after = bound_named(module, chosen, rule, state, logits=logits, unit_axes=given)
    outcome = replace(outcome, left_alone={**outcome.left_alone, **others})
    return outcome, spared.marked(after, spare)


def left_alone_in(
    module: nn.Module,
    *,
    only: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    spare: bool,
    where: str,
) -> dict[str, str]:
    """Return parameter -> why a bound does not affect it: not selected, or a gain that it is to spare."""
    known = gains(module) if spare else {}
    return spared.left_alone(
        named(module, where=where),
        known,
        only=by_any_name(module, only),
        exclude=by_any_name(module, exclude),
        where=where,
    )


def bound_named(
    module: nn.Module,
    found: Mapping[str, torch.Tensor],
    rule: Rule,
    state: Mapping[str, Any] | None,
    *,
    logits: Logits | None = None,
    unit_axes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Outcome, State]:
    """Bound these parameters of a module only, as `bound_` does; `unit_axes` are resolved."""
    _refuse_composite(rule)
    if "largest_logit" in rule.needs:
        return bound_heads(module, found, rule, state, logits)  # type: ignore[arg-type]
    axes, left_alone = targets(module, rule, found, unit_axes)
    small, vectors = _divided(rule, state)
    parts = ShardedWeights.of(found, rule, axes)
    here = found if parts is None else parts.here
    attempted = int(small.get("attempted", 0)) if isinstance(small, Mapping) else 0
    nearest = NearestPoints(rule, attempted)
    if parts is None:
        numbers = measured(rule, found, axes, vectors, nearest)
    else:
        numbers = parts.measured(vectors, nearest)
    norms = np.concatenate(list(numbers.values()))
    for name, values in numbers.items():
        if not np.all(np.isfinite(values)):
            raise NonFinite(f"non-finite weights in {name}", where=WHERE, hint=MEND)
    owners = [name for name, part in numbers.items() for _ in part]
    verdict, after = checkpoint.decide_named(
        rule, owners, norms, small, present=np.isfinite(norms), facts=_facts(module, rule, owners)
    )
    if verdict.limit is not None:
        limits = map(representable, verdict.limit.tolist(), [found[name] for name in numbers])
        verdict = verdict._replace(limit=np.array(list(limits), dtype=np.float64))
    left = decide.norms_after(norms, verdict, xp=np)
    held = standing(rule, left, verdict.factor, attempted=int(after["attempted"]) - 1)
    at_bound: dict[str, int] = {}
    start = 0
    for name, axis in axes.items():
        part = slice(start, start + len(numbers[name]))
        start = part.stop
        own = part if parts is None else parts.own(name, part)
        if "distance" in rule.needs:
            nearest.write_(name, here[name], axis, verdict.factor[own])
        else:
            apply_(here[name], rule, axis, numbers[name], verdict, own)
        limit = None if verdict.limit is None else verdict.limit[part]
        reached = count_at_bound(here[name], rule, numbers[name], limit)
        if reached is not None:
            at_bound[name] = reached
    if "spectral_norm" in rule.needs:
        after[VECTORS] = {name: vectors[name] for name in axes}
    outcome = Outcome(
        names=tuple(owners),
        norms=norms,
        after=left,
        skipped=False,
        element_wise=rule.scope is Scope.ELEMENT,
        left_alone=left_alone,
        share_at_bound=_share(rule, found, axes, at_bound, held, parts),
        order=order_of(rule),
    )
    return outcome, after


def targets(
    module: nn.Module,
    rule: Rule,
    found: Mapping[str, torch.Tensor],
    unit_axes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[dict[str, Axis | None], dict[str, str]]:
    """Return ``(name -> unit axis, name -> why it is left alone)``; refuses a rule without any target.

    `unit_axes`: those that take the place of the layers' own. Of attention heads, which are no axis of one tensor,
    the projections are named with ``None``.
    """
    _refuse_composite(rule)
    if not any(tensor.is_floating_point() for tensor in found.values()):
        raise Unsupported("no selected tensor is floating", where=WHERE)
    if "largest_logit" in rule.needs:
        layers, left_alone = layers_of(module, found)
        check_supplied(layers)
        return {name: None for name in found if name not in left_alone}, left_alone
    computed = _computed(module, rule, found)
    if rule.scope is Scope.UNIT or "spectral_norm" in rule.needs:
        (known, reasons), what = axes_of_layers(module), "a unit axis"
        given = {n: own[0] if len(own) == 1 else own for n, own in (unit_axes or {}).items()}
        known = {**known, **given}
    elif "fan_in" in rule.needs:
        (known, reasons), what = fan_ins(module), "a fan-in"
        known = dict.fromkeys(known)
    else:
        known = {name: None for name, tensor in found.items() if tensor.is_floating_point()}
        reasons, what = dict.fromkeys(found, "not floating"), "weights of its own"
        if hasattr(rule, "given_for"):
            rule.check_names(found)  # type: ignore[attr-defined]
            given = rule.given_for(found)  # type: ignore[attr-defined]
            reasons |= {name: UNGIVEN for name in known if name not in given}
            known = {name: None for name in known if name in given}
    reasons = {**reasons, **computed}
    axes: dict[str, Axis | None] = {n: known[n] for n in found if n in known and n not in computed}
    if not axes:
        raise Unsupported(
            f"no selected tensor has {what}",
            where=WHERE,
            got=", ".join(f"{name} ({reasons[name]})" for name in list(found)[:5]),
        )
    return axes, {name: reasons[name] for name in found if name not in axes}


def _computed(module: nn.Module, rule: Rule, found: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return parameter -> why a bound of it would be none of the weight that its layer computes."""
    every = {**with_adapters(module), **computed_from(module)}
    reasons = {name: why for name, why in every.items() if name in found}
    if rule.scope is Scope.ELEMENT:
        # Entry by entry, a masked weight is within the bound if the one without the mask is.
        return {name: why for name, why in reasons.items() if why != MASKED}
    return reasons


def restored(rule: Rule, state: Mapping[str, Any], names: Sequence[str]) -> State:
    """Return a checked state of this rule from a checkpoint, vectors included; `names`: for a state without any."""
    small, vectors = _divided(rule, state)
    own = small.get("names") if isinstance(small, Mapping) else None
    stage = alone(rule, own if own and isinstance(own, list) else names)
    plain = checkpoint.to_plain([stage], checkpoint.from_plain([stage], small))
    plain = spared.marked(plain, isinstance(state, Mapping) and spared.SPARED in state)
    return {**plain, VECTORS: vectors} if "spectral_norm" in rule.needs else plain


def _refuse_composite(rule: Rule) -> None:
    if isinstance(rule, Composite):
        raise Unsupported("bounds are applied one at a time", where=WHERE, got=type(rule).__name__)


def _divided(
    rule: Rule, state: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any] | None, dict[str, torch.Tensor]]:
    """Return the small state of `checkpoint`, and the vectors that are stored beside it."""
    state = spared.without_mark(state)
    if state is None or "spectral_norm" not in rule.needs or not isinstance(state, Mapping):
        return state, {}
    vectors = state.get(VECTORS)
    if not isinstance(vectors, Mapping) or not all(
        isinstance(vector, torch.Tensor) and vector.is_floating_point() and vector.dim() == 2
        for vector in vectors.values()
    ):
        raise InvalidArgument(
            "this state has no vectors", where=type(rule).__name__, got=sorted(map(str, state))
        )
    return {key: value for key, value in state.items() if key != VECTORS}, dict(vectors)


def _facts(module: nn.Module, rule: Rule, owners: Sequence[str]) -> dict[str, np.ndarray]:
    if "fan_in" not in rule.needs:
        return {}
    known, _ = fan_ins(module)
    return {"fan_in": np.array([known[name] for name in owners], dtype=np.float64)}


def _share(
    rule: Rule,
    found: Mapping[str, torch.Tensor],
    chosen: Iterable[str],
    at_bound: Mapping[str, int],
    held: np.ndarray,
    parts: ShardedWeights | None,
) -> float:
    """Return the share of entries, or of units and tensors, that are at the bound."""
    if rule.scope is not Scope.ELEMENT:
        return np.count_nonzero(held) / max(len(held), 1)
    reached = at_bound if parts is None else parts.totals(at_bound)
    return sum(reached.values()) / max(sum(found[name].numel() for name in chosen), 1)
