"""What both networks cost: bytes of their files, numbers that are not zero, time and memory of a forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from karikomi.tasks import Arrays, Runner

ROUNDS = 3
EXAMPLES = 64
"""Validation examples of a forward pass, at most."""


def costs(
    runner: Runner, pair: tuple[Arrays, Arrays], sizes: tuple[int, int] | None
) -> dict[str, Any] | None:
    """Return ``bytes``, ``numbers``, ``nonzero``, ``milliseconds`` and ``memory``, each for both; None without `sizes`.

    ``memory``: the most bytes of tensors that a forward pass has at once, as `compress` measures it; its entries are
    None where the operators of a network cannot be observed.

    Times are the least of three rounds that take turns, of up to 64 validation examples in dense arithmetic:
    zeros and few values save no time there, only ``same_shapes`` being false can.
    """
    if sizes is None:
        return None
    rounds = [[runner.milliseconds(arrays) for arrays in pair] for _ in range(ROUNDS)]
    return {
        "bytes": list(sizes),
        "numbers": [sum(array.size for array in arrays.values()) for arrays in pair],
        "nonzero": [
            sum(int(np.count_nonzero(array)) for array in arrays.values()) for arrays in pair
        ],
        "milliseconds": [min(times) for times in zip(*rounds, strict=True)],
        "memory": [runner.costs(arrays, EXAMPLES)["memory"] for arrays in pair],
        "same_shapes": {name: array.shape for name, array in pair[0].items()}
        == {name: array.shape for name, array in pair[1].items()},
    }
