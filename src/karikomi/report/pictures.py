"""Small pictures of inputs and attributions inside of drawings, as PNG in the page itself."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
from markupsafe import Markup

from karikomi.report.drawing import pixel

SIDE = 92.0
"""The width of a picture, and the most height."""

_MOST_POINTS = 96
_STRIP = 14.0
# Blue and orange that are seen on white and on black.
_FOR, _AGAINST = (0, 114, 178), (213, 94, 0)


def picture(
    values: Any, left: float, top: float, *, signed: bool = False
) -> tuple[Markup, float] | None:
    """Return a picture of an array and its height; None for arrays that have no form.

    Images (channels first or last) are in colour or grey, from their smallest to their largest value; `signed` values
    blue above and orange below zero, fainter towards zero. Squares that were flattened are images again; anything else
    of one or two axes is drawn as strips.
    """
    array = _image_of(np.asarray(values, float))
    if array is None:
        return None
    rows, columns = array.shape[:2]
    array = array[np.ix_(_thinned(rows), _thinned(columns))]
    wide = columns > 4 * rows
    tall = min(_STRIP * rows, SIDE) if wide else SIDE * min(rows / columns, 1.0)
    shown = _signed(array) if signed else _plain(array)
    data = base64.b64encode(png(shown)).decode("ascii")
    drawn = Markup(
        '<image x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none"'
        ' href="data:image/png;base64,{}"/>'
    )
    return drawn.format(
        pixel(left), pixel(top), pixel(SIDE * min(columns / rows, 1.0)), pixel(tall), data
    ), tall


def png(colours: np.ndarray) -> bytes:
    """Return a PNG of colours with opacity, uint8 (height, width, 4).

    >>> png(np.zeros((1, 1, 4), np.uint8))[1:4]
    b'PNG'
    """
    height, width = colours.shape[:2]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), colours.reshape(height, -1)], axis=1)
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _image_of(array: np.ndarray) -> np.ndarray | None:
    """Return an array (height, width, 1 or 3); None for one of another form."""
    if array.ndim == 1 and array.size:
        side = round(float(np.sqrt(array.size)))
        array = array.reshape(side, side) if side * side == array.size and side > 3 else array[None]
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 2:
        array = array[:, :, None]
    return array if array.ndim == 3 and array.size and array.shape[2] in (1, 3) else None


def _plain(array: np.ndarray) -> np.ndarray:
    low = array.min(axis=(0, 1))
    spread = np.maximum(array.max(axis=(0, 1)) - low, 1e-12)
    colours = np.broadcast_to((array - low) / spread, (*array.shape[:2], 3))
    return _bytes(np.concatenate([colours, np.ones((*array.shape[:2], 1))], axis=2))


def _signed(array: np.ndarray) -> np.ndarray:
    plane = array.sum(axis=2)
    plane = plane / (float(np.abs(plane).max()) or 1.0)
    colours = np.where(plane[:, :, None] >= 0, _FOR, _AGAINST) / 255.0
    return _bytes(np.concatenate([colours, np.abs(plane)[:, :, None]], axis=2))


def _bytes(shares: np.ndarray) -> np.ndarray:
    return np.rint(255.0 * np.clip(shares, 0.0, 1.0)).astype(np.uint8)


def _thinned(size: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(size, _MOST_POINTS)).astype(int))
