"""Scores: what a weight is worth, one function a score; the lowest go first.

A score is elementwise and never negative: ``score(weights, xp=namespace)``. Measure calls it with
float32 blocks of a flattened tensor, so it may not depend on a tensor's shape.
"""

from __future__ import annotations

from niwaki.registry import register
from niwaki.rule import Array, Namespace


@register(
    "score",
    formula="|w|",
    source="Han, Pool, Tran and Dally 2015, Learning both Weights and Connections",
)
def magnitude(weights: Array, *, xp: Namespace) -> Array:
    """Return ``|w|``: what is nearest to zero goes first.

    `weights`: float32, any shape; the answer has the same shape.

    >>> import numpy as np
    >>> magnitude(np.array([-2.0, 0.5]), xp=np).tolist()
    [2.0, 0.5]

    Source: Han, Pool, Tran and Dally 2015, "Learning both Weights and Connections for Efficient
    Neural Networks".
    """
    return xp.abs(weights)
