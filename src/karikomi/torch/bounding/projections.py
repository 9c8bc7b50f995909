"""Bound weights by projection: the nearest point of a set is measured from, and written in its place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from karikomi.errors import Unsupported
from karikomi.functional.projections import nearest_points
from karikomi.rule import Rule, Scope
from karikomi.torch.numerics.library import TorchLibrary
from karikomi.torch.numerics.norms import norm, on_host
from karikomi.torch.numerics.orders import Axis, unit_norms_of

WHERE = "torch.bound_"


class NearestPoints:
    """The nearest points of some weights in the set of a rule, after `attempted` steps."""

    def __init__(self, rule: Rule, attempted: int) -> None:
        self._rule, self._attempted = rule, attempted
        self._points: dict[str, torch.Tensor] = {}

    def distances(
        self, found: Mapping[str, torch.Tensor], axes: Mapping[str, Axis | None]
    ) -> dict[str, np.ndarray]:
        """Find the points of these weights, and return name -> how far each tensor or unit is from its own."""
        weights = {name: found[name].detach() for name in axes}
        devices = {tensor.device for tensor in weights.values()}
        groups = [list(weights)]
        if self._rule.scope is not Scope.GLOBAL:
            groups = [[name] for name in weights]
        elif len(devices) > 1:
            raise Unsupported(
                "weights on several devices have no common point",
                where=WHERE,
                got=", ".join(sorted(map(str, devices))),
            )
        for names in groups:
            library = TorchLibrary(weights[names[0]].device)
            self._points |= nearest_points(
                self._rule,
                {name: weights[name] for name in names},
                {name: _several(axes[name]) for name in names},
                attempted=library.xp.asarray(self._attempted),
                library=library,
            )
        apart = {name: weights[name].double() - self._points[name].double() for name in weights}
        if self._rule.scope is not Scope.UNIT:
            numbers = on_host([norm(difference) for difference in apart.values()])
            return {n: np.array([number]) for n, number in zip(apart, numbers, strict=True)}
        units = {name: unit_norms_of(apart[name], axes[name] or 0) for name in apart}
        return {name: numbers.cpu().double().numpy() for name, numbers in units.items()}

    def write_(
        self, name: str, tensor: torch.Tensor, axis: Axis | None, factors: np.ndarray
    ) -> None:
        """Write the nearest point of a weight, or of its units whose factor is 0, in its place."""
        if np.all(factors != 0.0):
            return
        point = self._points[name].to(tensor.dtype)
        if len(factors) > 1:
            moved = torch.from_numpy(factors == 0.0).to(tensor.device)
            point = torch.where(moved.reshape(unit_shape(tensor.shape, axis)), point, tensor)
        tensor.copy_(point)


def unit_shape(shape: torch.Size, axis: Axis | None) -> list[int]:
    """Return the shape in which numbers of units go with the entries of a tensor."""
    own = _several(axis)
    return [length if place in own else 1 for place, length in enumerate(shape)]


def _several(axis: Axis | None) -> tuple[int, ...]:
    return () if axis is None else (axis,) if isinstance(axis, int) else axis
