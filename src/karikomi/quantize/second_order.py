"""GPTQ: the nearest code of each weight, its error compensated by the weights of the inputs that follow."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import NDArray

from karikomi.errors import check
from karikomi.quantize.error_feedback import Floats, RoundingProblem, fed_back
from karikomi.quantize.grids import Coded
from karikomi.quantize.nearest import UniformQuantizer
from karikomi.quantize.units import OutputUnits
from karikomi.registry import register


@register(
    "quantizer",
    name="gptq",
    formula="w_k -= (w_j - v(q_j)) [H^-1]_jk / [H^-1]_jj for each input j in turn, H = X X^T + damping mean(diag) I",
    source="Frantar, Ashkboos, Hoefler and Alistarh 2023, GPTQ",
)
@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQ:
    """Second-order rounding on the uniform grid of `karikomi.quantize.uniform`.

    `damping`: the share of the mean diagonal added to the Gram matrix of the inputs, > 0, tenfold where there is no
    Cholesky factor. `block`: inputs that are swept between two updates of all that follow. `by_energy`: the inputs of
    most energy first ("activation order"), else as they are. Raises `InvalidArgument`.

    >>> GPTQ(damping=0.1).argument
    'bits'

    Source: as registered; the start from the regression on the present inputs is our deviation.
    """

    damping: float = 0.01
    block: int = 128
    by_energy: bool = True
    grid: UniformQuantizer = UniformQuantizer()

    argument = "bits"
    needs = frozenset({"regression"})

    def __post_init__(self) -> None:
        good, many = 0.0 < self.damping < float("inf"), self.block >= 1
        check(
            "GPTQ",
            (good, "damping out of range", self.damping, "> 0"),
            (many, "block out of range", self.block, ">= 1"),
        )

    def quantize(
        self, weights: NDArray, size: int, *, units: OutputUnits, name: str = "weights"
    ) -> Coded:
        """Return the nearest codes of the grid: what remains where no inputs were seen."""
        return self.grid.quantize(weights, size, units=units, name=name)

    def rounded(self, problem: RoundingProblem) -> Floats:
        """Return the codes of a layer."""
        return fed_back(problem, block=self.block)
