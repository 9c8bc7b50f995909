"""Allocation by measured sensitivity: every tensor is pruned until it costs the same accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.prune.allocations.allocation import Pool, Tensor, by_quota, check_sparsity
from karikomi.prune.allocations.shares import Shares, balanced, known
from karikomi.registry import register

Curve = tuple[np.ndarray, np.ndarray]  # losses, and the sparsities at which they are reached


@register(
    "allocation",
    name="sensitivity",
    formula="per tensor the largest sparsity whose measured loss of accuracy is within d; d from the total",
    source="Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.2",
)
def equal_loss(tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
    """Return one pool per tensor, all at the same measured loss of accuracy.

    ``sparsity_i`` is the largest at which pruning tensor i alone loses at most d; d is such that
    ``round(sparsity * items)`` go in all, and at least one item stays per tensor. `Tensor.curve`:
    sparsity in [0, 1] -> accuracy lost when this tensor alone is pruned that far, in any unit that
    all share. Between measured points a curve is straight, and it never falls: a gain counts as no
    loss. From its last point each goes straight to the largest loss measured anywhere, at
    sparsity 1.

    Raises `InvalidArgument` for a sparsity outside of [0, 1) or out of reach, for a missing curve, or
    one that is not made of finite losses.

    >>> tough = Tensor(items=100, curve={0.5: 0.0, 0.9: 0.1})
    >>> tender = Tensor(items=100, curve={0.5: 0.1})
    >>> equal_loss({"tough": tough, "tender": tender}, 0.5)
    [Pool(names=('tough',), remove=72), Pool(names=('tender',), remove=28)]

    Source: the per-layer sensitivity of Li et al. 2017, "Pruning Filters for Efficient ConvNets", and
    Han et al. 2015, who set the amounts by hand; equal losses and the exact total are ours.
    """
    check_sparsity(sparsity)
    hint = "measured losses of accuracy by sparsity, such as {0.5: 0.01, 0.9: 0.2}"
    given = known(tensors, "curve", where="sensitivity", hint=hint)
    for name, curve in given.items():
        _check(name, curve)
    worst = max((loss for curve in given.values() for loss in curve.values()), default=0.0)
    curves = {name: _rising(curve, max(worst, 0.0)) for name, curve in given.items()}

    def shares_at(loss: float) -> Shares:
        return {name: float(np.interp(loss, *curve)) for name, curve in curves.items()}

    # Below zero nothing goes, so that what costs nothing is shared out too when it is not all needed.
    shares = balanced(shares_at, tensors, sparsity, low=-1.0, high=max(worst, 0.0))
    return by_quota(tensors, shares, sparsity, where="sensitivity")


def _rising(curve: Mapping[float, float], worst: float) -> Curve:
    """Return losses that never fall, from (0, 0) to (worst, 1), and their sparsities."""
    sparsities = np.array([0.0, *sorted(curve), 1.0])
    losses = np.array([0.0, *(curve[share] for share in sorted(curve)), worst])
    return np.maximum.accumulate(losses), sparsities


def _check(name: str, curve: Mapping[float, float]) -> None:
    wrong = [
        (share, loss)
        for share, loss in curve.items()
        if not (0.0 <= share <= 1.0 and math.isfinite(loss))
    ]
    if wrong or not curve:
        raise InvalidArgument(
            "a curve maps sparsities to the measured loss of accuracy",
            where=f"sensitivity: {name}",
            got=wrong[0] if wrong else "no point",
            allowed="sparsities in [0, 1], finite losses",
        )
