"""How each kind of grid is written to a packed file: one registered entry per kind.

In the manifest a grid is ``[kind, *parameters]``; its floats precede the codec's table.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import InvalidArgument
from karikomi.pack.codecs import planes
from karikomi.pack.codecs.cursor import Cursor
from karikomi.quantize.affine import AffineGrid, scales_of
from karikomi.quantize.grids import (
    LEAST_BITS,
    MOST_BITS,
    MOST_VALUES,
    Codebook,
    Grid,
    Shape,
    UniformGrid,
)
from karikomi.quantize.octave_grid import HIGHEST, LOWEST, MOST_PER_OCTAVE, OctaveGrid
from karikomi.quantize.units import OutputUnits

FLOAT = np.dtype("<f4")


class GridCodec(Protocol):
    """An entry. `parameters` come from a file: nothing may rely on them before `is_valid`."""

    kind: ClassVar[str]
    grid: ClassVar[type]

    def parameters(self, grid: Any) -> list:
        """Return the integers (or ``None``) that the manifest lists after the kind."""
        ...

    def numbers(self, grid: Any) -> NDArray:
        """Return the floats that are stored in the tables."""
        ...

    def is_valid(self, parameters: list, shape: Shape) -> bool:
        """Return whether the parameters are well-formed for a tensor of this shape."""
        ...

    def count(self, parameters: list, shape: Shape) -> int:
        """Return the number of stored floats."""
        ...

    def make(self, parameters: list, numbers: NDArray) -> Grid:
        """Return the grid of parameters and stored floats."""
        ...

    def text(self, parameters: list) -> str:
        """Return the grid in a few words."""
        ...

    def minor_version(self, parameters: list) -> int:
        """Return the first minor version of the format that has such a grid."""
        ...


GRID_CODECS: dict[str, GridCodec] = {}

C = TypeVar("C", bound=type)


def register_grid(codec: C) -> C:
    """Register the codec of a kind of grid, a class without arguments."""
    GRID_CODECS[codec.kind] = codec()
    return codec


@register_grid
class _Uniform:
    kind, grid = "uniform", UniformGrid

    def parameters(self, grid: UniformGrid) -> list:
        return [grid.bits, grid.axis, *([grid.groups] if grid.groups > 1 else [])]

    def numbers(self, grid: UniformGrid) -> NDArray:
        return grid.scale

    def is_valid(self, parameters: list, shape: Shape) -> bool:
        match parameters:
            case [bits, axis, *groups] if type(bits) is int and LEAST_BITS <= bits <= MOST_BITS:
                if axis is None:
                    return not groups
                if type(axis) is not int or not 0 <= axis < len(shape):
                    return False
                if not groups:
                    return True
                whole = len(groups) == 1 and type(groups[0]) is int and groups[0] > 1
                return whole and axis > 0 and not shape[0] % groups[0]
        return False

    def count(self, parameters: list, shape: Shape) -> int:
        _, axis, *groups = parameters
        return 1 if axis is None else shape[axis] * (groups[0] if groups else 1)

    def make(self, parameters: list, numbers: NDArray) -> UniformGrid:
        bits, axis, *groups = parameters
        return UniformGrid(numbers, axis, bits, *groups)

    def text(self, parameters: list) -> str:
        bits, axis, *groups = parameters
        where = "" if axis is None else f", axis {axis}"
        return f"uniform {bits} bits{where}" + (f" of {groups[0]} groups" if groups else "")

    def minor_version(self, parameters: list) -> int:
        return 1 if len(parameters) > 2 else 0


@register_grid
class _Codebook:
    kind, grid = "codebook", Codebook

    def parameters(self, grid: Codebook) -> list:
        return [grid.values.size - 1]

    def numbers(self, grid: Codebook) -> NDArray:
        return grid.values[1:]

    def is_valid(self, parameters: list, shape: Shape) -> bool:
        match parameters:
            case [entries]:
                return type(entries) is int and 0 <= entries < MOST_VALUES
        return False

    def count(self, parameters: list, shape: Shape) -> int:
        return parameters[0]

    def make(self, parameters: list, numbers: NDArray) -> Codebook:
        return Codebook(np.concatenate([np.zeros(1, np.float32), numbers]))

    def text(self, parameters: list) -> str:
        return f"codebook {parameters[0]}"

    def minor_version(self, parameters: list) -> int:
        return 0


@register_grid
class _Affine:
    kind, grid = "affine", AffineGrid

    def parameters(self, grid: AffineGrid) -> list:
        return [grid.bits, grid.units.axis, grid.units.groups, grid.group]

    def numbers(self, grid: AffineGrid) -> NDArray:
        return grid.numbers

    def is_valid(self, parameters: list, shape: Shape) -> bool:
        match parameters:
            case [int(bits), int() | None as axis, int(groups), int() | None as group]:
                if bool in map(type, parameters) or not LEAST_BITS <= bits <= MOST_BITS:
                    return False
                placed = (axis is None or axis >= 0) and groups >= 1
                some = group is None or group >= 1
                return placed and some and OutputUnits(axis, groups).fit(shape)
        return False

    def count(self, parameters: list, shape: Shape) -> int:
        _, axis, groups, group = parameters
        return 2 * scales_of(shape, OutputUnits(axis, groups), group)

    def make(self, parameters: list, numbers: NDArray) -> AffineGrid:
        bits, axis, groups, group = parameters
        scale, zero = np.split(numbers, 2)
        return AffineGrid(scale, zero, OutputUnits(axis, groups), bits, group)

    def text(self, parameters: list) -> str:
        bits, axis, groups, group = parameters
        place = f", axis {axis}" if axis is not None else ""
        place += f" of {groups} groups" if groups > 1 else ""
        return f"affine {bits} bits{place}" + (f", {group} weights a scale" if group else "")

    def minor_version(self, parameters: list) -> int:
        return 3


@register_grid
class _Octaves:
    kind, grid = "octaves", OctaveGrid

    def parameters(self, grid: OctaveGrid) -> list:
        return [grid.per_octave, grid.lowest, grid.largest]

    def numbers(self, grid: OctaveGrid) -> NDArray:
        return grid.numbers

    def is_valid(self, parameters: list, shape: Shape) -> bool:
        match parameters:
            case [int(per_octave), int(lowest), int(largest)]:
                if bool in map(type, parameters) or not 1 <= per_octave <= MOST_PER_OCTAVE:
                    return False
                top = lowest + max(largest - 1, 0) // per_octave
                return LOWEST <= lowest and top <= HIGHEST and 0 <= largest < MOST_VALUES
        return False

    def count(self, parameters: list, shape: Shape) -> int:
        return 0

    def make(self, parameters: list, numbers: NDArray) -> OctaveGrid:
        return OctaveGrid(*parameters)

    def text(self, parameters: list) -> str:
        return f"{parameters[0]} values per octave"

    def minor_version(self, parameters: list) -> int:
        return 3


def codec_of(grid: Grid) -> GridCodec:
    """Return the codec of a grid's class; a grid without one cannot be packed."""
    for codec in GRID_CODECS.values():
        if type(grid) is codec.grid:
            return codec
    raise InvalidArgument("this kind of grid cannot be packed", got=type(grid).__name__)


def grid_spec(grid: Grid | None) -> list | None:
    """Return the manifest's entry of a grid: its kind and its parameters."""
    if grid is None:
        return None
    codec = codec_of(grid)
    return [codec.kind, *codec.parameters(grid)]


def write_grid(grid: Grid | None) -> bytes:
    """Return the bytes of a grid's floats."""
    return b"" if grid is None else planes.write(codec_of(grid).numbers(grid).astype(FLOAT))


def read_grid(cursor: Cursor, spec: list | None, shape: Shape) -> Grid | None:
    """Return the grid of a manifest's entry, its floats taken from `cursor`."""
    if spec is None:
        return None
    codec, parameters = GRID_CODECS[spec[0]], spec[1:]
    numbers = planes.read(cursor, codec.count(parameters, shape), FLOAT)
    return codec.make(parameters, numbers.astype(np.float32))


def grid_numbers(spec: list | None, shape: Shape) -> int:
    """Return how many floats are stored for a grid."""
    return 0 if spec is None else GRID_CODECS[spec[0]].count(spec[1:], shape)
