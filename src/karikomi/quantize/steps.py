"""The step of each tensor's grid from how much the loss minds its errors, and one factor for a rate in bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import Unsupported

HALVINGS = 24
"""Bisections of the exponent of the factor: the rate is met to far less than a hundredth of a bit."""
UNSEEN = 0.1
"""The part of the mean curvature that is added to each row of an embedding."""
_SPAN = 40.0


def relative_steps(
    curvatures: Mapping[str, float], deviations: Mapping[str, float]
) -> dict[str, float]:
    """Return the step of each tensor up to a common factor: ``1 / sqrt(mean curvature)``.

    At high rates this is the allocation where one more bit helps each tensor alike: the loss of a step ``s`` is
    ``curvature s^2 / 12`` per weight. `curvatures`: name -> mean squared gradient of a weight. `deviations`: name ->
    root mean square of the weights; a tensor without curvature (the data does not reach it) gets the step that is the
    same part of its deviation as in the median of the others.

    >>> relative_steps({"a": 4.0, "b": 0.0}, {"a": 1.0, "b": 3.0})
    {'a': 0.5, 'b': 1.5}

    Source: the sensitivity of Hessian-weighted quantization, Choi, El-Khamy and Lee 2017, "Towards the Limit of
    Network Quantization"; the classic allocation of bits, Gersho and Gray 1992.
    """
    found = {name: 1.0 / math.sqrt(c) for name, c in curvatures.items() if c > 0.0}
    parts = sorted(
        step / deviations[name] for name, step in found.items() if deviations[name] > 0.0
    )
    usual = parts[len(parts) // 2] if parts else 1.0
    return {name: found.get(name, usual * (deviations[name] or 1.0)) for name in curvatures}


def row_factors(curvatures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the step of each row of an embedding over the tensor's step: ``1 / sqrt(curvature)``, on powers of 2**0.5.

    The rows of frequent words need finer steps than those of rare ones. `curvatures`: mean squared gradients, one per
    row; a tenth of their mean is added, which is about what a word has that the data happens not to contain.

    >>> row_factors(np.array([1.0, 1.0, 30.0, 0.0])).round(2).tolist()
    [2.0, 2.0, 0.5, 2.83]
    """
    mean = float(curvatures.mean()) if curvatures.size else 0.0
    if not mean > 0.0:
        return np.ones(curvatures.shape)
    shares = (curvatures / mean + UNSEEN) / (1.0 + UNSEEN)
    return np.exp2(np.rint(-np.log2(shares)) / 2.0)


def factor_at(rate: float, bits: Callable[[float], float], *, where: str) -> float:
    """Return the factor of all steps at which ``bits(factor)`` is nearest to `rate`; `bits` falls with the factor.

    By bisection of its exponent between 2**-40 and 2**40 around 1. Raises `Unsupported` where the rate is out of reach.

    >>> round(factor_at(3.0, lambda factor: 5.0 - math.log2(factor), where=""), 3)
    4.0
    """
    low, high = -_SPAN, _SPAN
    if not bits(2.0**low) >= rate >= bits(2.0**high):
        reached = f"{bits(2.0**high):.3g} to {bits(2.0**low):.3g} bits"
        raise Unsupported("the rate is out of reach", where=where, got=rate, allowed=reached)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if bits(2.0**middle) > rate else (low, middle)
    return 2.0 ** (0.5 * (low + high))
