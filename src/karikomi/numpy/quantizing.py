"""Quantize trees of weights held as NumPy arrays, and decode them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from karikomi import tree
from karikomi.functional.quantizing import codes_of_arrays, decoded
from karikomi.functional.unit_axes import UnitAxes
from karikomi.quantize import Coded
from karikomi.selection.array_arguments import wide

WHERE = "numpy.quantize"


def quantize(
    weights: Any,
    *,
    bits: int | None = None,
    entries: int | None = None,
    method: Any = None,
    unit_axes: UnitAxes | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Any:
    """Return the tree with codes and grids (`karikomi.quantize.Coded`) in place of arrays; the input is left alone.

    `weights`: any tree of dicts, lists, tuples and named tuples of arrays, also of the bfloat16 and float8 of
    ``ml_dtypes``. `bits` (2..16): a symmetric uniform grid, ``code = round(w / scale)``, ``scale = max|w| /
    (2**(bits-1) - 1)``. `entries`: a codebook of so many non-zero values per array by 1-D k-means. Exactly one of
    the two. `method`: a registered quantizer, by name or as an object, that needs no data; by default ``"uniform"``
    and ``"kmeans"``. `unit_axes`: name
    or glob -> the axis whose indices have scales of their own, or the axes that together name one output unit, such as
    ``{"*kernel": -1}``; other arrays have one scale. It is never guessed from rank. `only`, `exclude`: globs over the
    names of arrays (default: all floating ones, biases too). Other leaves, arrays of integers and `Coded` among
    them, stay as they are; so do zeros.

    ``kk.save(tree, path)`` stores the codes under the names of the leaves (``layers.0.weight``); `decode` returns the
    arrays.

    Raises `InvalidArgument` for a tree, a width or an axis, or for both or none of `bits` and `entries`, `UnknownName`
    for a method or glob, `Unsupported` if no leaf is a floating array, `NonFinite` naming an array.

    >>> import numpy as np
    >>> coded = quantize({"dense": {"kernel": np.float32([[1.5, 0.2], [-0.5, 0.0]])}}, bits=3)
    >>> coded["dense"]["kernel"].codes.tolist(), decode(coded)["dense"]["kernel"].tolist()
    ([[3, 0], [-1, 0]], [[1.5, 0.0], [-0.5, 0.0]])

    Source: max-abs calibration as in ONNX Runtime and NNCF; codebooks after Han, Mao and Dally 2016.
    """
    weights = tree.collected(weights)
    leaves = tree.flatten(weights, where=WHERE)
    coded = codes_of_arrays(
        {name: np.asarray(leaf) for name, leaf in leaves.items() if _is_floating(leaf)},
        bits=bits,
        entries=entries,
        method=method,
        unit_axes=unit_axes,
        only=only,
        exclude=exclude,
        where=WHERE,
    )
    return tree.unflatten(weights, leaves | coded, where=WHERE)


def decode(weights: Any, *, like: Any = None) -> Any:
    """Return the tree with arrays in place of codes: float32, or of the types in `like`, a tree of the same names.

    `weights`: what `quantize` returned; leaves without codes stay as they are. Raises `InvalidArgument` for a tree
    that is none, and for a `like` without one of its names.

    >>> import numpy as np
    >>> weights = [np.float64([0.25, -1.0])]
    >>> [array.dtype.name for array in decode(quantize(weights, bits=8), like=weights)]
    ['float64']
    """
    where = "numpy.decode"
    leaves = tree.flatten(weights, where=where)
    types = None if like is None else tree.flatten(like, where=where)
    arrays = {
        name: decoded(leaf, name, types, where=where) if isinstance(leaf, Coded) else leaf
        for name, leaf in leaves.items()
    }
    return tree.unflatten(weights, arrays, where=where)


def _is_floating(leaf: Any) -> bool:
    floats = isinstance(leaf, np.ndarray | np.generic)
    return floats and wide(np.asarray(leaf)).dtype.kind in "fc"
