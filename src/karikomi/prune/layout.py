"""Axes of weights, and parts of tensors that are pruned together: facts of layer types, never guessed from rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.schedule import whole


@dataclass(frozen=True, slots=True)
class Layout:
    """The axis of a weight along which its units (outputs) lie, and the one of its inputs.

    The other axes are a kernel's. `inputs`: none where a weight has no inputs to group. Raises
    `InvalidArgument` for what are not two different whole numbers.
    """

    units: int
    inputs: int | None = None

    def __post_init__(self) -> None:
        units = whole(self.units)
        inputs = None if self.inputs is None else whole(self.inputs)
        if units is None or (inputs is None) != (self.inputs is None) or units == inputs:
            raise InvalidArgument(
                "units and inputs are two different axes",
                where="Layout",
                got=f"units={self.units!r}, inputs={self.inputs!r}",
                allowed="whole numbers; inputs=None where there are none",
            )
        object.__setattr__(self, "units", units)
        object.__setattr__(self, "inputs", inputs)

    def check(self, shape: tuple[int, ...], *, where: str) -> None:
        """Raise `InvalidArgument` for a weight that has not these axes."""
        axes, rank = [axis for axis in (self.units, self.inputs) if axis is not None], len(shape)
        inside = all(-rank <= axis < rank for axis in axes)
        if not inside or len({axis % rank for axis in axes}) < len(axes):
            raise InvalidArgument(
                "the layout does not fit its weight",
                where=where,
                got=self,
                allowed=f"axes of {shape}",
            )

    def canonical(self, array: np.ndarray) -> np.ndarray:
        """Return a view of shape (units, kernel positions ..., inputs), the same in every framework.

        >>> Layout(units=0, inputs=1).canonical(np.zeros((8, 4, 3, 3))).shape
        (8, 3, 3, 4)
        """
        if self.inputs is None:
            return np.moveaxis(array, self.units, 0)
        return np.moveaxis(array, (self.units, self.inputs), (0, -1))

    def restored(self, array: np.ndarray) -> np.ndarray:
        """Return a view with the axes in the order of the weight again."""
        if self.inputs is None:
            return np.moveaxis(array, 0, self.units)
        return np.moveaxis(array, (0, -1), (self.units, self.inputs))


@dataclass(frozen=True, slots=True)
class Member:
    """Item i of a group takes the indices ``start + i * size`` up to ``start + (i + 1) * size`` of an axis.

    `size` 0: the one item takes the whole tensor. `scored`: whether these weights count for what the item
    is worth (else they only go with it).
    """

    name: str
    axis: int
    start: int = 0
    size: int = 1
    scored: bool = True


@dataclass(frozen=True, slots=True)
class Coupled:
    """Things that go as one: `items` units, heads or layers, each with its part of every member.

    `of`: the name of the tensor (for heads: of the layer) that they are called after.
    """

    of: str
    items: int
    members: tuple[Member, ...]
