"""The loop of a search: propose a round, evaluate what the journal lacks, journal each, propose again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from karikomi.errors import InvalidArgument, KarikomiError, NonFinite, Unsupported, check
from karikomi.search.driver.executors import places_of
from karikomi.search.driver.proposal import Proposal, plain_facts
from karikomi.search.driver.run_journal import Finished, RunJournal
from karikomi.tasks.user_code import cause

PERMANENT = (InvalidArgument, Unsupported, NonFinite)
"""Errors that the same evaluation would end in again; any other may be of the machine."""

_MOST_ROUNDS = 10_000


@dataclass(frozen=True, slots=True)
class Measured:
    """What the evaluation of a candidate returns: plain facts, and the path of what it wrote, if anything."""

    facts: Mapping[str, Any]
    artefact: str | None = None
    seconds: float = field(default=0.0, compare=False)


Evaluate = Callable[[Proposal, int, Any], Measured]
"""``(proposal, seed, data reference) -> Measured``, a pure function that can be pickled by its name."""


class Strategy(Protocol):
    """The next proposals, decided on finished candidates alone."""

    def propose(self, finished: Mapping[Proposal, Finished]) -> Sequence[Proposal]:
        """Return the next round; nothing ends the search. Must be a pure function of `finished`."""
        ...


def drive(
    strategy: Strategy,
    evaluate: Evaluate,
    *,
    journal: RunJournal,
    executor: Executor,
    seed: int,
    reference: Any,
    attempts: int = 2,
    on_finished: Callable[[Finished, bool], object] = lambda finished, again: None,
    after_round: Callable[[Sequence[Finished]], object] = lambda finished: None,
) -> dict[Proposal, Finished]:
    """Run a search to its end, and return proposal -> candidate in the order of the proposals.

    Each round is evaluated as a whole before the next is proposed, so that a decision never depends on which
    candidate happens to finish first. What the journal has is not evaluated again; failures are tried again up to
    `attempts` times in a call, unless they are permanent, and once more in the next call. `on_finished`:
    called with each candidate, and whether it came from the journal. `after_round`: called with the round, while
    nothing is evaluated: the place for what must be measured alone.

    Raises `InvalidArgument` for a strategy that proposes without end.
    """
    check("drive", (attempts >= 1, "attempts is a number", attempts, ">= 1"))
    results: dict[Proposal, Finished] = {}
    for _ in range(_MOST_ROUNDS):
        wanted = [p for p in dict.fromkeys(strategy.propose(results)) if p not in results]
        if not wanted:
            return results
        known = {p: found for p in wanted if (found := journal.found(p)) and found.settled}
        for found in known.values():
            on_finished(found, True)
        missing = [p for p in wanted if p not in known]
        fresh = _Round(evaluate, seed, reference, journal, executor, attempts, on_finished)
        known |= fresh.run(missing)
        results |= {p: known[p] for p in wanted}
        after_round([known[p] for p in wanted])
    raise InvalidArgument("the strategy has no end", where="drive", got=f"{_MOST_ROUNDS} rounds")


@dataclass(slots=True)
class _Round:
    evaluate: Evaluate
    seed: int
    reference: Any
    journal: RunJournal
    executor: Executor
    attempts: int
    on_finished: Callable[[Finished, bool], object]

    def run(self, proposals: Sequence[Proposal]) -> dict[Proposal, Finished]:
        waiting = [(proposal, 1) for proposal in proposals]
        running: dict[Future[Measured], tuple[Proposal, int]] = {}
        finished: dict[Proposal, Finished] = {}
        places = places_of(self.executor)
        try:
            while waiting or running:
                while waiting and len(running) < places:
                    proposal, attempt = waiting.pop(0)
                    running[self._submitted(proposal)] = proposal, attempt
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    proposal, attempt = running.pop(future)
                    found = self._finished(proposal, future)
                    self.journal.append(found)
                    if not found.settled and attempt < self.attempts:
                        waiting.append((proposal, attempt + 1))
                        continue
                    finished[proposal] = found
                    self.on_finished(found, False)
        except BaseException:
            for future in running:
                future.cancel()
            raise
        return finished

    def _submitted(self, proposal: Proposal) -> Future[Measured]:
        return self.executor.submit(timed, self.evaluate, proposal, self.seed, self.reference)

    def _finished(self, proposal: Proposal, future: Future[Measured]) -> Finished:
        key = self.journal.key_of(proposal)
        try:
            measured = future.result()
        except Exception as error:
            text = str(error) if isinstance(error, KarikomiError) else cause(error)
            facts: dict[str, Any] = {"kind": type(error).__name__, "text": " ".join(text.split())}
            facts["permanent"] = isinstance(error, PERMANENT)
            return Finished(key, proposal, error=facts, exception=error)
        facts = plain_facts(measured.facts)
        return Finished(key, proposal, facts, measured.artefact, seconds=measured.seconds)


def timed(evaluate: Evaluate, proposal: Proposal, seed: int, reference: Any) -> Measured:
    """Return what `evaluate` returns, with the seconds that it took where it ran."""
    start = time.perf_counter()
    measured = evaluate(proposal, seed, reference)
    return Measured(measured.facts, measured.artefact, time.perf_counter() - start)
