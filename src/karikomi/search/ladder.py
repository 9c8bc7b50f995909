"""The search of `compress`: widths, then sparsities, while they hold; then codebooks, 8-bit grids, and floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from karikomi.errors import KarikomiError
from karikomi.search.candidate_work import LAST_STEPS, step_of
from karikomi.search.driver import Budgets, Finished, Proposal


@dataclass(frozen=True, slots=True)
class Ladder:
    """Proposes from the dense network on, each step only from what held on the validation split.

    `origin`: whether the dense network is ``"trained"`` here or ``"given"``. `widths`, falling, and `sparsities`,
    rising, are climbed as long as the drop holds, and then left from the boldest step down, until a file of
    the step is within all budgets. `drop`: of the metric, ``(before, after)``. `facts_of`: the facts of a candidate
    that is a file, with those that the driver adds. `tuned`: whether the centroids of codebooks are trained.
    """

    origin: str
    widths: tuple[float, ...]
    sparsities: tuple[float, ...]
    entries: tuple[int, ...]
    tuned: bool
    budgets: Budgets
    drop: Callable[[float, float], float]
    slack: float
    facts_of: Callable[[Finished], Mapping[str, Any]]

    @property
    def dense(self) -> Proposal:
        """The network that all others begin with."""
        return Proposal.of(dense=self.origin)

    def propose(self, finished: Mapping[Proposal, Finished]) -> Sequence[Proposal]:
        """Return the next round."""
        if self.dense not in finished:
            return [self.dense]
        if finished[self.dense].error is not None:
            raise_failure(finished[self.dense])
        bases, missing = self._climbed(self.dense, "width", self.widths, finished)
        if missing:
            return missing
        for base in reversed(bases):
            missing, held = self._below(base, finished)
            if missing or held:
                return missing
        shrunk = self._shrunk(self.dense)
        floats = self._step(shrunk, store="floats")
        return self._new([shrunk], finished) or self._new([floats], finished)

    def passes(self, found: Finished, finished: Mapping[Proposal, Finished]) -> bool:
        """Return whether the validation metric of a candidate is within the budget on the drop."""
        limit = self.budgets.max_drop
        if found.error is not None or limit is None:
            return found.error is None
        before = finished[self.dense].facts["validation"]
        return bool(self.drop(before, found.facts["validation"]) <= limit + self.slack)

    def holds(self, found: Finished, finished: Mapping[Proposal, Finished]) -> bool:
        """Return whether a file is within all budgets."""
        if not self.passes(found, finished):
            return False
        return not set(self.budgets.misses(self.facts_of(found))) - {"drop"}

    def rungs(self, finished: Mapping[Proposal, Finished]) -> list[Finished]:
        """Return the steps of width and sparsity that were taken, in order."""
        return [f for p, f in finished.items() if step_of(p) in ("width", "prune")]

    def files(self, finished: Mapping[Proposal, Finished]) -> list[Finished]:
        """Return the candidates that are files, in order."""
        return [f for p, f in finished.items() if step_of(p) in LAST_STEPS]

    def _below(
        self, base: Proposal, finished: Mapping[Proposal, Finished]
    ) -> tuple[list[Proposal], bool]:
        rungs, missing = self._climbed(base, "prune", self.sparsities, finished)
        if missing:
            return missing, False
        kind = "entries" if self.tuned else "codebook"
        for rung in reversed(rungs):
            shrunk = self._shrunk(rung)
            books = [self._step(shrunk, **{kind: k}) for k in self.entries]
            for files in (books, [self._step(shrunk, bits=8)]):
                if missing := self._new([shrunk], finished) or self._new(files, finished):
                    return missing, False
                if any(self.holds(finished[file], finished) for file in files):
                    return [], True
        return [], False

    def _climbed(
        self,
        base: Proposal,
        step: str,
        values: Sequence[float],
        finished: Mapping[Proposal, Finished],
    ) -> tuple[list[Proposal], list[Proposal]]:
        """Return the base with the steps that held, and the next step where it is not finished."""
        held = [base]
        for place, value in enumerate(values):
            # A ladder of sparsities goes on from the step before; each width is cut from the dense network.
            setting = list(values[: place + 1]) if step == "prune" else value
            proposal = self._step(base, **{step: setting})
            if proposal not in finished:
                return held, [proposal]
            if not self.passes(finished[proposal], finished):
                break
            held.append(proposal)
        return held, []

    def _shrunk(self, rung: Proposal) -> Proposal:
        return self._step(rung, shrink="dead")

    def _step(self, base: Proposal, **setting: Any) -> Proposal:
        return Proposal.of(**base.settings, **setting)

    def _new(
        self, proposals: Sequence[Proposal], finished: Mapping[Proposal, Finished]
    ) -> list[Proposal]:
        return [proposal for proposal in proposals if proposal not in finished]


def raise_failure(found: Finished) -> None:
    """Raise the error of a candidate, or one with its text where it is of an earlier process."""
    if found.exception is not None:
        raise found.exception
    error = found.error or {}
    raise KarikomiError(
        "a candidate failed, and would fail again",
        where=found.proposal.words(),
        got=f"{error.get('kind')}: {error.get('text')}",
    )
