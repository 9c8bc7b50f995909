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
from niwaki import conduct
from niwaki.checkpoint import to_plain
from niwaki.plan import alone
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
    applying the rule again changes no bit. `always`: whether it scales tensors of any size, so that
    none is left bit for bit alone. `taught`: the joint norms of earlier steps, without which a rule that
    learns clips nothing; a rule of global scope. The laws and the reference start after them.
    """

    rule: Any
    reference: Callable[[Arrays, Axes], Arrays]
    bound: Callable[[Arrays, Axes], float] | None = None
    idempotent: bool = False
    always: bool = False
    taught: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        return "bound" if self.rule.of is Quantity.WEIGHT else "clip"

    @property
    def limited(self) -> bool:
        """Whether the first argument is called limit."""
        return dataclasses.fields(self.rule)[0].name == "limit"

    def start(self) -> dict[str, Any] | None:
        """Return the state that the laws start from, its steps not counted; ``None`` is a fresh one."""
        if (
            not self.taught or self.rule.needs
        ):  # a probe that asks for facts is refused before it learns
            return None
        state = conduct.begin(self.rule, np.zeros(1), xp=np)
        for size in self.taught:
            _, state = conduct.judge(
                self.rule, np.array([size]), state, present=np.array([True]), xp=np
            )
        plain = to_plain([alone(self.rule, [""])], state)
        return {**plain, **dict.fromkeys(conduct.COUNTERS, 0)}

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


def _alone(arrays: Arrays, axes: Axes) -> Arrays:
    return arrays


def _of_unit_weights(arrays: Arrays, axes: Axes) -> list[tuple[np.ndarray, float]]:
    """Return every unit, a tensor without units being one, and the norm of its weights if all are 1."""
    pairs = zip(arrays, axes, strict=True)
    parts = [u for a, axis in pairs for u in ([a] if axis is None else units(a, axis))]
    return [(part, math.sqrt(part.size)) for part in parts]


def _agc(limit: float) -> Callable[[Arrays, Axes], Arrays]:
    def reference(arrays: Arrays, axes: Axes) -> Arrays:
        changed = [array.astype(np.float64) for array in arrays]
        for unit, weight in _of_unit_weights(changed, axes):
            unit[...] = shrunk(unit, norm(unit), limit * max(weight, 1e-3))
        return changed

    return reference


def _joint_to(limit: Callable[[float], float]) -> Callable[[Arrays, Axes], Arrays]:
    """Return the reference of a rule whose limit follows from the joint norm."""

    def reference(arrays: Arrays, axes: Axes) -> Arrays:
        size = joint(arrays)
        return [shrunk(array, size, limit(size)) for array in arrays]

    return reference


# Median and mean 1, standard deviation 0.5.
USUAL = (0.5, 1.5, 1.0 - 0.5 * math.sqrt(2.0), 1.0, 1.0 + 0.5 * math.sqrt(2.0), 1.0)

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
        rule=nw.clip.AGC(0.5),
        reference=_agc(0.5),
        bound=lambda arrays, axes: max(
            norm(unit) / (0.5 * max(weight, 1e-3))
            for unit, weight in _of_unit_weights(arrays, axes)
        ),
    ),
    Row(
        rule=nw.clip.AutoClip(50.0),
        reference=_joint_to(lambda size: float(np.median([*USUAL, *([size] if size else [])]))),
        bound=lambda arrays, axes: joint(arrays) / 1.0,
        taught=USUAL,
    ),
    Row(
        rule=nw.clip.ZClip(1.0, warmup=6),
        reference=_joint_to(lambda size: 1.0 + 0.25 / (size - 1.0) if size > 1.5 else size),
        bound=lambda arrays, axes: joint(arrays) / 1.5,
        taught=USUAL,
    ),
    Row(
        rule=nw.clip.AdaGC(),
        reference=lambda arrays, axes: [shrunk(array, joint(arrays), 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
    ),
    Row(
        rule=nw.clip.Quantile(0.5, window=6, warmup=6),
        reference=lambda arrays, axes: [shrunk(array, joint(arrays), 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
        taught=USUAL,
    ),
    Row(
        rule=nw.clip.EMARatio(2.0, beta=0.5),
        reference=lambda arrays, axes: [shrunk(array, joint(arrays), 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
        taught=(0.5,) * 4,
    ),
    # Its first steps leave alone.
    Row(rule=nw.clip.SPAM(), reference=_alone),
    Row(
        rule=nw.clip.BlockRMS(1.0),
        reference=lambda arrays, axes: [
            shrunk(array, norm(array) / math.sqrt(max(array.size, 1)), 1.0) for array in arrays
        ],
    ),
    # In the first step the running mean of squares is the square.
    Row(rule=nw.clip.StableAdamW(1.0), reference=_alone),
    Row(
        rule=nw.clip.Smooth(1.0),
        reference=lambda arrays, axes: [array / (joint(arrays) + 1.0) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
        always=True,
    ),
    Row(
        rule=nw.clip.Normalize(1.0),
        reference=lambda arrays, axes: [array / (joint(arrays) + 0.01) for array in arrays],
        bound=lambda arrays, axes: joint(arrays) / 1.0,
        always=True,
    ),
    # It scales nothing; what it skips is tested by itself.
    Row(rule=nw.clip.SkipSpikes(window=8, warmup=6), reference=_alone, taught=USUAL),
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
# The rules that also have a scope of their own per tensor.
VARIANTS = [
    Row(
        rule=nw.clip.Smooth(1.0, per="tensor"),
        reference=lambda arrays, axes: [array / (norm(array) + 1.0) for array in arrays],
        bound=lambda arrays, axes: max(norm(array) for array in arrays) / 1.0,
        always=True,
    ),
    Row(
        rule=nw.clip.Normalize(1.0, per="tensor"),
        reference=lambda arrays, axes: [array / (norm(array) + 0.01) for array in arrays],
        bound=lambda arrays, axes: max(norm(array) for array in arrays) / 1.0,
        always=True,
    ),
]
# Rules that learn, with so short a memory that a few steps lead through all of their branches.
EAGER = [
    Row(rule=rule, reference=_alone)
    for rule in (
        nw.clip.AutoClip(30.0, window=3),
        nw.clip.AutoClip(100.0, window=1),
        nw.clip.ZClip(0.5, alpha=0.5, warmup=2, clip_factor=0.9),
        nw.clip.AdaGC(1.5, beta=0.5, limit=4.0, warmup=2),
        nw.clip.Quantile(0.3, window=3, warmup=1),
        nw.clip.EMARatio(1.5, beta=0.5, per="tensor"),
        nw.clip.EMARatio(1.5, beta=0.5, per="tensor", learn="raw"),
        nw.clip.SPAM(4.0, warmup=2),
        nw.clip.SkipSpikes(1.0, window=3, warmup=2, patience=1),
    )
]
# What the framework laws leave out: names go from here once the frameworks measure what they need.
LATER = {"AGC", "SPAM", "BlockRMS", "StableAdamW"}
# What they leave out for good: it scales nothing.
ONLY_SKIPS = {"SkipSpikes"}

DECIDING = [*ROWS, *VARIANTS, *PROBES]
EVERY = [row for row in DECIDING if str(row) not in LATER | ONLY_SKIPS]
CLIPS = [row for row in EVERY if row.kind == "clip"]
LIMITED = [row for row in ROWS if row in EVERY and row.limited]
