"""The course of a finished search: the dense network, the steps that were tried, the files, and the chosen one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from karikomi.search.candidate_steps import structure_of, words_of
from karikomi.search.candidate_work import CandidateWork
from karikomi.search.driver import Budgets, Finished, Judgement, Proposal, front
from karikomi.search.ladder import Ladder, raise_failure
from karikomi.search.run_reference import OpenedRun
from karikomi.tasks import Arrays


@dataclass(frozen=True, slots=True)
class Candidate:
    """A finished candidate: its place in the run folder, its facts, and whether it passed on the validation split."""

    work: CandidateWork
    facts: Mapping[str, Any]
    passed: bool
    failure: str | None = None

    @property
    def proposal(self) -> Proposal:
        """The steps by which it was made."""
        return self.work.proposal

    @property
    def stamp(self) -> str:
        """A digest of its steps, its run and the code: what was found out about it is of no other network."""
        return self.work.path.name

    @property
    def arrays(self) -> Arrays:
        """Its arrays, read now."""
        return self.work.arrays()

    @property
    def path(self) -> Path:
        """Its packed file."""
        return self.work.file

    @property
    def size(self) -> int:
        """The bytes of its file; 0 where it failed."""
        return int(self.facts.get("bytes", 0))

    @property
    def validation(self) -> float | None:
        """The metric on the validation split."""
        return self.facts.get("validation")

    @property
    def what(self) -> str:
        """The last step in the words of a report."""
        return words_of(self.proposal)


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """What a search found. `rung`: the last step before the chosen file; `files`: all files, tried in this order."""

    dense: Candidate
    rungs: list[Candidate]
    files: list[Candidate]
    judgement: Judgement
    chosen: Candidate
    slack: float = 0.0

    def with_chosen(self, candidate: Candidate) -> SearchOutcome:
        """Return the outcome with another of its files as the chosen one."""
        return replace(self, chosen=candidate)

    @property
    def rung(self) -> Proposal:
        """The step of width, recovery or sparsity that the chosen file is of, or the dense network."""
        return structure_of(self.chosen.proposal)

    @property
    def shrink(self) -> dict[str, Any]:
        """What shrinking removed, and what the network costs before and after."""
        return self.chosen.work.costs()

    def front(self, budgets: Budgets) -> list[Candidate]:
        """Return the files that no other is as good as in everything, by rising bytes."""
        return front(self.alive, lambda c: [_cost(c.facts, k) for k in axes(budgets)])

    @property
    def alive(self) -> list[Candidate]:
        """The files that did not fail."""
        return [candidate for candidate in self.files if candidate.failure is None]


def axes(budgets: Budgets) -> tuple[str, ...]:
    """Return what the front weighs: bytes and the drop, and each other fact with a limit or objective."""
    others = [*budgets.limits, budgets.objective_name]
    return tuple(dict.fromkeys(["bytes", "drop", *others]))


def outcome_of(
    run: OpenedRun, ladder: Ladder, finished: Mapping[Proposal, Finished]
) -> SearchOutcome:
    """Return the outcome of finished candidates, with the best file by the budgets as the chosen one."""

    def candidate(found: Finished, passed: bool) -> Candidate:
        work = CandidateWork(run, found.proposal)
        facts = ladder.facts_of(found) if found.error is None else {}
        failure = None if found.error is None else f"{found.error['kind']}: {found.error['text']}"
        return Candidate(work, facts, passed, failure)

    files = [candidate(f, ladder.holds(f, finished)) for f in ladder.files(finished)]
    alive = [file for file in files if file.failure is None]
    if not alive:
        raise_failure(ladder.files(finished)[-1])
    judgement = ladder.budgets.judge([file.facts for file in alive])
    return SearchOutcome(
        dense=candidate(finished[ladder.dense], True),
        rungs=[candidate(f, ladder.passes(f, finished)) for f in ladder.rungs(finished)],
        files=files,
        judgement=judgement,
        chosen=alive[judgement.best],
        slack=ladder.slack,
    )


def _cost(facts: Mapping[str, Any], name: str) -> float:
    value = facts.get(name)
    return float("inf") if value is None else float(value)
