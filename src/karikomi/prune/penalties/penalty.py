"""The base class of penalties, and checks of their masks, tensors and strengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.rule import Array, Namespace
from karikomi.schedule import Schedule, is_number, value_at, whole_from
from karikomi.select import select

Constant = Callable[[Array], Array]
"""Returns an array that derivatives take for a constant: ``detach``, ``stop_gradient``."""


class Penalty:
    """A term of the loss that prepares pruning: strength times the sum of `value` over tensors.

    `of`: ``"weights"`` of Linear and Conv layers, or ``"scales"`` of batch norms. `per_unit`: whether it needs
    the axes that name one unit. `of_marked`: whether it applies only to weights that masks mark for removal.
    """

    __slots__ = ()

    of: ClassVar[str] = "weights"
    per_unit: ClassVar[bool] = False
    of_marked: ClassVar[bool] = False
    strength: float | Schedule

    def value(
        self, weights: Array, axes: tuple[int, ...], *, xp: Namespace, constant: Constant
    ) -> Array:
        """Return the term of one tensor at strength 1, a 0-d array whose derivative at zero is zero.

        `weights`: at least float32, not empty. `axes`: those whose indices together name one unit.
        """
        raise NotImplementedError

    def gradient(self, weights: Array, axes: tuple[int, ...], *, xp: Namespace) -> Array:
        """Return the derivative of `value`, or the subgradient 0 where there is none."""
        raise NotImplementedError

    def strength_now(self, step: Array, *, xp: Namespace) -> Array:
        """Return the strength at a step, which may be traced: 0-d, floating, like `step`."""
        return value_at(self.strength, step, xp=xp)

    @property
    def changes(self) -> bool:
        """Whether the strength depends on the step."""
        return _is_schedule(self.strength)

    def strength_at(self, step: int | None) -> float:
        """Return the strength at a step >= 0; None is allowed where it is constant. Raises `InvalidArgument`."""
        if step is None and self.changes:
            raise InvalidArgument(
                f"the strength of {type(self).__name__} changes from step to step",
                where="penalty(step)",
                got=None,
                allowed="step=, the number of steps taken so far",
            )
        text = "a step is a whole number, counted from 0"
        number = whole_from(0, 0 if step is None else step, text, where="penalty(step)")
        return float(self.strength_now(np.asarray(float(number)), xp=np))


def term(
    rule: Penalty,
    weights: Array,
    axes: tuple[int, ...],
    kept: Array | None,
    *,
    xp: Namespace,
    constant: Constant,
) -> Array:
    """Return the term of one tensor at strength 1, of the entries that a mask does not keep, or of all."""
    marked = weights if kept is None else xp.where(kept, xp.zeros_like(weights), weights)
    return rule.value(marked, axes, xp=xp, constant=constant)


def check_penalty(rule: object, masks: object, *, where: str) -> None:
    """Raise `InvalidArgument` for another object, missing masks, and masks that would have no effect."""
    if not isinstance(rule, Penalty):
        raise InvalidArgument(
            "not a penalty", where=where, got=repr(rule)[:80], allowed="kk.prune.L1(1e-5)"
        )
    if rule.of_marked and not isinstance(masks, Mapping):
        raise InvalidArgument(
            f"{type(rule).__name__} needs masks, by the names of tensors",
            where=where,
            got=type(masks).__name__,
            hint="masks=kk.torch.prune_(copy.deepcopy(model), sparsity=0.5)",
        )
    if masks is not None and not rule.of_marked:
        raise InvalidArgument(
            f"{type(rule).__name__} applies to all weights alike",
            where=where,
            got="masks",
            hint="leave them out: a weight at zero adds nothing",
        )


def concerned(
    rule: Penalty,
    names: Sequence[str],
    axes: Collection[str],
    masks: Mapping[str, Any] | None,
    *,
    only: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    where: str,
) -> list[str]:
    """Return the names of the arrays that a penalty applies to; arrays have no type of layer.

    All that are selected; per unit those with unit axes, and with masks those that have one. Raises
    `InvalidArgument` if there are none, and for scales without `only`.
    """
    if rule.of == "scales" and only is None:
        raise InvalidArgument(
            "arrays do not say which of them are the scales of batch norms",
            where=where,
            hint='name them: only="*scale"',
        )
    chosen = select(names, only=only, exclude=exclude, where=where)
    if rule.per_unit:
        chosen = [name for name in chosen if name in axes]
    if rule.of_marked:
        chosen = [name for name in chosen if name in (masks or {})]
    if not chosen:
        missing = "mask" if rule.of_marked else "unit axis"
        raise InvalidArgument(
            "there is nothing to penalise",
            where=where,
            got=f"no selected array has a {missing}",
            hint=None if rule.of_marked else "name them: unit_axes={'*kernel': -1}",
        )
    return chosen


def check_strength(strength: Any, *, where: str) -> Any:
    """Return a strength as a Python number or schedule, or raise `InvalidArgument`."""
    if _is_schedule(strength):
        for end in ("start", "stop"):
            check_strength(getattr(strength, end, 0.0), where=f"{where} ({end} of the schedule)")
        return strength
    number = float(strength) if is_number(strength) else math.nan
    if not 0.0 <= number < math.inf:
        raise InvalidArgument(
            "the strength is a number or a schedule",
            where=where,
            got=repr(strength),
            allowed=">= 0 and finite, or such as kk.schedule.Linear(0.0, 1e-4, steps=(0, 1_000))",
        )
    return number


def _is_schedule(strength: object) -> bool:
    return callable(getattr(strength, "value", None)) and not isinstance(strength, type)
