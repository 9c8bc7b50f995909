"""One rule under contract and what must hold of it, and the pieces that references are made of.

Apart from the lists of rules, which both kinds of them import this for. A reference is plain NumPy in
float64, written apart from the package.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from contract.deciding import judge
from karikomi.rule import Quantity, Scope
from karikomi.rules import decide
from karikomi.rules.checkpoint import to_plain
from karikomi.rules.stages import alone

Arrays = list[np.ndarray]
Axes = Sequence[int | None]
Reference = Callable[[Arrays, Axes], Arrays]


@dataclass(frozen=True)
class Row:
    """A rule and what must hold of it.

    `reference`: ``(arrays, unit axes) -> arrays``, in float64; an axis of ``None`` says that the
    tensor has no units, so that a bound per unit leaves it alone. `bound`: ``(arrays, unit axes) ->
    the largest measured number in units of the limit``, at most 1 afterwards. `idempotent`: whether
    applying the rule again changes no bit. `always`: whether it scales tensors of any size, so that
    none is left bit for bit alone. `taught`: the joint norms of earlier steps, without which a rule that
    learns clips nothing; a rule of global scope. The laws and the reference start after them. `moments`:
    the running mean of squares of every entry, for a rule that judges by it. `in_norms`: the arguments in
    units of the measured norm. `unitless`: whether the measured numbers have no unit (ratios to weights, or to
    the mean square of a gradient), so that no argument has one.
    """

    rule: Any
    reference: Reference
    bound: Callable[[Arrays, Axes], float] | None = None
    idempotent: bool = False
    always: bool = False
    taught: tuple[float, ...] = ()
    moments: float | None = None
    in_norms: tuple[str, ...] = ("limit",)
    unitless: bool = False

    @property
    def kind(self) -> str:
        return "bound" if self.rule.of is Quantity.WEIGHT else "clip"

    @property
    def limited(self) -> bool:
        """Whether the first argument is called limit."""
        return [field.name for field in dataclasses.fields(self.rule)][:1] == ["limit"]

    def start(self) -> dict[str, Any] | None:
        """Return the state that the laws start from, its steps not counted; ``None`` is a fresh one."""
        # What asks for facts that nobody measures is refused before it learns.
        if not self.taught or self.rule.needs:
            return None
        state = decide.begin(self.rule, np.zeros(1), xp=np)
        for size in self.taught:
            _, state = judge(self.rule, np.array([size]), state, present=np.array([True]), xp=np)
        plain = to_plain([alone(self.rule, [""])], state)
        return {**plain, **dict.fromkeys(decide.COUNTERS, 0)}

    @property
    def of_updates(self) -> bool:
        return self.rule.of is Quantity.UPDATE

    @property
    def by_element(self) -> bool:
        return Scope.ELEMENT in self._scopes()

    @property
    def by_unit(self) -> bool:
        return Scope.UNIT in self._scopes()

    def _scopes(self) -> set[Scope]:
        return {leaf.scope for leaf in decide.leaves(self.rule)}

    def largest(self, array: np.ndarray) -> float:
        """Return what is measured of one tensor's entries, for a rule of element scope."""
        return float(np.abs(array).max(initial=0.0)) / math.sqrt(self.moments or 1.0)

    def measures_only(self) -> Row:
        return dataclasses.replace(self, rule=dataclasses.replace(self.rule, limit=math.inf))

    def __str__(self) -> str:
        return type(self.rule).__name__


def norm(array: np.ndarray) -> float:
    """Return the L2 norm, scaled by a power of two so that nothing overflows or underflows."""
    wide = np.abs(array).astype(np.float64)
    most = float(wide.max(initial=0.0))
    if most == 0.0:
        return 0.0
    scale = 2.0 ** (math.frexp(most)[1] - 1)
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
) -> Reference:
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


def clamped(arrays: Arrays, limit: float) -> Arrays:
    """Return arrays with every magnitude clamped to the limit."""
    return [np.sign(array) * np.minimum(np.abs(array), limit) for array in arrays]


def largest(arrays: Arrays) -> float:
    """Return the largest magnitude of all arrays."""
    return max(float(np.abs(array).max(initial=0.0)) for array in arrays)
