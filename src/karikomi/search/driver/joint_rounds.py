"""Strategies as generators: each yields the proposals that it needs next, and goes on from their candidates."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TypeVar

from karikomi.search.driver.proposal import Proposal
from karikomi.search.driver.run_journal import Finished

Result = TypeVar("Result")
Asking = Generator[Sequence[Proposal], Sequence[Finished], Result]
"""Yields proposals, is sent their candidates in the same order, and returns what it found."""


def together(*askings: Asking[Result]) -> Asking[list[Result]]:
    """Ask for what several need in the same rounds, and return what each of them returns, in order."""
    waiting: dict[int, Sequence[Proposal]] = {}
    results: dict[int, Result] = {}

    def advance(place: int, found: Sequence[Finished] | None) -> None:
        try:
            asking = askings[place]
            waiting[place] = next(asking) if found is None else asking.send(found)
        except StopIteration as end:
            waiting.pop(place, None)
            results[place] = end.value

    for place in range(len(askings)):
        advance(place, None)
    while waiting:
        wanted = list(dict.fromkeys(p for asked in waiting.values() for p in asked))
        known = dict(zip(wanted, (yield wanted), strict=True))
        for place, asked in list(waiting.items()):
            advance(place, [known[p] for p in asked])
    return [results[place] for place in range(len(askings))]


def missing_of(asking: Asking[object], finished: Mapping[Proposal, Finished]) -> list[Proposal]:
    """Return the first proposals that a strategy needs and that are not finished; nothing where it is at its end."""
    try:
        wanted = next(asking)
        while all(proposal in finished for proposal in wanted):
            wanted = asking.send([finished[proposal] for proposal in wanted])
    except StopIteration:
        return []
    return [proposal for proposal in wanted if proposal not in finished]
