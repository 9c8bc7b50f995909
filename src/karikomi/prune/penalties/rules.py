"""Penalties: formulas on one tensor that, added to the loss, drive what is to go towards zero."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from karikomi.errors import InvalidArgument
from karikomi.prune.penalties.penalty import Constant, Penalty, check_strength
from karikomi.registry import register
from karikomi.rule import Array, Namespace
from karikomi.schedule import Schedule, whole_from


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

    >>> import numpy as np, karikomi as kk
    >>> value, gradients = kk.numpy.penalty({"w": np.array([-2.0, 0.0, 0.5])}, L1(0.5))
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
        return xp.sum(_magnitudes(weights, xp=xp, constant=constant))

    def gradient(self, weights: Array, axes: tuple[int, ...], *, xp: Namespace) -> Array:
        """Return ``sign(w)``."""
        return xp.sign(weights)


@register(
    "penalty",
    formula="strength * sum w^2",
    source="Hoerl and Kennard 1970, Ridge Regression: Biased Estimation for Nonorthogonal Problems",
)
@dataclass(frozen=True, slots=True)
class L2(Penalty):
    """The sum of squares of the weights: large ones are pulled hardest, and none becomes zero.

    ``strength * sum w^2``, of derivative ``2 * strength * w``: with plain SGD a weight decay of ``2 * strength``. It
    keeps weights small; what makes them zero is `L1` or `GroupLasso`.

    `strength`: >= 0 and finite, or a schedule. Raises `InvalidArgument`.

    >>> import numpy as np, karikomi as kk
    >>> value, gradients = kk.numpy.penalty({"w": np.array([-2.0, 0.0, 0.5])}, L2(0.5))
    >>> value, gradients["w"].tolist()
    (2.125, [-2.0, 0.0, 0.5])

    Source: Hoerl and Kennard 1970; ``keras.regularizers.L2``. No half before the sum.
    """

    strength: float | Schedule

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", check_strength(self.strength, where="L2"))

    def value(
        self, weights: Array, axes: tuple[int, ...], *, xp: Namespace, constant: Constant
    ) -> Array:
        """Return ``sum w^2``."""
        return xp.sum(xp.square(weights))

    def gradient(self, weights: Array, axes: tuple[int, ...], *, xp: Namespace) -> Array:
        """Return ``2 w``."""
        return 2.0 * weights


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

    >>> import torch, karikomi as kk
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    >>> kk.torch.penalty(model, ScaleL1(0.25)).item()
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

    >>> import numpy as np, karikomi as kk
    >>> weights = {"w": np.array([[3.0, 4.0], [0.0, 0.0]])}
    >>> value, gradients = kk.numpy.penalty(weights, GroupLasso(1.0), unit_axes={"w": 0})
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
            where, given = f"GrowingL2({field})", getattr(self, field)
            steps = whole_from(least, given, "a whole number of steps", where=where)
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


def _magnitudes(weights: Array, *, xp: Namespace, constant: Constant) -> Array:
    # Not `abs`, whose derivative at zero is 1 in JAX; and a NaN must stay one.
    return weights * constant(xp.sign(weights))


def _norms(weights: Array, axes: tuple[int, ...], *, xp: Namespace, constant: Constant) -> Array:
    """Return the L2 norm of each unit, ``m * sqrt(sum (w / m)^2)`` with m the largest magnitude."""
    inner = tuple(axis for axis in range(len(weights.shape)) if axis not in axes)
    if not inner:
        return _magnitudes(weights, xp=xp, constant=constant)
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
