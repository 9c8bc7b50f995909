"""OWL: tensors with many outliers stay denser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from karikomi.prune.allocations.allocation import Pool, Tensor, by_quota, check_sparsity
from karikomi.prune.allocations.shares import Shares, balanced, known
from karikomi.registry import register

SPREAD = 0.08
"""How far a tensor's sparsity may lie from the mean: the paper's lambda."""

TIMES = 5.0
"""From how many times the mean an entry is an outlier: the paper's M."""


@register(
    "allocation",
    name="owl",
    formula=f"density rises by 2 * {SPREAD} from the tensor with the fewest outliers to that with most",
    source="Yin et al. 2024, Outlier Weighed Layerwise Sparsity",
)
def outlier_weighed(tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
    """Return one pool per tensor, denser by as much as its share of outliers is larger.

    ``sparsity_i = c - 2 * 0.08 * (o_i - min o) / (max o - min o)``, within [0, 1], with c such that
    ``round(sparsity * items)`` go in all; at least one item stays per tensor. ``o_i``: the share of
    outliers (`Tensor.outliers`, see `outlier_share`).
    Raises `InvalidArgument` for a sparsity outside of [0, 1) or out of reach, or missing outliers.

    >>> tensors = {"calm": Tensor(items=100, outliers=0.0), "wild": Tensor(items=100, outliers=0.1)}
    >>> outlier_weighed(tensors, 0.7)
    [Pool(names=('calm',), remove=78), Pool(names=('wild',), remove=62)]

    Source: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for
    Pruning LLMs to High Sparsity", M = 5 and lambda = 0.08. Per tensor, where the paper takes whole
    blocks of a transformer (all of one size); so the total is made exact by items, not by blocks.
    """
    check_sparsity(sparsity)
    outliers = known(tensors, "outliers", where="owl", hint="give data= (the inputs are measured)")
    least = min(outliers.values(), default=0.0)
    span = max(outliers.values(), default=0.0) - least
    lift = {
        name: (outlier - least) / span if span > 0.0 else 0.0 for name, outlier in outliers.items()
    }

    def shares_at(level: float) -> Shares:
        return {name: min(max(level - 2 * SPREAD * up, 0.0), 1.0) for name, up in lift.items()}

    shares = balanced(shares_at, tensors, sparsity, low=0.0, high=1.0 + 2 * SPREAD)
    return by_quota(tensors, shares, sparsity, where="owl")


def outlier_share(metrics: Callable[[], Iterable[np.ndarray]], *, times: float = TIMES) -> float:
    """Return the share of entries that are larger than `times` their mean.

    `metrics`: gives the entries, >= 0 (``|w| * input_norm``), in blocks; called twice. No entries
    have a share of 0.

    >>> outlier_share(lambda: [np.ones(9), np.full(1, 100.0)])
    0.1

    Source: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity", section 3.1.
    """
    count, total = 0, 0.0
    for block in metrics():
        count, total = count + block.size, total + float(np.sum(block, dtype=np.float64))
    if count == 0:
        return 0.0
    level = times * total / count
    return sum(int(np.count_nonzero(block > level)) for block in metrics()) / count
