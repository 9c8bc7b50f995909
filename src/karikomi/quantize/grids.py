"""Grids, which give integer codes their values, and a tensor of codes together with its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import InvalidArgument, check

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
LEAST_BITS, MOST_BITS = 2, 16
MOST_VALUES = 2**16

Shape = tuple[int, ...]


@runtime_checkable
class Grid(Protocol):
    """The values of integer codes; `karikomi.pack.grid_codec` has an entry for each kind."""

    @property
    def bits(self) -> int:
        """Bits of a code at a fixed width."""
        ...

    @property
    def numbers(self) -> NDArray[np.float32]:
        """The grid's floats: its scales, or its values."""
        ...

    @property
    def code_dtype(self) -> np.dtype[np.integer]:
        """The narrowest integer type that holds every code."""
        ...

    def check(self, codes: NDArray[np.integer]) -> None:
        """Raise `InvalidArgument` where `codes` do not fit this grid."""
        ...

    def decode(self, codes: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return the values of `codes`, float32 in their shape."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class UniformGrid:
    """Evenly spaced values around an exact zero: ``w = scale * code``.

    Symmetric, zero point 0, narrow range: codes lie in ``[-(2**(bits-1) - 1), 2**(bits-1) - 1]``.
    `scale` is float32 of shape ``(C,)``, one per index of `axis`, or ``(1,)`` with `axis` ``None``;
    each is finite and at least 2**-126 (a subnormal scale decodes to other numbers where the
    hardware flushes subnormals to zero). `bits` is in 2..16. `groups`: the first axis (which is not
    `axis` then) splits into so many equal parts with scales of their own, ``(groups * C,)`` in all.
    Raises `InvalidArgument`.

    >>> UniformGrid(np.float32([0.5]), axis=None, bits=4).decode(np.int8([-7, 0, 3])).tolist()
    [-3.5, 0.0, 1.5]

    Source: the symmetric per-channel convention of ONNX Runtime, NNCF and LiteRT.
    """

    scale: NDArray[np.float32]
    axis: int | None
    bits: int
    groups: int = 1

    def __post_init__(self) -> None:
        check_vector(self.scale, "scale", "UniformGrid")
        check_bits(self.bits, "UniformGrid")
        axis, groups, scales = self.axis, self.groups, self.scale.size
        placed = axis is None or (type(axis) is int and axis >= 0)
        split = type(groups) is int and (groups == 1 or (groups > 1 and axis))
        single = axis is not None or scales == 1
        smallest = float(np.min(self.scale, initial=np.inf))
        needs = "groups are of the first axis, and need another one for the scales"
        check(
            "UniformGrid",
            (placed, "axis out of range", axis, "None or an integer >= 0"),
            (split, needs, f"groups {groups}, axis {axis}", None),
            (single, "a grid without axis has one scale", f"{scales} scales", None),
            (
                smallest >= SMALLEST_SCALE,
                "every scale must be positive and not subnormal",
                smallest,
                f">= {SMALLEST_SCALE:.4g}",
            ),
        )

    @property
    def limit(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def numbers(self) -> NDArray[np.float32]:
        """The scales."""
        return self.scale

    @property
    def code_dtype(self) -> np.dtype[np.integer]:
        """The narrowest integer type that holds every code."""
        return np.dtype("<i1" if self.bits <= 8 else "<i2")

    def check(self, codes: NDArray[np.integer]) -> None:
        """Raise `InvalidArgument` where `codes` do not fit this grid."""
        if self.axis is not None:
            axis, groups, rank = self.axis, self.groups, codes.ndim
            got = f"axis {axis} of a tensor of rank {rank}"
            check("Coded", (axis < rank, "the grid's axis is not in the tensor", got, None))
            got, scales = f"{codes.shape[0]} indices, {groups} groups", groups * codes.shape[axis]
            fits, what = (
                codes.shape[0] % groups == 0,
                "the first axis does not split into the groups",
            )
            per_index = "one scale is needed per index of the axis, in each group"
            check(
                "Coded",
                (fits, what, got, None),
                (self.scale.size == scales, per_index, f"{self.scale.size} scales", scales),
            )
        check_range(codes, -self.limit, self.limit)

    def scale_of(self, shape: Shape) -> NDArray[np.float32]:
        """Return the scale of each entry of a tensor, of its shape."""
        split, units = split_units(shape, self.axis, self.groups)
        return np.broadcast_to(self.scale.reshape(units), split).reshape(shape)

    def decode(self, codes: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return ``scale * code`` in float32, in the shape of `codes`: one rounding per weight."""
        split, units = split_units(codes.shape, self.axis, self.groups)
        parts = codes.astype(np.float32).reshape(split)
        # The product of arrays without axes is a number, not an array.
        return np.asarray(parts * self.scale.reshape(units)).reshape(codes.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """A list of values, code 0 being the exact zero: ``w = values[code]``.

    `values` is float32 of shape ``(K + 1,)``, finite; ``values[0]`` is 0.0 so that a pruned weight
    stays pruned and has a symbol of its own. At most 65,536 values. Raises `InvalidArgument`.

    >>> Codebook(np.float32([0.0, -1.0, 0.5])).decode(np.uint8([0, 2, 1])).tolist()
    [0.0, 0.5, -1.0]

    Source: Han, Mao, Dally, "Deep Compression", ICLR 2016; the fixed zero is our addition.
    """

    values: NDArray[np.float32]

    def __post_init__(self) -> None:
        check_vector(self.values, "values", "Codebook")
        size = self.values.size
        fits = 1 <= size <= MOST_VALUES
        check("Codebook", (fits, "wrong number of values", size, f"1..{MOST_VALUES}"))
        first = float(self.values[0])
        zero = first == 0 and not np.signbit(first)
        check("Codebook", (zero, "the first value must be 0.0", first, None))

    @property
    def bits(self) -> int:
        """Bits of a code at a fixed width."""
        return max((self.values.size - 1).bit_length(), 1)

    @property
    def numbers(self) -> NDArray[np.float32]:
        """The values, with the zero."""
        return self.values

    @property
    def code_dtype(self) -> np.dtype[np.integer]:
        """The narrowest integer type that holds every code."""
        return np.dtype("<u1" if self.values.size <= 256 else "<u2")

    def check(self, codes: NDArray[np.integer]) -> None:
        """Raise `InvalidArgument` where `codes` do not fit this codebook."""
        check_range(codes, 0, self.values.size - 1)

    def decode(self, codes: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return ``values[codes]``, float32 in the shape of `codes`."""
        return np.asarray(self.values[codes], dtype=np.float32).reshape(codes.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A quantized tensor: integer codes in the tensor's own shape, and the grid they refer to.

    `codes` is any integer array whose values fit `grid`. Raises `InvalidArgument` otherwise.

    >>> coded = Coded(np.int8([[2, 0], [0, -1]]), UniformGrid(np.float32([0.5]), None, 8))
    >>> coded.decode().tolist()
    [[1.0, 0.0], [0.0, -0.5]]
    >>> coded.shape
    (2, 2)
    """

    codes: NDArray[np.integer]
    grid: Grid

    def __post_init__(self) -> None:
        if not isinstance(self.codes, np.ndarray) or self.codes.dtype.kind not in "iu":
            kind = getattr(self.codes, "dtype", type(self.codes).__name__)
            raise InvalidArgument("codes must be an integer array", where="Coded", got=kind)
        known, got = isinstance(self.grid, Grid), type(self.grid).__name__
        check("Coded", (known, "not a grid", got, "such as UniformGrid or Codebook"))
        self.grid.check(self.codes)

    @property
    def shape(self) -> Shape:
        """The shape of the tensor."""
        return self.codes.shape

    def decode(self) -> NDArray[np.float32]:
        """Return the float32 values of the codes."""
        return self.grid.decode(self.codes)


def check_bits(bits: object, where: str) -> None:
    """Raise `InvalidArgument` unless a uniform grid can have this width."""
    good = type(bits) is int and LEAST_BITS <= bits <= MOST_BITS
    check(where, (good, "bits out of range", bits, f"an integer in {LEAST_BITS}..{MOST_BITS}"))


def split_units(shape: Shape, axis: int | None, groups: int) -> tuple[Shape, Shape]:
    """Return a tensor's shape with its first axis split into groups, and the shape of its scales there.

    >>> split_units((6, 5, 3), 1, 2), split_units((6, 5), None, 1)
    (((2, 3, 5, 3), (2, 1, 5, 1)), ((6, 5), (1, 1)))
    """
    if axis is None:
        return shape, (1,) * len(shape)
    split = (groups, shape[0] // groups, *shape[1:])
    return split, tuple(n if i in (0, axis + 1) else 1 for i, n in enumerate(split))


def check_vector(array: object, what: str, where: str) -> None:
    """Raise `InvalidArgument` unless this is a float32 array of rank 1 with finite entries."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 1:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array)
        raise InvalidArgument(f"{what} must be a float32 array of rank 1", where=where, got=got)
    if not bool(np.all(np.isfinite(array))):
        raise InvalidArgument(f"{what} must be finite", where=where, got="NaN or infinity")


def check_range(codes: NDArray[np.integer], low: int, high: int) -> None:
    """Raise `InvalidArgument` for codes outside of a range, both ends inside."""
    if codes.size:
        least, most = int(codes.min()), int(codes.max())
        inside, got = low <= least and most <= high, f"{least}..{most}"
        check("Coded", (inside, "codes outside of the grid", got, f"{low}..{high}"))
