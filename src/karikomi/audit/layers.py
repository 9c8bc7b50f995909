"""Where damage begins: the alignment of each layer's outputs in two networks, in the order of the forward pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from karikomi.audit.representation import alignment
from karikomi.tasks import Arrays, Runner, Split

MOST_EXAMPLES = 256
MOST_FEATURES = 16_384
BATCH = 128


def layer_rows(
    runner: Runner, pair: tuple[Arrays, Arrays], split: Split, *, most: int = MOST_EXAMPLES
) -> list[dict[str, Any]]:
    """Return layer -> CKA of its outputs, for the layers that both networks have; None where they do not vary."""
    some = split.take(np.arange(min(len(split), most)))
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for start in range(0, len(some), BATCH):
        part = some.take(np.arange(start, min(start + BATCH, len(some))))
        first, second = (runner.layer_outputs(arrays, part.inputs) for arrays in pair)
        for name in first:
            if name in second and len(first[name]) == len(part) == len(second[name]):
                pairs = found.setdefault(name, [])
                pairs.append((_thinned(first[name]), _thinned(second[name])))
    rows = []
    for name, pairs in found.items():
        value = alignment(pairs)
        rows.append({"layer": name, "cka": value if math.isfinite(value) else None})
    return rows


def _thinned(values: np.ndarray) -> np.ndarray:
    """Return the features of each example, evenly thinned where there are very many."""
    flat = values.reshape(len(values), -1)
    step = -(-flat.shape[1] // MOST_FEATURES)
    return flat[:, ::step]
