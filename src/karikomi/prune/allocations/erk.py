"""ERK: small tensors stay denser, by their sides and not by their size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from karikomi.errors import InvalidArgument
from karikomi.prune.allocations.allocation import (
    Allocator,
    Pool,
    Tensor,
    by_quota,
    check_sparsity,
)
from karikomi.prune.allocations.shares import Shares, known
from karikomi.registry import register
from karikomi.schedule import is_number


@register(
    "allocator",
    formula="density = min(1, eps * ((sum of the shape) / (product of the shape))^power), eps from the total",
    source="Evci et al. 2020, Rigging the Lottery",
)
@dataclass(frozen=True, slots=True, kw_only=True)
class ERK(Allocator):
    """The allocation ``erk`` with its exponent, and with or without the sides of kernels.

    ``density_i = min(1, eps * (sum(shape_i) / prod(shape_i))^power)``. `power`: >= 0; below 1 densities differ less, at
    0 all are equal. `kernel`: whether the sides of a kernel count; without them the ratio is ``(units + inputs) /
    (units * inputs)`` (ER). The rest is as in ``erk``. Raises `InvalidArgument`.

    >>> shapes = {"conv": (8, 4, 3, 3), "head": (10, 8)}
    >>> sizes = {name: Tensor(items=math.prod(shape), shape=shape) for name, shape in shapes.items()}
    >>> [pool.remove for pool in ERK()(sizes, 0.5)], [pool.remove for pool in ERK(kernel=False)(sizes, 0.5)]
    ([184, 0], [130, 54])

    Source: the ``erk_power_scale`` and ``include_kernel`` of the code of Evci et al. 2020, "Rigging the Lottery".
    Deviation: there the exponent acts with kernels only.
    """

    power: float = 1.0
    kernel: bool = True

    def __post_init__(self) -> None:
        if not is_number(self.power) or not 0.0 <= self.power < math.inf:
            raise InvalidArgument(
                "the exponent is a number that is not negative",
                where="ERK.power",
                got=repr(self.power),
                allowed=">= 0",
            )

    @property
    def name(self) -> str:
        """Its registered name."""
        return "erk"

    def __call__(self, tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
        """Return one pool per tensor; raises as `erdos_renyi_kernel`."""
        check_sparsity(sparsity)
        shapes = known(tensors, "shape", where="erk", hint="the shape of its weight")
        raw = {name: self._ratio(shape) ** self.power for name, shape in shapes.items()}
        return by_quota(tensors, _shares(tensors, raw, sparsity), sparsity, where="erk")

    def _ratio(self, shape: tuple[int, ...]) -> float:
        sides = shape if self.kernel else shape[:2]
        return sum(sides) / math.prod(sides)


@register(
    "allocation",
    name="erk",
    formula="density = min(1, eps * (sum of the shape) / (product of the shape)), eps from the total",
    source="Evci et al. 2020, Rigging the Lottery; Mocanu et al. 2018",
)
def erdos_renyi_kernel(tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
    """Return one pool per tensor, of a density in proportion to its sides over its size.

    ``density_i = eps * sum(shape_i) / prod(shape_i)``, kernel sides included. A tensor that this
    would make denser than dense stays dense and leaves the equation, which is then solved again.
    ``round(sparsity * items)`` go in all, and at least one item stays per tensor. `ERK` has its options.
    Raises `InvalidArgument` for a sparsity outside of [0, 1) or out of reach, or a missing shape.

    >>> shapes = {"first": (2, 3), "wide": (10, 10)}
    >>> sizes = {name: Tensor(items=a * b, shape=(a, b)) for name, (a, b) in shapes.items()}
    >>> erdos_renyi_kernel(sizes, 0.5)
    [Pool(names=('first',), remove=0), Pool(names=('wide',), remove=53)]

    Source: Evci, Gale, Menick, Castro and Elsen 2020, "Rigging the Lottery: Making All Tickets
    Winners", section 3, after Mocanu et al. 2018, "Scalable training of artificial neural networks
    with adaptive sparse connectivity inspired by network science". The exact total is ours.
    """
    return ERK()(tensors, sparsity)


def _shares(tensors: Mapping[str, Tensor], raw: Mapping[str, float], sparsity: float) -> Shares:
    stays = (1.0 - sparsity) * sum(tensor.items for tensor in tensors.values())
    dense: set[str] = set()
    while True:
        rest = [name for name in tensors if name not in dense]
        left = stays - sum(tensors[name].items for name in dense)
        eps = left / max(sum(raw[name] * tensors[name].items for name in rest), 1e-300)
        # Leaving one out only raises eps for the others, so all that exceed 1 may leave together.
        over = {name for name in rest if eps * raw[name] > 1.0}
        if not over:
            return {name: 0.0 if name in dense else 1.0 - eps * raw[name] for name in tensors}
        dense |= over
