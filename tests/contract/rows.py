"""THE list of rules under contract: a new clip or bound joins all laws with one `Row`, nothing else.

The reference of a row is plain NumPy in float64, written apart from the package.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

import niwaki as nw
from niwaki.rule import (
    Array,
    Decision,
    Namespace,
    Quantity,
    Scope,
    State,
    check_limit,
    leave,
    shrink_to,
)

Arrays = list[np.ndarray]
Axes = Sequence[int | None]


@dataclass(frozen=True)
class Row:
    """A rule and what must hold of it.

    `reference`: ``(arrays, unit axes) -> arrays``, in float64; an axis of ``None`` says that the
    tensor has no units, so that a bound per unit leaves it alone. `bound`: ``(arrays, unit axes) ->
    the largest measured number in units of the limit``, at most 1 afterwards. `idempotent`: whether
    applying the rule again changes no bit.
    """

    rule: Any
    reference: Callable[[Arrays, Axes], Arrays]
    bound: Callable[[Arrays, Axes], float] | None = None
    idempotent: bool = False

    @property
    def kind(self) -> str:
        return "clip" if self.rule.of is Quantity.GRADIENT else "bound"

    @property
    def by_element(self) -> bool:
        return self.rule.scope is Scope.ELEMENT

    def measures_only(self) -> Row:
        return dataclasses.replace(self, rule=dataclasses.replace(self.rule, limit=math.inf))

    def __str__(self) -> str:
        return type(self.rule).__name__


def norm(array: np.ndarray) -> float:
    """Return the L2 norm, scaled by a power of two so that nothing overflows or underflows."""
    wide = np.abs(array).astype(np.float64)
    largest = float(wide.max(initial=0.0))
    if largest == 0.0:
        return 0.0
    scale = 2.0 ** (math.frexp(largest)[1] - 1)
    return scale * math.sqrt(math.fsum(float(x) * float(x) for x in (wide / scale).ravel()))


def joint(arrays: Arrays) -> float:
    """Return the L2 norm of all arrays together."""
    return norm(np.array([norm(array) for array in arrays]))


def shrunk(array: np.ndarray, size: float, limit: float) -> np.ndarray:
    """Return an array of norm `size` scaled down to the limit, if it is above."""
    return array * (limit / size) if size > limit else array


def units(array: np.ndarray, axis: int | None) -> Iterator[np.ndarray]:
    """Yield each output unit of an array as a view; nothing for a tensor without units."""
    if axis is not None:
        yield from np.moveaxis(array, axis, 0)


def per_unit(
    change: Callable[[np.ndarray], np.ndarray],
) -> Callable[[Arrays, Axes], Arrays]:
    """Return the reference of a bound that changes each unit by itself."""

    def reference(arrays: Arrays, axes: Axes) -> Arrays:
        changed = [array.astype(np.float64) for array in arrays]
        for array, axis in zip(changed, axes, strict=True):
            for unit in units(array, axis):
                unit[...] = change(unit)
        return changed

    return reference


def largest_unit(limit: float) -> Callable[[Arrays, Axes], float]:
    """Return the law that no unit's norm is above the limit."""

    def bound(arrays: Arrays, axes: Axes) -> float:
        pairs = zip(arrays, axes, strict=True)
        return max((norm(u) for a, axis in pairs for u in units(a, axis)), default=0.0) / limit

    return bound


def _clamped(arrays: Arrays, limit: float) -> Arrays:
    return [np.sign(array) * np.minimum(np.abs(array), limit) for array in arrays]


def _largest(arrays: Arrays) -> float:
    return max(float(np.abs(array).max(initial=0.0)) for array in arrays)


ROWS = [
    Row(
        rule=nw.clip.ByValue(1.0),
        reference=lambda arrays, axes: _clamped(arrays, 1.0),
        bound=lambda arrays, axes: _largest(arrays) / 1.0,
        idempotent=True,
    ),
    Row(
        rule=nw.clip.ByNorm(1.0),
        reference=lambda arrays, axes: [shrunk(array, norm(array), 1.0) for array in arrays],
        bound=lambda arrays, axes: max(norm(array) for array in arrays) / 1.0,
    ),
    Row(
        rule=nw.clip.ByGlobalNorm(1.0),
        reference=lambda arrays, axes: [shrunk(array, joint(arrays), 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
    ),
    Row(
        rule=nw.bound.Clamp(0.5),
        reference=lambda arrays, axes: _clamped(arrays, 0.5),
        bound=lambda arrays, axes: _largest(arrays) / 0.5,
        idempotent=True,
    ),
    Row(
        rule=nw.bound.MaxNorm(1.0),
        reference=per_unit(lambda unit: shrunk(unit, norm(unit), 1.0)),
        bound=largest_unit(1.0),
        idempotent=True,
    ),
]


@dataclass(frozen=True, slots=True)
class TensorEMA:
    """A probe, in no registry: what a rule that learns of each tensor keeps, in every shape.

    The first norm of a tensor may be `limit`, later ones `limit` times the mean of its own so far.
    """

    limit: float

    scope: ClassVar[Scope] = Scope.TENSOR
    of: ClassVar[Quantity] = Quantity.GRADIENT
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_limit(self.limit, where="TensorEMA")

    def init(self, like: Array, *, xp: Namespace) -> State:
        return {
            "mean": xp.zeros_like(like),
            "seen": xp.zeros_like(like),
            "ring": xp.zeros_like(like) * xp.zeros((2, 1), dtype=like.dtype),
            "largest": xp.sum(xp.zeros_like(like)),
        }

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        one = xp.ones_like(norms)
        seen = state["seen"] > 0
        learned = xp.where(seen, 0.5 * state["mean"] + 0.5 * norms, norms)
        after = {
            "mean": xp.where(present, learned, state["mean"]),
            "seen": xp.where(present, one, state["seen"]),
            "ring": 0.5 * state["ring"] + xp.where(present, norms, 0.0 * norms),
            "largest": xp.maximum(state["largest"], xp.max(norms)),
        }
        limit = self.limit * xp.where(seen, state["mean"], one)
        return Decision(shrink_to(norms, limit, xp=xp), None, leave(xp)), after


PROBES = [
    Row(
        rule=TensorEMA(1.0),
        reference=lambda arrays, axes: [shrunk(array, norm(array), 1.0) for array in arrays],
        bound=lambda arrays, axes: max(norm(array) for array in arrays) / 1.0,
    )
]
EVERY = [*ROWS, *PROBES]
CLIPS = [row for row in EVERY if row.kind == "clip"]
LIMITED = [row for row in ROWS if any(f.name == "limit" for f in dataclasses.fields(row.rule))]
