"""Gradual pruning: how sparse a network is to be at which step of its training."""

from __future__ import annotations

import numbers
from dataclasses import KW_ONLY, dataclass

from niwaki import registry
from niwaki.errors import InvalidArgument
from niwaki.prune.allocation import check_sparsity
from niwaki.schedule import Cubic, whole


@registry.register(
    "prune",
    formula="s(t) = final + (initial - final) * (1 - (t - first) / (last - first))^3",
    source="Zhu and Gupta 2017, To prune, or not to prune",
)
@dataclass(frozen=True, slots=True)
class Gradual:
    """Prune while training: fast at first, slower as less is left, and never after `last`.

    ``s(t) = sparsity + (initial - sparsity) * (1 - u)^3`` with u the share of the way from the
    first to the last step. Masks are made at the first step, then `every` so many, and at the last.

    `sparsity`: the final share of weights that are zero, in [0, 1). `steps`: ``(first, last)``,
    counted in attempted optimizer steps (a loop that counts from 1 makes the masks of step 0 at its
    first step). `every`: steps between two masks, >= 1. `initial`: the
    share at the first step, in [0, sparsity]. `score`, `allocation`: registered names. `only`,
    `exclude`: globs over parameter names. Raises `InvalidArgument` or `UnknownName`.

    >>> rule = Gradual(0.8, steps=(0, 400))
    >>> [round(rule.sparsity_at(step), 3) for step in (0, 100, 200, 400)]
    [0.0, 0.463, 0.7, 0.8]
    >>> [step for step in range(600) if rule.due(step)]
    [0, 100, 200, 300, 400]

    Source: Zhu and Gupta 2017, "To prune, or not to prune", eq. 1, exponent 3.
    """

    sparsity: float
    _: KW_ONLY
    steps: tuple[int, int]
    every: int = 100
    initial: float = 0.0
    score: str = "magnitude"
    allocation: str = "global"
    only: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for field in ("sparsity", "initial"):
            share = getattr(self, field)
            if isinstance(share, numbers.Real) and not isinstance(share, bool):
                object.__setattr__(self, field, float(share))
        check_sparsity(self.sparsity, where="Gradual.sparsity")
        check_sparsity(self.initial, where="Gradual.initial")
        if self.initial > self.sparsity:
            raise InvalidArgument(
                "the initial sparsity is above the final one",
                where="Gradual",
                got=self.initial,
                allowed=f"0 to {self.sparsity}",
            )
        for field in ("steps", "only", "exclude"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        self._settle_numbers()
        registry.find("score", self.score)
        registry.find("allocation", self.allocation)

    def sparsity_at(self, step: int) -> float:
        """Return the share of weights that are to be zero at `step`."""
        return self._schedule().at(step)

    def due(self, step: int) -> bool:
        """Return whether new masks are made at `step`."""
        first, last = self.steps
        return first <= step <= last and ((step - first) % self.every == 0 or step == last)

    def _settle_numbers(self) -> None:
        # Plain Python numbers, also where NumPy's were given, so that the rule can be written down.
        steps = [whole(step) for step in self.steps] if isinstance(self.steps, tuple) else [None]
        every = whole(self.every)
        if None in steps or every is None or every < 1:
            raise InvalidArgument(
                "steps and every are whole numbers of steps",
                where="Gradual",
                got=f"steps={self.steps!r}, every={self.every!r}",
                allowed="0 <= first < last, every >= 1",
            )
        object.__setattr__(self, "steps", tuple(steps))
        object.__setattr__(self, "every", every)
        self._schedule()

    def _schedule(self) -> Cubic:
        return Cubic(self.initial, self.sparsity, steps=self.steps)
