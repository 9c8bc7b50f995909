"""How labels meet: the three things that operations do to the axes of tensors.

`meet`: entries are combined place by place, so that labels at one place are joined. `contract`: a
product that is summed over some axes: labels on these are joined pairwise and end there, all others pass.
`reduce`: an axis is summed over.

Where a tensor has labels along two axes at once (the heads and their inner width, the groups of a convolution
and their channels), its kept entries must be a product of indices. Either the inner axis can get
shorter, the same indices in each head, or the outer one: whole heads. One propagation does one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from karikomi.shrink.label_planes import (
    Labelled,
    Shape,
    aligned,
    along,
    fix_axes,
    part_of,
    reduced,
    resized,
    varying,
)
from karikomi.shrink.labels import Labels

Planes = list[tuple[int, np.ndarray]]
"""Planes with the number of the operand that each belongs to."""


class Meetings:
    """The labels of a network, and the axis that gets shorter where two could: the inner or, if `whole`, the outer."""

    def __init__(self, *, whole: bool) -> None:
        self.labels = Labels()
        self.whole = whole
        self.ended: list[np.ndarray] = []

    def current(self, value: Labelled, site: str) -> Labelled:
        """Return a value with what is joined by now."""
        found = (reduced(self.labels, plane, site) for plane in value.planes)
        return Labelled(value.shape, tuple(plane for plane in found if plane is not None))

    def fix(self, value: Labelled, reason: str, axes: Collection[int] | None = None) -> Labelled:
        """Return a value of which nothing, or nothing along these axes, gets shorter."""
        if axes is None:
            for plane in value.planes:
                self.labels.fix(plane, reason)
            return Labelled(value.shape)
        planes = (fix_axes(self.labels, plane, axes, reason) for plane in value.planes)
        return Labelled(value.shape, tuple(plane for plane in planes if plane is not None))

    def meet(self, values: Sequence[Labelled], site: str) -> Labelled:
        """Return what comes of combining tensors place by place, with broadcasting."""
        shape = np.broadcast_shapes(*(value.shape for value in values))
        rank = len(shape)
        sizes = [(1,) * (rank - len(value.shape)) + value.shape for value in values]
        planes = [
            (number, aligned(plane, rank))
            for number, value in enumerate(values)
            for plane in self._without_repetition(self.current(value, site), site)
        ]
        return Labelled(shape, tuple(self._met(planes, sizes, site)))

    def contract(
        self, first: Labelled, axes: str, other: Labelled, other_axes: str, out: str, site: str
    ) -> Labelled:
        """Return what comes of a product of two tensors, as in ``einsum("axes,other_axes->out")``."""
        return self.contract_all([first, other], [axes, other_axes], out, site)

    def contract_all(
        self, values: Sequence[Labelled], axes: Sequence[str], out: str, site: str
    ) -> Labelled:
        """Return what comes of a product of tensors, as in ``einsum(",".join(axes) + "->" + out)``."""
        every = "".join(dict.fromkeys(out + "".join(axes)))
        placed = [_placed(value, own, every) for value, own in zip(values, axes, strict=True)]
        met = self.meet(placed, site)
        gone = [place for place, letter in enumerate(every) if letter not in out]
        return self.reduce(met, gone, site)

    def reduce(
        self, value: Labelled, axes: Collection[int], site: str, *, keep: bool = False
    ) -> Labelled:
        """Return what is left of a tensor that is summed over `axes`, which stay with size 1 if `keep`."""
        planes = []
        for plane in self.current(value, site).planes:
            inside = set(varying(plane)) & set(axes)
            outside = set(varying(plane)) - set(axes)
            if inside and outside and self.whole:
                left = fix_axes(self.labels, plane, inside, site)
            elif inside:
                ended = fix_axes(self.labels, plane, outside, site)
                self.ended += [] if ended is None else [np.unique(ended)]
                left = None
            else:
                left = plane
            if left is not None:
                planes.append(left)
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(value.shape))
        if keep:
            return Labelled(shape, tuple(planes))
        return without(Labelled(shape, tuple(planes)), axes)

    def by_one_axis(self, value: Labelled, site: str) -> Labelled:
        """Return a value whose planes vary along one axis each: the outer if `whole`, else the inner."""
        planes = []
        for plane in self.current(value, site).planes:
            axes = varying(plane)
            others = axes[1:] if self.whole else axes[:-1]
            left = fix_axes(self.labels, plane, others, site)
            planes += [] if left is None else [left]
        return Labelled(value.shape, tuple(planes))

    def make_products(self, values: Iterable[tuple[Labelled, str]]) -> None:
        """Let what stays of each tensor be a product of indices; `values`: with their places.

        Done last: rules of operations may ask for less.
        """
        several = [
            (value, site)
            for value, site in values
            if any(len(varying(plane)) > 1 for plane in value.planes)
        ]
        before = -1
        while before != self.labels.joins:
            before = self.labels.joins
            for value, site in several:
                self.by_one_axis(value, site)

    def side_by_side(self, values: Sequence[Labelled], axis: int, site: str) -> Labelled:
        """Return what comes of putting tensors side by side along an axis: labels of all other axes are joined."""
        values = [self.current(value, site) for value in values]
        rank = len(values[0].shape)
        inside: list[Labelled] = []
        across: list[Labelled] = []
        for value in values:
            beside = tuple(plane for plane in value.planes if plane.shape[axis] == 1)
            own = [plane for plane in value.planes if plane.shape[axis] > 1]
            if len(own) > 1 or any(len(varying(plane)) > 1 for plane in own):
                others = [place for place in range(rank) if place != axis]
                left = self.fix(Labelled(value.shape, tuple(own)), site, others)
                own = list(self.meet([left, left], site).planes)[:1]
            inside.append(Labelled(value.shape, tuple(own)))
            flat = tuple(1 if place == axis else size for place, size in enumerate(value.shape))
            across.append(Labelled(flat, beside))
        met = self.meet(across, site)
        planes = list(met.planes)
        if any(value.planes for value in inside):
            parts = [
                np.broadcast_to(plane, resized((1,) * rank, axis, value.shape[axis]))
                for value in inside
                for plane in (value.planes or (np.zeros((1,) * rank, np.int64),))
            ]
            planes.append(np.concatenate(parts, axis))
        wide = sum(value.shape[axis] for value in values)
        return self.current(Labelled(resized(met.shape, axis, wide), tuple(planes)), site)

    def padded(self, value: Labelled, widths: Mapping[int, tuple[int, int]], site: str) -> Labelled:
        """Return a tensor padded with zeros: these get labels of their own along axes that have labels.

        `widths`: axis -> how many before and after.
        """
        value = self.current(value, site)
        planes = []
        for plane in value.planes:
            for axis in set(varying(plane)) & set(widths):
                before, after = widths[axis]
                own = along(self.labels.new("", axis, before + after), len(plane.shape), axis)
                left, right = (
                    np.broadcast_to(part, resized(plane.shape, axis, part.shape[axis]))
                    for part in (part_of(own, axis, 0, before), part_of(own, axis, before, after))
                )
                plane = np.concatenate([left, plane, right], axis)
            planes.append(plane)
        shape = tuple(size + sum(widths.get(axis, (0, 0))) for axis, size in enumerate(value.shape))
        return self.current(Labelled(shape, tuple(planes)), site)

    def _without_repetition(self, value: Labelled, site: str) -> list[np.ndarray]:
        """Return the planes; of those that vary along one axis, one can get shorter.

        How often entries are repeated stays, and of two kinds of units (after a flatten) the outer one or, if
        `whole`, the inner one.
        """
        planes = list(value.planes)
        if len(planes) < 2:
            return planes
        left = []
        for plane in planes:
            shared = any(set(varying(plane)) & set(varying(o)) for o in planes if o is not plane)
            if shared and not self.labels.owned(plane).any():
                self.labels.fix(plane, site)
            else:
                left.append(plane)
        return self._finest(left, site)

    def _finest(self, planes: list[np.ndarray], site: str) -> list[np.ndarray]:
        """Return the planes without those along whose one axis another kind of units varies faster."""
        left: list[np.ndarray] = []
        for plane in sorted(planes, key=_changes, reverse=not self.whole):
            beside = [
                other for other in left if other.shape == plane.shape and len(varying(plane)) == 1
            ]
            if any(_crossed(plane, other) for other in beside):
                self.labels.fix(plane, site)
            else:
                left.append(plane)
        return left

    def _met(self, planes: Planes, sizes: Sequence[Shape], site: str) -> list[np.ndarray]:
        """Return the planes of the result: those that have an axis in common are joined."""
        found: list[np.ndarray] = []
        for together in _overlapping(planes):
            axes = sorted({axis for _, plane in together for axis in varying(plane)})
            present = [n for n, shape in enumerate(sizes) if any(shape[axis] > 1 for axis in axes)]
            alike = all(varying(plane) == tuple(axes) for _, plane in together)
            if len(present) == 1:
                found += [plane for _, plane in together]
            elif alike and {number for number, _ in together} == set(present):
                found += self._joined([plane for _, plane in together], site)
            else:
                less = self._less(together, axes, sizes, site)
                found += self._met(less, sizes, site)
        return found

    def _joined(self, planes: Sequence[np.ndarray], site: str) -> list[np.ndarray]:
        for plane in planes[1:]:
            self.labels.join(planes[0], plane, site)
        left = reduced(self.labels, planes[0], site)
        return [] if left is None else [left]

    def _less(
        self, planes: Planes, axes: Sequence[int], sizes: Sequence[Shape], site: str
    ) -> Planes:
        """Return planes that vary along fewer axes.

        Not along an axis that an operand has without labels; else not along the axis that stays, the outer one
        or, if `whole`, the inner one.
        """

        def labelled(number: int, axis: int) -> bool:
            return any(n == number and plane.shape[axis] > 1 for n, plane in planes)

        stay = [
            axis
            for axis in axes
            if not all(labelled(n, axis) for n, shape in enumerate(sizes) if shape[axis] > 1)
        ]
        stay = stay or [axes[-1] if self.whole else axes[0]]
        fixed = [(n, fix_axes(self.labels, plane, stay, site)) for n, plane in planes]
        return [(n, plane) for n, plane in fixed if plane is not None]


def _changes(plane: np.ndarray) -> int:
    """Return how often the labels change from one entry to the next."""
    flat = plane.ravel()
    return int((flat[1:] != flat[:-1]).sum())


def _crossed(plane: np.ndarray, other: np.ndarray) -> bool:
    """Return whether labels of two planes meet in several ways, so that joining them would join different units."""
    pairs = np.unique(np.stack([plane.ravel(), other.ravel()]), axis=1)
    return not all(len(np.unique(side)) == pairs.shape[1] for side in pairs)


def without(value: Labelled, axes: Collection[int]) -> Labelled:
    """Return a value without some axes of size 1."""
    stay = [axis for axis in range(len(value.shape)) if axis not in axes]

    def squeezed(shape: Sequence[int]) -> Shape:
        return tuple(shape[axis] for axis in stay)

    planes = tuple(plane.reshape(squeezed(plane.shape)) for plane in value.planes)
    return Labelled(squeezed(value.shape), planes)


def _overlapping(planes: Planes) -> list[Planes]:
    """Return the planes in groups that have no axis in common."""
    groups: list[tuple[set[int], Planes]] = []
    for number, plane in planes:
        axes, members = set(varying(plane)), [(number, plane)]
        apart = []
        for other_axes, others in groups:
            if axes & other_axes:
                axes, members = axes | other_axes, others + members
            else:
                apart.append((other_axes, others))
        groups = [*apart, (axes, members)]
    return [members for _, members in groups]


def _placed(value: Labelled, axes: str, every: str) -> Labelled:
    """Return a value with an axis for each letter of `every`; letters that it lacks have size 1."""
    order = [axes.index(letter) for letter in every if letter in axes]

    def placed(shape: Sequence[int]) -> Shape:
        return tuple(shape[axes.index(letter)] if letter in axes else 1 for letter in every)

    planes = tuple(plane.transpose(order).reshape(placed(plane.shape)) for plane in value.planes)
    return Labelled(placed(value.shape), planes)
