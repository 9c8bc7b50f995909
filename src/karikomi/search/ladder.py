"""The search of `compress`: structures first, then on each of them every technique that ends in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from karikomi.errors import KarikomiError
from karikomi.search.candidate_steps import LAST_STEPS, step_of
from karikomi.search.driver import Asking, Budgets, Finished, Proposal, missing_of, together
from karikomi.tasks import Recipe

FEWEST_EPOCHS = 4
"""Epochs of a recovery from which on a quarter of it is tried first."""

MOST_INTEGER = 4
"""Files of one structure that are tried with integer activations."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """Proposes from the dense network on; every decision is one on the validation split.

    `origin`: whether the dense network is ``"trained"`` here or ``"given"``. `recipe`: the ladders, each from safe to
    bold. `prunes`: whether the network has weights that can be pruned. `trains`: whether anything may be trained.
    `integers`: whether files are run with integer activations. `drop`: of the metric, ``(before, after)``. `facts_of`:
    the facts of a candidate that is a file, with those that the driver adds.

    1. Structures: the dense network, and its `widths`, recovered in short stretches first; of these the half that is
       nearest to the budget is recovered to the end (successive halving).
    2. On a structure, in the same rounds: the curve of `rates`, bisected; codebooks, as `pack` makes them; the ladder
       of `sparsities` with tuned codebooks; quantized training to each of `learned`, again short first.
    3. The boldest structure comes first. The others follow as long as no file holds, and the next safer one after
       that: the certificate may refuse the boldest. For the same reason the dense network is stored in 8 bits. Where
       bytes or the drop are what is made small, which a bold structure need not be best at, all others are quantized
       without training anyway.

    Source of the halving: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification".
    """

    origin: str
    recipe: Recipe
    prunes: bool
    trains: bool
    budgets: Budgets
    drop: Callable[[float, float], float]
    slack: float
    facts_of: Callable[[Finished], Mapping[str, Any]]
    integers: bool = False

    @property
    def dense(self) -> Proposal:
        """The network that all others begin with."""
        return Proposal.of(dense=self.origin)

    def propose(self, finished: Mapping[Proposal, Finished]) -> Sequence[Proposal]:
        """Return the next round."""
        return missing_of(self._all(finished), finished)

    def passes(self, found: Finished, finished: Mapping[Proposal, Finished]) -> bool:
        """Return whether the validation metric of a candidate is within the budget on the drop."""
        limit = self.budgets.max_drop
        if found.error is not None or limit is None:
            return found.error is None
        return self._drop_of(found, finished) <= limit + self.slack

    def holds(self, found: Finished, finished: Mapping[Proposal, Finished]) -> bool:
        """Return whether a file is within all budgets."""
        if not self.passes(found, finished):
            return False
        return not set(self.budgets.misses(self.facts_of(found))) - {"drop"}

    def rungs(self, finished: Mapping[Proposal, Finished]) -> list[Finished]:
        """Return the steps of width, recovery and sparsity that were taken, in order."""
        return [f for p, f in finished.items() if step_of(p) in ("width", "recover", "prune")]

    def files(self, finished: Mapping[Proposal, Finished]) -> list[Finished]:
        """Return the candidates that are files, in order."""
        return [f for p, f in finished.items() if step_of(p) in LAST_STEPS]

    def _all(self, finished: Mapping[Proposal, Finished]) -> Asking[None]:
        (dense,) = yield [self.dense]
        if dense.error is not None:
            raise_failure(dense)
        course = _Course(self, finished)
        structures = yield from course.structures()
        held = 0
        for base in reversed(structures):
            exact = self.budgets.objective_name in ("bytes", "drop")
            if held > 1 and not exact:
                yield from course.safest()
                break
            held += yield from course.files(base, training=not held or base == self.dense)
        if not held:
            (shrunk,) = yield [course.shrunk(self.dense)]
            yield [step(shrunk.proposal, store="floats")]

    def _drop_of(self, found: Finished, finished: Mapping[Proposal, Finished]) -> float:
        return float(self.drop(finished[self.dense].facts["validation"], found.facts["validation"]))


@dataclass(frozen=True, slots=True)
class _Course:
    """The techniques of a ladder, each as a strategy of its own."""

    ladder: Ladder
    finished: Mapping[Proposal, Finished]

    def passes(self, found: Finished) -> bool:
        return self.ladder.passes(found, self.finished)

    def holds(self, found: Finished) -> bool:
        return self.ladder.holds(found, self.finished)

    def shrunk(self, base: Proposal) -> Proposal:
        return step(base, shrink="dead")

    def structures(self) -> Asking[list[Proposal]]:
        """Return the dense network and the widths that hold, from wide to narrow."""
        ladder = self.ladder
        widths = ladder.recipe.widths if ladder.prunes else ()
        cuts = yield [step(ladder.dense, width=width) for width in widths]
        able = [found for found in cuts if found.error is None]
        if ladder.trains and able:
            able = yield from self._recovered(able)
        return [ladder.dense, *(found.proposal for found in able if self.passes(found))]

    def files(self, base: Proposal, *, training: bool) -> Asking[bool]:
        """Return whether a file of a structure holds, after trying the techniques on it."""
        ladder = self.ladder
        tries = [self._curve(base)]
        if base == ladder.dense and ladder.prunes:
            tries.append(self._codebooks(base))
        if training and ladder.trains:
            tries += [self._pruned(base), self._learned(base)]
        found = [file for files in (yield from together(*tries)) for file in files]
        if not any(self.holds(file) for file in found):
            (eight,) = yield [step((yield from self._dead_gone(base)), bits=8)]
            found.append(eight)
        if ladder.integers:
            tried = yield from self._integers(base, found)
            if any(file.error is None for file in tried):
                # A wider structure in integers is faster than this one in floats.
                found = tried
        return any(self.holds(file) for file in found)

    def safest(self) -> Asking[None]:
        """Store the dense network in 8 bits: of a bold structure the certificate may show too little."""
        if self.ladder.budgets.max_drop is None:
            return
        (eight,) = yield [step((yield from self._dead_gone(self.ladder.dense)), bits=8)]
        if self.ladder.integers and self.passes(eight):
            yield [step(eight.proposal, int8="minmax")]

    def _dead_gone(self, base: Proposal) -> Asking[Proposal]:
        (found,) = yield [self.shrunk(base)]
        return found.proposal

    def _recovered(self, cuts: Sequence[Finished]) -> Asking[list[Finished]]:
        """Train each structure for a while, and the half that is nearest to the budget to the end."""
        epochs = self.ladder.recipe.prune_epochs
        if len(cuts) < 2 or epochs < FEWEST_EPOCHS:
            return list((yield [step(cut.proposal, recover=[epochs]) for cut in cuts]))
        short = epochs // 4
        tried = yield [step(cut.proposal, recover=[short]) for cut in cuts]
        kept = self._nearest_half(tried)
        done = yield [
            Proposal.of(**{**found.proposal.settings, "recover": [short, epochs - short]})
            for found in kept
        ]
        return list(done)

    def _curve(self, base: Proposal) -> Asking[list[Finished]]:
        """Bisect the rates of one structure for the boldest that holds, and try its neighbours.

        One lies between it and the next, and may hold too. The other is the next safer rate, which bisection may have
        passed over: the certificate, on other examples, often refuses the boldest.
        """
        rates, found = self.ladder.recipe.rates, list[Finished]()
        if not rates:
            return found
        shrunk = yield from self._dead_gone(base)
        low, high = -1, len(rates)
        while high - low > 1:
            middle = (low + high) // 2
            bolder = yield from self._at(shrunk, rates[middle], found)
            low, high = (middle, high) if bolder else (low, middle)
        if 0 <= low and high < len(rates):
            between = round(math.sqrt(rates[low] * rates[high]), 2)
            yield from self._at(shrunk, between, found)
        tried = {file.proposal.settings["rate"] for file in found}
        least = self.ladder.budgets.objective_name == "drop"
        if 0 < low and rates[low - 1] not in tried and not least:
            yield from self._at(shrunk, rates[low - 1], found)
        return found

    def _at(self, base: Proposal, rate: float, found: list[Finished]) -> Asking[bool]:
        """Add the file of a rate to those found, and return whether a bolder one is to be tried."""
        (file,) = yield [step(base, rate=rate, method=self.ladder.recipe.method)]
        found.append(file)
        # The least drop is found on the safe side of the other limits.
        least = self.ladder.budgets.objective_name == "drop"
        return not self.holds(file) if least else self.passes(file)

    def _codebooks(self, base: Proposal) -> Asking[list[Finished]]:
        """Share weights as `pack` does: the result is never worse than that alone."""
        shrunk = yield from self._dead_gone(base)
        files = yield [step(shrunk, codebook=entries) for entries in self.ladder.recipe.entries]
        return list(files)

    def _pruned(self, base: Proposal) -> Asking[list[Finished]]:
        """Climb the sparsities, and tune codebooks on the boldest that has a file within the budgets."""
        ladder, rungs = self.ladder, [base]
        sparsities = ladder.recipe.sparsities if ladder.prunes else ()
        if not sparsities:
            return []
        for place in range(len(sparsities)):
            (found,) = yield [step(base, prune=list(sparsities[: place + 1]))]
            if not self.passes(found):
                break
            rungs.append(found.proposal)
        files: list[Finished] = []
        least = ladder.budgets.objective_name == "drop"
        for rung in reversed(rungs):
            shrunk = yield from self._dead_gone(rung)
            books = yield [step(shrunk, entries=entries) for entries in ladder.recipe.entries]
            files += books
            some = any(self.holds(file) for file in books)
            if not some:
                (eight,) = yield [step(shrunk, bits=8)]
                files.append(eight)
                some = self.holds(eight)
            # A small drop is found on a rung above, as long as those hold; all else on the boldest.
            if some and not least:
                break
            if least and not some and any(self.holds(file) for file in files):
                break
        return files

    def _learned(self, base: Proposal) -> Asking[list[Finished]]:
        """Train quantized towards each size for a while, and the half nearest to the budget to the end."""
        recipe = self.ladder.recipe
        goals, epochs = recipe.learned, recipe.learned_epochs
        if not goals:
            return []
        if recipe.units and self.ladder.prunes and "width" not in base.settings:
            (narrow,) = yield [step(base, width=list(recipe.units))]
            start = narrow.proposal if narrow.error is None else base
        else:
            start = yield from self._dead_gone(base)
        files: list[Finished] = []
        if len(goals) > 1 and epochs >= FEWEST_EPOCHS:
            tried = yield [step(start, learned=goal, epochs=epochs // 4) for goal in goals]
            files += tried
            kept = [found.proposal.settings["learned"] for found in self._nearest_half(tried)]
            goals = tuple(kept)
        files += yield [step(start, learned=goal, epochs=epochs) for goal in goals]
        return files

    def _integers(self, base: Proposal, files: Sequence[Finished]) -> Asking[list[Finished]]:
        """Run the smallest files that hold on the metric with integer activations, until one still holds.

        And the safest of them, for the certificate.
        """
        good = [file for file in files if self.passes(file)]
        good.sort(key=lambda file: float(file.facts["bytes"]))
        found: list[Finished] = []
        for file in good[:MOST_INTEGER]:
            (tried,) = yield [step(file.proposal, int8="minmax")]
            found.append(tried)
            if self.holds(tried):
                break
        others = good[len(found) :]
        if others:
            safest = min(good, key=lambda file: self.ladder._drop_of(file, self.finished))
            if safest in others:
                found += yield [step(safest.proposal, int8="minmax")]
        ran = any(tried.error is None for tried in found)
        if ran and not any(self.holds(tried) for tried in found):
            found += yield from self._finer(base, files)
        return found

    def _finer(self, base: Proposal, files: Sequence[Finished]) -> Asking[list[Finished]]:
        """Run finer weights with integer activations, which take a part of the drop: 8 bits, then the boldest rate.

        Where 8 bits do not hold, nothing does; where they do, they are what the certificate falls back to.
        """
        shrunk, recipe = (yield from self._dead_gone(base)), self.ladder.recipe
        (eight,) = yield [step(shrunk, bits=8)]
        if not self.passes(eight):
            return []
        found = list((yield [step(eight.proposal, int8="minmax")]))
        if not self.holds(found[0]):
            return found
        tried = [file.proposal.settings.get("rate", 0.0) for file in files]
        for rate in sorted(rate for rate in recipe.rates if rate > max(tried, default=0.0)):
            (file,) = yield [step(shrunk, rate=rate, method=recipe.method)]
            if not self.passes(file):
                continue
            found += yield [step(file.proposal, int8="minmax")]
            if self.holds(found[-1]):
                break
        return found

    def _nearest_half(self, tried: Sequence[Finished]) -> list[Finished]:
        """Return the half that exceeds the budget on the drop least, and among equals the boldest."""
        ladder = self.ladder
        alive = [(place, found) for place, found in enumerate(tried) if found.error is None]
        limit = ladder.budgets.max_drop

        def rank(item: tuple[int, Finished]) -> tuple[float, int]:
            place, found = item
            over = 0.0 if limit is None else ladder._drop_of(found, self.finished) - limit
            return max(over, 0.0), -place

        kept = sorted(sorted(alive, key=rank)[: (len(tried) + 1) // 2])
        return [found for _, found in kept]


def step(base: Proposal, **setting: Any) -> Proposal:
    """Return the proposal of a further step.

    >>> step(Proposal.of(dense="given"), rate=2.5, method="gptq").settings["rate"]
    2.5
    """
    return Proposal.of(**base.settings, **setting)


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
