"""Required facts and the exact total of allocations of unequal shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from karikomi.errors import InvalidArgument
from karikomi.prune.allocations.allocation import Tensor

Shares = dict[str, float]

HALVINGS = 100


def known(tensors: Mapping[str, Tensor], fact: str, *, where: str, hint: str) -> dict[str, Any]:
    """Return one fact of each tensor; raise `InvalidArgument` where it is missing, with the hint."""
    found = {name: getattr(tensor, fact) for name, tensor in tensors.items()}
    missing = [name for name, value in found.items() if value is None or value == ()]
    if missing:
        raise InvalidArgument(
            f"the allocation {where!r} needs to know the {fact} of every tensor",
            where=missing[0],
            hint=f"{fact}: {hint}",
        )
    return found


def balanced(
    shares_at: Callable[[float], Shares],
    tensors: Mapping[str, Tensor],
    sparsity: float,
    *,
    low: float,
    high: float,
) -> Shares:
    """Return the member of a rising family of shares at which `sparsity` of all items go.

    `shares_at`: a number from `low` (where too little goes) to `high` (where enough does) -> tensor
    name -> share; no share falls as the number rises. Where shares jump, all make the same part of
    their jump.

    >>> pair = {"a": Tensor(items=1), "b": Tensor(items=3)}
    >>> family = lambda x: {"a": x, "b": x / 2}
    >>> found = balanced(family, pair, 0.5, low=0.0, high=2.0)
    >>> round(found["a"], 6), round(found["b"], 6)
    (0.8, 0.4)
    """
    target = sparsity * sum(tensor.items for tensor in tensors.values())

    def gone(shares: Shares) -> float:
        return sum(shares[name] * tensor.items for name, tensor in tensors.items())

    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if gone(shares_at(middle)) < target:
            low = middle
        else:
            high = middle
    less, more = shares_at(low), shares_at(high)
    span = gone(more) - gone(less)
    part = min(max((target - gone(less)) / span, 0.0), 1.0) if span > 0.0 else 0.0
    return {name: less[name] + part * (more[name] - less[name]) for name in tensors}
