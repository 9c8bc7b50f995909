"""The ways to quantize a pruned network: shared weights per tensor, or a per-channel 8-bit grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from karikomi.quantize import Coded, OutputUnits, quantizer_for
from karikomi.tasks import Arrays

Stored = dict[str, np.ndarray | Coded]


def shared_weights(arrays: Arrays, names: Sequence[str], entries: int) -> dict[str, Coded]:
    """Return a codebook of at most `entries` non-zero centroids for each named tensor."""
    quantize = quantizer_for(entries=entries, where="shared_weights")
    return {name: quantize(arrays[name], units=OutputUnits(), name=name) for name in names}


def eight_bits(
    arrays: Arrays, names: Sequence[str], units: Mapping[str, OutputUnits]
) -> dict[str, Coded]:
    """Return an 8-bit grid for each named tensor: one scale per output unit, or one where it has none."""
    quantize = quantizer_for(bits=8, where="eight_bits")
    return {
        name: quantize(arrays[name], units=units.get(name, OutputUnits()), name=name)
        for name in names
    }


def stored(arrays: Arrays, coded: Mapping[str, Coded]) -> Stored:
    """Return the tensors of the file: the coded ones, and all others unchanged."""
    return {name: coded.get(name, array) for name, array in arrays.items()}


def decoded(tensors: Stored) -> Arrays:
    """Return the arrays that are read back from the file."""
    return {
        name: tensor.decode() if isinstance(tensor, Coded) else tensor
        for name, tensor in tensors.items()
    }
