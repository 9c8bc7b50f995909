"""Box: every weight stays between two ends of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi.bound.entries import Given, as_given, by_name, check_names, has_names, is_number
from karikomi.bound.nearest_point import NearestPoint
from karikomi.errors import InvalidArgument
from karikomi.registry import register
from karikomi.rule import (
    Scope,
)


@register(
    "bound",
    formula="w = min(max(w, low), high), entry by entry",
    source="projected gradient descent on a box; Bertsekas 1976",
)
@dataclass(frozen=True, slots=True)
class Box(NearestPoint):
    """Keep every weight between a lower and an upper end, which may be different for each entry.

    ``w = min(max(w, low), high)``, after every step: the nearest point of the box.

    `low`, `high`: a number, an array that goes with every selected tensor (of its shape, or one that broadcasts to
    it), or a mapping from names or globs to these; ``None`` for no end. A tensor that neither names is left alone,
    with the reason. Raises `InvalidArgument` for other values, without any end and where `low` is above `high`;
    `UnknownName` for a glob that matches no tensor. Constants: an end is no schedule. Stateless and idempotent. The
    numbers of its outcome are how far each tensor was from the box, in L2 norm.

    >>> import numpy as np, karikomi as kk
    >>> weights = {"w": np.array([-3.0, 0.5, 9.0]), "b": np.array([7.0])}
    >>> bounded, outcome, _ = kk.numpy.bound(weights, Box(0.0, {"w": np.array([1.0, 1.0, 2.0])}))
    >>> bounded["w"].tolist(), bounded["b"].tolist(), outcome.pre > 0.0
    ([0.0, 0.5, 2.0], [7.0], True)

    Source: the projection onto a box, as ``optax.projections.projection_box`` and ``torch.clamp`` with two ends.
    """

    low: Given = None
    high: Given = None

    scope = Scope.TENSOR
    nearest = "box"

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, as_given(getattr(self, name), where=f"Box({name})"))
        if self.low is None and self.high is None:
            raise InvalidArgument("a box has a lower or an upper end", where="Box", got="neither")
        low, high = self.low, self.high
        if not has_names(low) and not has_names(high):
            self._check_order("Box", *(_at(by_name(e, ["w"], where="Box")) for e in (low, high)))

    @property
    def by_entry(self) -> bool:
        """Whether a part of a tensor is bounded alike wherever it lies."""
        return is_number(self.low) and is_number(self.high)

    @property
    def has_names(self) -> bool:
        """Whether tensors are named."""
        return has_names(self.low) or has_names(self.high)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise `UnknownName` for a name or glob that matches none of these."""
        names = list(names)
        check_names(self.low, names, where="Box(low)")
        check_names(self.high, names, where="Box(high)")

    def given_for(self, names: Iterable[str]) -> dict[str, tuple[Any, Any]]:
        """Return name -> the two ends of a tensor, ``None`` for none; without the tensors that have neither."""
        names = list(names)
        lows = by_name(self.low, names, where="Box(low)")
        highs = by_name(self.high, names, where="Box(high)")
        found = {n: (lows.get(n), highs.get(n)) for n in names if n in lows or n in highs}
        for name, ends in found.items():
            self._check_order(f"Box: {name}", *ends)
        return found

    @staticmethod
    def _check_order(where: str, low: Any, high: Any) -> None:
        try:
            good = low is None or high is None or bool(np.all(np.less_equal(low, high)))
        except ValueError as error:
            raise InvalidArgument("the ends do not go together", where=where) from error
        if not good:
            raise InvalidArgument("the lower end is above the upper end", where=where)


def _at(values: Mapping[str, Any]) -> Any:
    return values.get("w")
