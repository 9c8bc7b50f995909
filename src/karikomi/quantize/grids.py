"""Grids, which give integer codes their values, and a tensor of codes together with its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import InvalidArgument

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
        _require_vector(self.scale, "scale", "UniformGrid")
        if type(self.bits) is not int or not LEAST_BITS <= self.bits <= MOST_BITS:
            raise InvalidArgument(
                "bits out of range",
                where="UniformGrid",
                got=self.bits,
                allowed=f"an integer in {LEAST_BITS}..{MOST_BITS}",
            )
        if self.axis is not None and (type(self.axis) is not int or self.axis < 0):
            raise InvalidArgument(
                "axis out of range",
                where="UniformGrid",
                got=self.axis,
                allowed="None or an integer >= 0",
            )
        if type(self.groups) is not int or self.groups < 1 or (self.groups > 1 and not self.axis):
            raise InvalidArgument(
                "groups are of the first axis, and need another one for the scales",
                where="UniformGrid",
                got=f"groups {self.groups}, axis {self.axis}",
            )
        if self.axis is None and self.scale.size != 1:
            raise InvalidArgument(
                "a grid without axis has one scale",
                where="UniformGrid",
                got=f"{self.scale.size} scales",
            )
        if not bool(np.all(self.scale >= SMALLEST_SCALE)):
            raise InvalidArgument(
                "every scale must be positive and not subnormal",
                where="UniformGrid",
                got=float(np.min(self.scale)),
                allowed=f">= {SMALLEST_SCALE:.4g}",
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
            if self.axis >= codes.ndim:
                raise InvalidArgument(
                    "the grid's axis is not in the tensor",
                    where="Coded",
                    got=f"axis {self.axis} of a tensor of rank {codes.ndim}",
                )
            if self.groups > 1 and codes.shape[0] % self.groups:
                raise InvalidArgument(
                    "the first axis does not split into the groups",
                    where="Coded",
                    got=f"{codes.shape[0]} indices, {self.groups} groups",
                )
            if self.scale.size != self.groups * codes.shape[self.axis]:
                raise InvalidArgument(
                    "one scale is needed per index of the axis, in each group",
                    where="Coded",
                    got=f"{self.scale.size} scales",
                    allowed=self.groups * codes.shape[self.axis],
                )
        _require_range(codes, -self.limit, self.limit)

    def decode(self, codes: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return ``scale * code`` in float32, in the shape of `codes`: one rounding per weight."""
        split, units = split_units(codes.shape, self.axis, self.groups)
        parts = codes.astype(np.float32).reshape(split)
        return (parts * self.scale.reshape(units)).reshape(codes.shape)


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
        _require_vector(self.values, "values", "Codebook")
        if not 1 <= self.values.size <= MOST_VALUES:
            raise InvalidArgument(
                "wrong number of values",
                where="Codebook",
                got=self.values.size,
                allowed=f"1..{MOST_VALUES}",
            )
        if self.values[0] != 0 or np.signbit(self.values[0]):
            raise InvalidArgument(
                "the first value must be 0.0", where="Codebook", got=float(self.values[0])
            )

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
        _require_range(codes, 0, self.values.size - 1)

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
        if not isinstance(self.grid, Grid):
            raise InvalidArgument(
                "this is not a grid",
                where="Coded",
                got=type(self.grid).__name__,
                allowed="such as UniformGrid or Codebook",
            )
        self.grid.check(self.codes)

    @property
    def shape(self) -> Shape:
        """The shape of the tensor."""
        return self.codes.shape

    def decode(self) -> NDArray[np.float32]:
        """Return the float32 values of the codes."""
        return self.grid.decode(self.codes)


def split_units(shape: Shape, axis: int | None, groups: int) -> tuple[Shape, Shape]:
    """Return a tensor's shape with its first axis split into groups, and the shape of its scales there.

    >>> split_units((6, 5, 3), 1, 2), split_units((6, 5), None, 1)
    (((2, 3, 5, 3), (2, 1, 5, 1)), ((6, 5), (1, 1)))
    """
    if axis is None:
        return shape, (1,) * len(shape)
    split = (groups, shape[0] // groups, *shape[1:])
    return split, tuple(n if i in (0, axis + 1) else 1 for i, n in enumerate(split))


def _require_vector(array: object, what: str, where: str) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 1:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array)
        raise InvalidArgument(f"{what} must be a float32 array of rank 1", where=where, got=got)
    if not bool(np.all(np.isfinite(array))):
        raise InvalidArgument(f"{what} must be finite", where=where, got="NaN or infinity")


def _require_range(codes: NDArray[np.integer], low: int, high: int) -> None:
    if codes.size and (int(codes.min()) < low or int(codes.max()) > high):
        raise InvalidArgument(
            "codes outside of the grid",
            where="Coded",
            got=f"{codes.min()}..{codes.max()}",
            allowed=f"{low}..{high}",
        )
