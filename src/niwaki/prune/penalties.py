"""Penalties: formulas on one tensor that, added to the loss, drive what is to go towards zero.

Separate from scores, which judge a network as it is; these change what training makes of it.
Derivatives at zero are zero in every framework: there a plain ``abs`` has 1 in JAX, a plain norm NaN.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np

from niwaki.errors import InvalidArgument, UnknownName, suggest
from niwaki.registry import register
from niwaki.rule import Array, Namespace
from niwaki.schedule import Schedule, value_at, whole
from niwaki.select import select

Constant = Callable[[Array], Array]
"""Returns an array that derivatives take for a constant: ``detach``, ``stop_gradient``."""


class Penalty:
    """A term of the loss that prepares pruning: strength times the sum of `value` over tensors.

    `of`: ``"weights"`` of Linear and Conv layers, or ``"scales"`` of batch norms. `per_unit`: it must be
    told which axes name one unit. `of_marked`: it speaks only of weights that masks mark to go.
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
        """Return the strength at a step counted from 0.

        Raises `InvalidArgument` for what is no step, and for none where the strength depends on it.
        """
        if step is None and self.changes:
            raise InvalidArgument(
                f"the strength of {type(self).__name__} changes from step to step",
                where="penalty(step)",
                got=None,
                allowed="step=, the number of steps taken so far",
            )
        known = 0 if step is None else whole(step)
        if known is None or known < 0:
            raise InvalidArgument(
                "a step is a whole number, counted from 0", where="penalty(step)", got=repr(step)
            )
        return float(self.strength_now(np.asarray(float(known)), xp=np))


@register(
    "penalty",
    formula="strength * sum |w|",
    source="Tibshirani 1996, Regression Shrinkage and Selection via the Lasso",
)
@dataclass(frozen=True, slots=True)
class L1(Penalty):
    """The sum of magnitudes of the weights: every weight is pulled to zero equally hard.

    ``strength * sum |w|``, of derivative ``strength * sign(w)``, 0 at 0.

    `strength`: >= 0 and finite, or a schedule. Raises `InvalidArgument`.

    >>> import numpy as np, niwaki as nw
    >>> value, gradients = nw.numpy.penalty({"w": np.array([-2.0, 0.0, 0.5])}, L1(0.5))
    >>> value, gradients["w"].tolist()
    (1.25, [-0.5, 0.0, 0.5])

    Source: Tibshirani 1996, "Regression Shrinkage and Selection via the Lasso".
    """

    strength: float | Schedule

    def __post_init__(self) -> None:
        where = type(self).__name__
        object.__setattr__(self, "strength", check_strength(self.strength, where=where))

    def value(
        self, weights: Array, axes: tuple[int, ...], *, xp: Namespace, constant: Constant
    ) -> Array:
        """Return ``sum |w|``."""
        return xp.sum(_magnitudes(weights, xp=xp))

    def gradient(self, weights: Array, axes: tuple[int, ...], *, xp: Namespace) -> Array:
        """Return ``sign(w)``."""
        one, zero = xp.ones_like(weights), xp.zeros_like(weights)
        return xp.where(weights > 0, one, xp.where(weights < 0, -one, zero))


@register(
    "penalty",
    formula="strength * sum |g| over the scales g of batch norms",
    source="Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming",
)
@dataclass(frozen=True, slots=True)
class ScaleL1(L1):
    """Network slimming: the sum of magnitudes of the scales of batch norms, one for each channel.

    ``strength * sum |g|``; channels whose scale ends near zero can go.

    `strength`: >= 0 and finite, or a schedule. Raises `InvalidArgument`.

    >>> import torch, niwaki as nw
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    >>> nw.torch.penalty(model, ScaleL1(0.25)).item()
    1.0

    Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming"
    (1e-4, for some of its networks 1e-5).
    """

    of: ClassVar[str] = "scales"
    strength: float | Schedule = 1e-4


@register(
    "penalty",
    formula="strength * sum over units u of sqrt(size of u) * |w_u|_2",
    source="Yuan and Lin 2006, Model selection with grouped variables; Wen et al. 2016",
)
@dataclass(frozen=True, slots=True)
class GroupLasso(Penalty):
    """The norms of units: whole neurons and filters go to zero, and not single weights.

    ``strength * sum_u sqrt(size_u) * |w_u|_2``, the root so that large units are not favoured; of
    derivative ``strength * sqrt(size_u) * w_u / |w_u|_2``, 0 for a unit at zero.

    `strength`: >= 0 and finite, or a schedule. Raises `InvalidArgument`. A unit comes from the type of
    the layer: a row of a Linear, a filter of a Conv, all of its incoming weights.

    >>> import numpy as np, niwaki as nw
    >>> weights = {"w": np.array([[3.0, 4.0], [0.0, 0.0]])}
    >>> value, gradients = nw.numpy.penalty(weights, GroupLasso(1.0), unit_axes={"w": 0})
    >>> round(value, 4), gradients["w"].round(4).tolist()
    (7.0711, [[0.8485, 1.1314], [0.0, 0.0]])

    Source: Yuan and Lin 2006, "Model selection and estimation in regression with grouped variables",
    eq. 2.1 with the weights of its section 2; Wen et al. 2016, "Learning Structured Sparsity in Deep
    Neural Networks" (there without the root of the size).
    """

    per_unit: ClassVar[bool] = True
    strength: float | Schedule

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", check_strength(self.strength, where="GroupLasso"))

    def value(
        self, weights: Array, axes: tuple[int, ...], *, xp: Namespace, constant: Constant
    ) -> Array:
        """Return ``sum_u sqrt(size_u) * |w_u|_2``."""
        norms = _norms(weights, axes, xp=xp, constant=constant)
        return _root_of_size(weights, axes) * xp.sum(norms)

    def gradient(self, weights: Array, axes: tuple[int, ...], *, xp: Namespace) -> Array:
        """Return ``sqrt(size_u) * w_u / |w_u|_2``."""
        norms = _norms(weights, axes, xp=xp, constant=lambda array: array)
        whole_again = xp.reshape(norms, _beside(weights, axes))
        safe = xp.where(whole_again > 0, whole_again, xp.ones_like(whole_again))
        return _root_of_size(weights, axes) * (weights / safe)


@register(
    "penalty",
    formula="s(t) / 2 * sum w^2 over marked weights, s(t) = min(ceiling, growth * (1 + floor((t - first) / every)))",
    source="Wang et al. 2021, Neural Pruning via Growing Regularization",
)
@dataclass(frozen=True, slots=True)
class GrowingL2(Penalty):
    """GReg-1: an L2 penalty on the weights marked to go, which grows until they are as good as gone.

    ``s(t) / 2 * sum w^2`` over the weights that a mask does not keep, of derivative ``s(t) * w``, with
    ``s(t) = min(ceiling, growth * (1 + floor((t - first) / every)))``, and 0 before `first`. It keeps
    no state: the strength is a function of the step.

    `ceiling`, `growth`: > 0 and finite. `every`: steps between two rises, >= 1. `first`: the step of the
    first rise, >= 0. Raises `InvalidArgument`. Plain SGD needs a learning rate below ``2 / ceiling``.

    >>> rule = GrowingL2(1.0, growth=0.25, every=10)
    >>> [rule.strength_at(step) for step in (0, 9, 10, 29, 500)]
    [0.25, 0.25, 0.5, 0.75, 1.0]

    Source: Wang et al. 2021, "Neural Pruning via Growing Regularization", algorithm 1; the defaults are
    those of its code for ImageNet. Deviation: there the strength may end one `growth` above the ceiling.
    """

    of_marked: ClassVar[bool] = True
    ceiling: float = 1.0
    _: KW_ONLY
    growth: float = 1e-4
    every: int = 5
    first: int = 0

    def __post_init__(self) -> None:
        for field in ("ceiling", "growth"):
            number = check_strength(getattr(self, field), where=f"GrowingL2({field})")
            if not isinstance(number, int | float) or number == 0:
                raise InvalidArgument(
                    "it grows by a number", where=f"GrowingL2({field})", got=number, allowed="> 0"
                )
            object.__setattr__(self, field, number)
        for field, least in (("every", 1), ("first", 0)):
            steps = whole(getattr(self, field))
            if steps is None or steps < least:
                raise InvalidArgument(
                    "a whole number of steps",
                    where=f"GrowingL2({field})",
                    got=repr(getattr(self, field)),
                    allowed=f">= {least}",
                )
            object.__setattr__(self, field, steps)

    @property
    def changes(self) -> bool:
        """Whether the strength depends on the step: it grows."""
        return True

    def strength_now(self, step: Array, *, xp: Namespace) -> Array:
        """Return the strength at a step."""
        # Half a step more, because XLA divides by multiplying and may end below a whole number.
        rises = 1.0 + xp.floor((step - float(self.first) + 0.5) / float(self.every))
        grown = self.growth * xp.maximum(rises, xp.zeros_like(rises))
        return xp.minimum(grown, self.ceiling * xp.ones_like(grown))

    def value(
        self, weights: Array, axes: tuple[int, ...], *, xp: Namespace, constant: Constant
    ) -> Array:
        """Return ``sum w^2 / 2``."""
        return 0.5 * xp.sum(xp.square(weights))

    def gradient(self, weights: Array, axes: tuple[int, ...], *, xp: Namespace) -> Array:
        """Return ``w``."""
        return weights


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
    """Refuse what is no penalty, masks that are missing, and masks that nothing would be done with."""
    if not isinstance(rule, Penalty):
        raise InvalidArgument(
            "this is no penalty", where=where, got=repr(rule)[:80], allowed="nw.prune.L1(1e-5)"
        )
    if rule.of_marked and not isinstance(masks, Mapping):
        raise InvalidArgument(
            f"{type(rule).__name__} needs masks, by the names of tensors",
            where=where,
            got=type(masks).__name__,
            hint="masks=nw.torch.prune_(copy.deepcopy(model), sparsity=0.5)",
        )
    if masks is not None and not rule.of_marked:
        raise InvalidArgument(
            f"{type(rule).__name__} speaks of all weights alike",
            where=where,
            got="masks",
            hint="leave them out: a weight at zero adds nothing",
        )


def check_masks(
    masks: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Refuse masks that are not boolean, and those without a tensor of their name and shape."""
    for name, mask in (masks or {}).items():
        if name not in shapes:
            raise UnknownName(
                "a mask without its tensor", where=where, got=repr(name), hint=suggest(name, shapes)
            )
        shape, dtype = tuple(getattr(mask, "shape", ())), str(getattr(mask, "dtype", "no array"))
        if shape != tuple(shapes[name]) or "bool" not in dtype:
            raise InvalidArgument(
                "the mask does not fit its tensor",
                where=f"{where}: {name}",
                got=f"{dtype} {shape}",
                allowed=f"bool {tuple(shapes[name])}",
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
    """Return whom a penalty speaks of among arrays, which do not say what kind of layer they are of.

    All that are selected; per unit those with unit axes, and with masks those that have one. Raises
    `InvalidArgument` if that is none, and for scales that nobody named.
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
    """Return a strength, NumPy's numbers as Python's, or refuse what is negative, infinite or no number."""
    if _is_schedule(strength):
        for end in ("start", "stop"):
            check_strength(getattr(strength, end, 0.0), where=f"{where} ({end} of the schedule)")
        return strength
    usual = isinstance(strength, numbers.Real) and not isinstance(strength, bool)
    number = float(strength) if usual else math.nan
    if not 0.0 <= number < math.inf:
        raise InvalidArgument(
            "the strength is a number or a schedule",
            where=where,
            got=repr(strength),
            allowed=">= 0 and finite, or such as nw.schedule.Linear(0.0, 1e-4, steps=(0, 1_000))",
        )
    return number


def _is_schedule(strength: object) -> bool:
    return callable(getattr(strength, "value", None)) and not isinstance(strength, type)


def _magnitudes(weights: Array, *, xp: Namespace) -> Array:
    # Not `abs`, whose derivative at zero is 1 in JAX; and a NaN must stay one.
    return xp.where(weights > 0, weights, xp.where(weights == 0, xp.zeros_like(weights), -weights))


def _norms(weights: Array, axes: tuple[int, ...], *, xp: Namespace, constant: Constant) -> Array:
    """Return the L2 norm of each unit, ``m * sqrt(sum (w / m)^2)`` with m the largest magnitude."""
    inner = tuple(axis for axis in range(len(weights.shape)) if axis not in axes)
    if not inner:
        return _magnitudes(weights, xp=xp)
    peaks = constant(xp.max(xp.abs(weights), axis=inner))
    peaks = xp.where(peaks > 0, peaks, xp.ones_like(peaks))
    squares = xp.sum(xp.square(weights / xp.reshape(peaks, _beside(weights, axes))), axis=inner)
    zero = squares == 0
    # A root of zero has an infinite derivative, which times zero is NaN.
    roots = xp.sqrt(xp.where(zero, xp.ones_like(squares), squares))
    return xp.where(zero, xp.zeros_like(roots), peaks * roots)


def _beside(weights: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size if axis in axes else 1 for axis, size in enumerate(weights.shape))


def _root_of_size(weights: Array, axes: tuple[int, ...]) -> float:
    return math.sqrt(math.prod(size for axis, size in enumerate(weights.shape) if axis not in axes))
