"""Validated arguments of a prune call: allocation, shares by hand, target."""

from __future__ import annotations

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune import (
    Heads,
    Layers,
    NofM,
    Pattern,
    Score,
    Target,
    Unstructured,
    target_of,
)


def allocation_of(allocation: str | None, pattern: Pattern, score: Score) -> str:
    """Return the allocation, by default that of the pattern; raises `Unsupported` for one that does not fit.

    Single weights, heads and layers compare across tensors; sums over units or blocks of different sizes,
    and scores that compare within rows, do not.
    """
    kind = type(pattern).__name__
    by_tensor = allocation in ("erk", "isomorphic", "owl", "sensitivity")
    if allocation is not None and pattern.fixed_share:
        raise Unsupported(
            f"{kind} itself determines how much goes from where", where="allocation", got=allocation
        )
    if isinstance(pattern, Layers) and allocation not in (None, "global"):
        raise Unsupported(
            "a layer is one item, of which every other allocation leaves each tensor one",
            where="allocation",
            got=allocation,
            allowed="global",
        )
    if isinstance(pattern, Heads) and by_tensor:
        raise Unsupported(
            "this allocation looks at single weights, and heads span several",
            where="allocation",
            got=allocation,
            allowed="global, uniform, lamp",
        )
    if allocation is not None:
        return allocation
    within = isinstance(pattern, Unstructured) and score.within_rows
    together = isinstance(pattern, Unstructured | Layers | Heads) and not within
    return "global" if together else "uniform"


def target_for(pattern: Pattern, where: str, **given: float | None) -> Target | None:
    """Return the target, None where the pattern determines it; raises `InvalidArgument`, see also `target_of`."""
    named_targets = {unit: value for unit, value in given.items() if value is not None}
    if isinstance(pattern, NofM):
        if named_targets:
            raise InvalidArgument(
                f"{pattern} itself determines how much goes: {pattern.sparsity:.0%}",
                where=where,
                got=", ".join(f"{unit}={value!r}" for unit, value in named_targets.items()),
                allowed="no target",
            )
        return None
    if isinstance(pattern, Unstructured) and given.get("width") is not None:
        raise InvalidArgument(
            "width is a share of units",
            where=where,
            got=f"width={given['width']!r} of single weights",
            allowed=f'width={given["width"]!r} with pattern="units" if units are meant, '
            "sparsity= (what goes) or parameters= (what stays) if weights are",
        )
    return target_of(where=where, **given)
