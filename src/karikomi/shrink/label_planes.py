"""Labels of the entries of a tensor: planes, which are small however large the tensor is.

An entry of an activation can belong to a unit, an entry of a weight to an output unit and an input
unit. Each is a plane: a tensor of labels with the rank of the tensor, of size 1 along every axis
along which the labels are the same. A tensor without labels has no plane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from karikomi.shrink.labels import Labels

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    """The shape of a tensor and its planes, each varying along axes of its own."""

    shape: Shape
    planes: tuple[np.ndarray, ...] = ()

    @property
    def axes(self) -> frozenset[int]:
        """The axes along which any label varies."""
        return frozenset(axis for plane in self.planes for axis in varying(plane))


def varying(plane: np.ndarray) -> tuple[int, ...]:
    """Return the axes of a plane along which its labels differ."""
    return tuple(axis for axis, size in enumerate(plane.shape) if size > 1)


def reduced(labels: Labels, plane: np.ndarray, reason: str) -> np.ndarray | None:
    """Return a plane with the present classes and size 1 where it can be; None if nothing varies.

    Labels that are the same everywhere are fixed: without them the tensor would be empty.
    """
    found = evened(labels.roots(plane))
    if found.size < 2:
        labels.fix(found, reason)
        return None
    return found


def evened(plane: np.ndarray) -> np.ndarray:
    """Return a plane with size 1 along the axes along which nothing varies."""
    for axis in varying(plane):
        first = part_of(plane, axis, 0, 1)
        if (plane == first).all():
            plane = first
    return plane


def part_of(plane: np.ndarray, axis: int, start: int, size: int) -> np.ndarray:
    """Return `size` indices of an axis, from `start`."""
    return plane[(slice(None),) * axis + (slice(start, start + size),)]


def resized(shape: Shape, axis: int, size: int) -> Shape:
    """Return a shape with another size of an axis."""
    return (*shape[:axis], size, *shape[axis + 1 :])


def along(labels: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Return a plane of `rank` with these labels along an axis."""
    shape = [1] * rank
    shape[axis] = -1
    return labels.reshape(shape)


def fix_axes(
    labels: Labels, plane: np.ndarray, axes: Iterable[int], reason: str
) -> np.ndarray | None:
    """Return a plane whose labels no longer vary along `axes`, since these cannot get shorter.

    What differs along them is joined; a plane that varies along nothing else is fixed.
    """
    fixed = [axis for axis in varying(plane) if axis in set(axes)]
    if not fixed:
        return plane
    if len(fixed) == len(varying(plane)):
        labels.fix(plane, reason)
        return None
    for axis in fixed:
        labels.join(part_of(plane, axis, 0, 1), plane, reason)
    return reduced(labels, plane, reason)


def moved(
    plane: np.ndarray, shape: Shape, movement: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return a plane after a movement of the data of its tensor, which is applied to the labels."""
    return narrowed(movement(np.broadcast_to(plane, shape)))


def reshaped(plane: np.ndarray, old: Shape, new: Shape) -> np.ndarray:
    """Return a plane after a reshape from `old` to `new`.

    Runs of axes that are split or merged by themselves keep size 1 where the plane does not vary.
    """
    before: list[int] = []
    after: list[int] = []
    for ones, others in _runs(old, new):
        if all(plane.shape[axis] == 1 for axis in ones):
            before += [1] * len(ones)
            after += [1] * len(others)
        else:
            before += [old[axis] for axis in ones]
            after += [new[axis] for axis in others]
    return narrowed(np.broadcast_to(plane, before).reshape(after))


def _runs(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Return the shortest runs of axes of both shapes that have equal numbers of entries."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        ones, others = ([i] if i < len(old) else []), ([j] if j < len(new) else [])
        i, j = i + len(ones), j + len(others)
        left, right = math.prod(old[a] for a in ones), math.prod(new[a] for a in others)
        while left != right:
            if left < right:
                ones, left, i = [*ones, i], left * old[i], i + 1
            else:
                others, right, j = [*others, j], right * new[j], j + 1
        if left == 1 and found and (not ones or not others):
            found[-1][0].extend(ones)
            found[-1][1].extend(others)
        else:
            found.append((ones, others))
    return found


def narrowed(plane: np.ndarray) -> np.ndarray:
    """Return a plane with size 1 along the axes along which it is broadcast."""
    for axis, (size, stride) in enumerate(zip(plane.shape, plane.strides, strict=True)):
        if size > 1 and stride == 0:
            plane = part_of(plane, axis, 0, 1)
    return plane


def aligned(plane: np.ndarray, rank: int) -> np.ndarray:
    """Return a plane with leading axes of size 1, as broadcasting adds them."""
    return plane.reshape((1,) * (rank - len(plane.shape)) + plane.shape)


def keeps(plane: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return a boolean per entry of a plane: whether it stays, given that of each label."""
    return kept[plane]


def kept_along(value: Labelled, axis: int, kept: np.ndarray) -> np.ndarray:
    """Return the sorted indices that stay along an axis."""
    stays = np.ones(value.shape[axis], bool)
    for plane in value.planes:
        if plane.shape[axis] > 1:
            others = tuple(other for other in range(len(plane.shape)) if other != axis)
            stays &= keeps(plane, kept).max(others)
    return np.flatnonzero(stays)


def is_product(value: Labelled, kept: np.ndarray) -> bool:
    """Return whether the entries that stay are all those of the kept indices of each axis."""
    if 0 in value.shape or all(len(varying(plane)) == 1 for plane in value.planes):
        return True
    stays = np.ones((1,) * len(value.shape), bool)
    for plane in value.planes:
        stays = stays & keeps(plane, kept)
    sizes = [len(kept_along(value, axis, kept)) for axis in range(len(value.shape))]
    scale = math.prod(size // small for size, small in zip(value.shape, stays.shape, strict=True))
    return int(stays.sum()) * scale == math.prod(sizes)
