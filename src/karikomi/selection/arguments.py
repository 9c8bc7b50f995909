"""Validated arguments of a prune call: allocation, shares by hand, target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune import (
    Heads,
    Importance,
    Layers,
    NofM,
    Pattern,
    Score,
    Target,
    Unstructured,
    as_score,
    target_of,
)
from karikomi.prune.allocations.allocation import Allocation, name_of
from karikomi.prune.facts import Facts, check_mapping


def allocation_of(allocation: Allocation | None, pattern: Pattern, score: Score) -> Allocation:
    """Return the allocation, by default that of the pattern; raises `Unsupported` for one that does not fit.

    Single weights, heads and layers compare across tensors; sums over units or blocks of different sizes,
    and scores that compare within rows, do not.
    """
    kind = type(pattern).__name__
    by_tensor = allocation is not None and name_of(allocation) in (
        "erk",
        "isomorphic",
        "owl",
        "sensitivity",
    )
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


def score_and_facts(
    score: str | Score,
    importance: Mapping[str, Any] | None,
    facts: Facts | None,
    *,
    where: str,
) -> tuple[Score, Facts]:
    """Return the score and the facts, where an `importance` is a score of its own; raises `InvalidArgument` for two."""
    given, chosen = {} if facts is None else facts, as_score(score)
    if importance is None:
        if isinstance(chosen, Importance) and "importance" not in given:
            raise InvalidArgument(
                "the score is to be given",
                where=f"{where}: importance",
                allowed="importance={name: array}",
            )
        return chosen, given
    if score not in ("magnitude", "importance") and not isinstance(chosen, Importance):
        raise InvalidArgument(
            "an importance is a score itself",
            where=f"{where}: importance",
            got=f"score={score!r}"[:80],
            allowed="importance=, or score=",
        )
    check_mapping(importance, where=f"{where}: importance", allowed="name of a weight -> array")
    return Importance(), {**given, "importance": importance}


def check_by_hand(sparsity: Any, count: Any, allocation: object, *, where: str) -> None:
    """Raise `InvalidArgument` for what is given by name or glob beside an allocation, or twice."""
    given = {"sparsity": sparsity, "count": count}
    by_hand = [name for name, value in given.items() if isinstance(value, Mapping)]
    if not by_hand:
        return
    both = sparsity is not None and count is not None
    if both or allocation is not None or not given[by_hand[0]]:
        beside = f"allocation={allocation!r}" if allocation else f"no {by_hand[0]}"
        raise InvalidArgument(
            "sparsities by hand are an allocation themselves",
            where=where,
            got="both" if both else beside,
            allowed="sparsity={glob: share} or count={glob: number}, or one number and an allocation",
        )


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
