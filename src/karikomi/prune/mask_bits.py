"""Masks at rest: one bit per weight, so that a checkpoint of masks stays small."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from karikomi.errors import InvalidArgument


def pack_mask(mask: np.ndarray) -> np.ndarray:
    """Return a boolean array as bytes: eight weights each, C order, the first in the highest bit.

    `mask`: bool, any shape, else `InvalidArgument`. The answer is uint8 of shape (ceil(size / 8),).

    >>> pack_mask(np.array([True, False, True])).tolist()
    [160]
    """
    if mask.dtype != np.bool_:
        raise InvalidArgument("a mask is boolean", where="pack_mask", got=mask.dtype)
    return np.packbits(mask)


def unpack_mask(packed: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the boolean array of `shape` that `pack_mask` made these bytes of.

    Raises `InvalidArgument` for a number of bytes that does not belong to the shape, and for
    anything but zeros behind the last weight.

    >>> unpack_mask(np.array([160], np.uint8), (3, 1)).ravel().tolist()
    [True, False, True]
    """
    size = math.prod(shape)
    if packed.dtype != np.uint8 or packed.shape != (-(-size // 8),) or min(shape, default=0) < 0:
        raise InvalidArgument(
            "the packed mask does not fit its shape",
            where="unpack_mask",
            got=f"{packed.dtype} {packed.shape} for {tuple(shape)}",
            allowed=f"uint8 ({-(-size // 8)},)",
        )
    flat = np.unpackbits(packed)
    if flat[size:].any():
        raise InvalidArgument("there are bits behind the last weight", where="unpack_mask")
    return flat[:size].astype(np.bool_).reshape(shape)
