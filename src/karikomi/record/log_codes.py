"""Norms of all tensors as 16-bit codes of their logarithms, in base64: a third of a list's size, and read at once.

Code c in 1 .. 65,534 is the norm ``2^((c - 32,768) / 256)``: from 1e-38 to 3e38, off by at most 0.14 %. Code 0 is a
norm of zero, 65,535 a non-finite one.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

PER_OCTAVE = 256
ZERO, NONFINITE = 0, 65_535
_MIDDLE = 32_768

MOST = 512
"""The largest number of codes in a row; the tensors of larger networks are pooled by module."""


def encoded(norms: np.ndarray) -> str:
    """Return the codes of norms, shape (n,), as base64 text of big-endian 16-bit numbers.

    >>> encoded(np.array([1.0, 0.0, np.inf]))
    'gAAAAP//'
    """
    norms = np.asarray(norms, np.float64)
    finite = np.isfinite(norms)
    usable = finite & (norms > 0.0)
    octaves = np.log2(np.where(usable, norms, 1.0))
    codes = np.clip(np.rint(PER_OCTAVE * octaves) + _MIDDLE, ZERO + 1, NONFINITE - 1)
    codes = np.where(usable, codes, np.where(finite, ZERO, NONFINITE))
    return base64.b64encode(codes.astype(">u2").tobytes()).decode("ascii")


def decoded(text: str) -> np.ndarray:
    """Return the codes of `encoded`, shape (n,), uint16; raises `ValueError` for other text.

    >>> decoded("gAAAAP//").tolist()
    [32768, 0, 65535]
    """
    return np.frombuffer(base64.b64decode(text, validate=True), ">u2").astype(np.uint16)


def log2_of(codes: np.ndarray) -> np.ndarray:
    """Return the base-2 logarithms of the norms, float32; ``-inf`` of zero, NaN of non-finite ones.

    >>> log2_of(np.array([32768, 33024, 0, 65535], np.uint16)).tolist()
    [0.0, 1.0, -inf, nan]
    """
    octaves = (codes.astype(np.float32) - _MIDDLE) / PER_OCTAVE
    octaves[codes == ZERO] = -math.inf
    octaves[codes == NONFINITE] = math.nan
    return octaves


def codes_of(norms: np.ndarray) -> np.ndarray:
    """Return the codes of norms as numbers, in the shape of `norms`."""
    shape = np.shape(norms)
    return decoded(encoded(np.ravel(norms))).reshape(shape)


def pools(names: Sequence[str], most: int = MOST) -> dict[str, list[int]]:
    """Return label -> places of the names in it, at most `most` of them, in the order of the names.

    The names themselves where they are few enough; else the longest prefixes (modules) that are few
    enough, as ``encoder.layers.0.*``; and as a last resort runs of neighbours, ``first .. last``.

    >>> pools(["a.w", "a.b", "c.w"], most=2)
    {'a.*': [0, 1], 'c.*': [2]}
    """
    if len(names) <= most:
        return {name: [place] for place, name in enumerate(names)}
    parts = [name.split(".") for name in names]
    for depth in range(max(map(len, parts)) - 1, 0, -1):
        found: dict[str, list[int]] = {}
        for place, own in enumerate(parts):
            label = ".".join(own[:depth]) + (".*" if len(own) > depth else "")
            found.setdefault(label, []).append(place)
        if len(found) <= most:
            return found
    size = math.ceil(len(names) / most)
    runs = [[*own] for _, own in groupby(range(len(names)), key=lambda place: place // size)]
    return {f"{names[own[0]]} .. {names[own[-1]]}": own for own in runs}


class Pooling:
    """The pools of a set of tensors, found once; the norms of a step are joined by them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        found = pools(self.names)
        self.labels = list(found)
        self._places = None if len(found) == len(names) else list(found.values())

    def codes(self, norms: Mapping[str, float]) -> str:
        """Return the codes of the pools' joint norms."""
        values = np.fromiter(norms.values(), np.float64, len(norms))
        if self._places is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                values = np.array([math.hypot(*values[own]) for own in self._places])
        return encoded(values)
