"""The saving of each step of compression: the same tensor in fixed-width storage after each of them.

Fixed-width storage is Deep Compression's (Han, Mao and Dally 2016, section 2 and 3): a value and the
gap to the one before it, both of fixed width, with a filler entry wherever a gap is too long.
"""

from __future__ import annotations

import math

import numpy as np

from karikomi.quantize import Coded


def fixed_width_bytes(kept: np.ndarray, value_bits: int) -> int:
    """Return the bytes of a tensor whose `kept` entries take `value_bits` each, without entropy coding.

    The smaller of dense storage and gap-coded storage at the best gap width.
    """
    dense = kept.size * value_bits
    places = np.flatnonzero(kept)
    gaps = np.diff(places, prepend=-1) - 1
    best = dense
    for width in range(1, 17):
        fillers = int(np.sum(gaps >> width))
        best = min(best, (len(places) + fillers) * (width + value_bits))
    return math.ceil(best / 8)


def bytes_by_cause(tensor: np.ndarray | Coded, packed: int, *, bits: int = 32) -> dict[str, int]:
    """Return the bytes of one tensor: dense, pruned, quantized, and as it was packed (with its tables).

    `bits`: of a number of a coded tensor before.
    """
    if not isinstance(tensor, Coded):
        kept = tensor != 0
        bits = 8 * tensor.dtype.itemsize
        pruned = fixed_width_bytes(kept, bits)
        return {"dense": tensor.nbytes, "pruned": pruned, "quantized": pruned, "packed": packed}
    kept = tensor.codes != 0
    quantized = fixed_width_bytes(kept, tensor.grid.bits) + tensor.grid.numbers.nbytes
    return {
        "dense": math.ceil(bits * kept.size / 8),
        "pruned": fixed_width_bytes(kept, bits),
        "quantized": quantized,
        "packed": packed,
    }
