"""The ways to quantize a pruned network: shared weights per tensor, or a per-channel 8-bit grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from karikomi.quantize import Coded, kmeans, uniform
from karikomi.tasks import Arrays

Stored = dict[str, np.ndarray | Coded]


def shared_weights(arrays: Arrays, names: Sequence[str], entries: int) -> dict[str, Coded]:
    """Return a codebook of at most `entries` non-zero centroids for each named tensor."""
    return {name: kmeans(arrays[name], entries=entries, name=name) for name in names}


def eight_bits(arrays: Arrays, names: Sequence[str]) -> dict[str, Coded]:
    """Return a per-channel 8-bit grid for each named tensor; one grid for a vector."""
    return {
        name: uniform(arrays[name], bits=8, axis=0 if arrays[name].ndim > 1 else None)
        for name in names
    }


def stored(arrays: Arrays, coded: Mapping[str, Coded]) -> Stored:
    """Return what goes into the file: the coded tensors, and all others as they are."""
    return {name: coded.get(name, array) for name, array in arrays.items()}


def decoded(tensors: Stored) -> Arrays:
    """Return the arrays that a reader of the file will see."""
    return {
        name: tensor.decode() if isinstance(tensor, Coded) else tensor
        for name, tensor in tensors.items()
    }
