"""Scores that also update the weights: the cost of a removal after the remaining weights are re-fitted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from karikomi.errors import InvalidArgument
from karikomi.prune.scores.score import Score
from karikomi.registry import register
from karikomi.rule import Array, Namespace
from karikomi.schedule import is_number, whole_from


class Reconstruction(Score):
    """The base of both: `damping`, the share of the gram's mean diagonal that is added to its diagonal."""

    updates: ClassVar[bool] = True
    damping: float

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``|w|``, by which a joint pool is divided among its tensors."""
        return xp.abs(weights)


@register(
    "score",
    name="obc",
    formula="w_i^2 / [H^-1]_ii with H = X X^T, anew after each removal; w -= w_i/[H^-1]_ii H^-1[:, i]",
    source="Frantar and Alistarh 2022, Optimal Brain Compression",
)
@dataclass(frozen=True, slots=True, kw_only=True)
class OBC(Reconstruction):
    """The exact Optimal Brain Surgeon for the outputs of a layer: one weight of an output at a time.

    ``loss_i = w_i^2 / [H^-1]_ii``, ``w -= w_i / [H^-1]_ii H^-1[:, i]`` with ``H = X X^T + damping
    mean(diag(X X^T)) I``. `damping`: > 0. About ``rows * (removed / rows)^2 * d`` operations for `d` inputs (of a
    convolution: channels times kernel), of which a processor does some 3e8 to 1e9 per second. A tensor that needs
    more than `most_operations` (> 0) is refused before anything is measured; infinity refuses none. Raises
    `InvalidArgument`.

    >>> OBC()
    OBC(damping=0.01, most_operations=1000000000000.0)

    Source: Frantar and Alistarh 2022, "Optimal Brain Compression"; Hassibi and Stork 1993, "Second Order
    Derivatives for Network Pruning: Optimal Brain Surgeon".
    """

    damping: float = 0.01
    most_operations: float = 1e12

    def __post_init__(self) -> None:
        _check_damping(self.damping, "OBC")
        if not is_number(self.most_operations) or not self.most_operations > 0.0:
            raise InvalidArgument(
                "the most operations of a tensor are a positive number",
                where="OBC: most_operations",
                got=repr(self.most_operations),
                allowed="> 0, or infinity",
            )


@register(
    "score",
    name="sparsegpt",
    formula="w_j^2 / U_jj^2 with U^T U = H^-1, in blocks of columns; w -= w_j / U_jj U[j, j:]",
    source="Frantar and Alistarh 2023, SparseGPT",
)
@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGPT(Reconstruction):
    """One sweep over the inputs of a layer: later columns make up for what earlier ones lost.

    ``loss_j = w_j^2 / U_jj^2``, ``w[j:] -= w_j / U_jj U[j, j:]`` with ``U`` the upper Cholesky factor of
    ``H^-1``; the masks of `block` columns are found together. About ``d^3 + rows d^2`` operations.
    `block`: columns, a whole number >= 1; `damping`: > 0, else `InvalidArgument`.

    >>> SparseGPT()
    SparseGPT(block=128, damping=0.01)

    Source: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot". Deviation: inputs that are always zero lose their weights first, and no more than asked.
    """

    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        whole_from(1, self.block, "a block has at least one column", where="SparseGPT: block")
        _check_damping(self.damping, "SparseGPT")


def _check_damping(damping: float, where: str) -> None:
    if not is_number(damping) or not 0.0 < damping < math.inf:
        raise InvalidArgument(
            "without damping there may be no inverse",
            where=f"{where}: damping",
            got=repr(damping),
            allowed="> 0",
        )
