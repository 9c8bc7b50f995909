"""The certificate of a search: on examples that it did not see, for a handful of its candidates, from safe to bold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from karikomi.search.candidate_steps import course_of
from karikomi.search.certificate import (
    DropBound,
    Feasibility,
    Found,
    PairedDrop,
    SpentIds,
    example_ids,
    feasibility,
    fixed_sequence,
    handful,
    mean_needed,
    overlap,
    paired_drop,
)
from karikomi.search.driver import Budgets
from karikomi.search.run_reference import OpenedRun
from karikomi.search.search_outcome import Candidate, SearchOutcome
from karikomi.tasks import Data, Split, Task
from karikomi.tasks.example_scores import example_scores

ALPHA = 0.05
"""The probability of a false certificate, unless it is given."""

MOST = 5
_NO_MEAN = "the metric is no mean over examples, so that no bound on its drop is known"
_CLIP = 2.0


def certify_split(data: Data) -> tuple[str, Split]:
    """Return the examples that judge, with the name of their split: those for it, or else the test split."""
    return ("test", data.test) if data.certify is None else ("certify", data.certify)


def stated_beforehand(
    task: Task, data: Data, max_drop: float | None, *, alpha: float = ALPHA
) -> Feasibility | None:
    """Return what the certify examples can show of the budget, or None where no share of examples is judged."""
    _, split = certify_split(data)
    shares = task.classifies and split.targets.ndim == 1
    if not shares or max_drop is None or not 0 < max_drop < 1:
        return None
    counted = int(np.sum(split.targets != task.ignore_index))
    return feasibility(max_drop, max(counted, 1), alpha=alpha)


def certified(
    run: OpenedRun,
    outcome: SearchOutcome,
    budgets: Budgets,
    ledger: Path,
    *,
    before: Feasibility | None,
    alpha: float = ALPHA,
) -> tuple[dict[str, Any], Candidate | None]:
    """Return the certificate as plain data, and the boldest certified candidate, if any.

    ``status``: ``"certified"``, ``"not certified"``, or ``"not run"`` with the ``reason``; ``asked``: whether there is
    a budget on the drop to certify. The candidates are those that hold on the validation split, which chose them and
    their order; the ledger keeps the certify examples from serving another choice.
    """
    name, split = certify_split(run.data)
    plain: dict[str, Any] = {
        "split": name,
        "n": len(split),
        "alpha": alpha,
        "tried": len(outcome.files),
        "asked": budgets.max_drop is not None,
        "beforehand": None if before is None else before.as_dict(),
    }
    reason = _reason(budgets, before, len(split))
    if not reason and outcome.dense.work.scores() is None:
        reason = _NO_MEAN
    scores = None if reason else _scores(run, outcome.dense, split)
    if reason or scores is None:
        # Of one split alone a metric can happen to be a mean: where all of it is right, say.
        return {**plain, "status": "not run", "reason": reason or _NO_MEAN}, None
    chosen = _sequence(outcome, budgets)
    if not chosen:
        return {**plain, "status": "not run", "reason": "no candidate holds on validation"}, None
    ids = example_ids([*split.arrays().values(), split.targets])
    seen = run.data.validation
    shared = overlap(ids, example_ids([*seen.arrays().values(), seen.targets]))
    names = [candidate.proposal.digest for candidate, _ in chosen]
    level = SpentIds(ledger).spend(ids, names, alpha=alpha)
    clip = _clip([pair for _, pair in chosen], budgets.max_drop or 0.0)

    def test(item: tuple[Candidate, PairedDrop], alpha: float) -> DropBound:
        after = _scores(run, item[0], split)
        assert after is not None  # noqa: S101  (the dense network has scores, and so has this one)
        sign = 1 if run.task.direction == "max" else -1
        return paired_drop(scores, after, sign=sign, clip=clip).tested(alpha)

    limit = budgets.max_drop
    assert limit is not None  # noqa: S101  (_reason names its absence)
    result = fixed_sequence(chosen, test, max_drop=limit, alpha=level)
    rows = result.as_dict()
    for row, (candidate, pair) in zip(rows["tests"], chosen, strict=False):
        row |= {"what": course_of(candidate.proposal), "search_drop": pair.drop}
    status = "certified" if result.count else "not certified"
    found = {**plain, **rows, "status": status, "in_sequence": names, "also_in_validation": shared}
    return found, chosen[result.count - 1][0] if result.count else None


def _reason(budgets: Budgets, before: Feasibility | None, n: int) -> str | None:
    """Return why no certificate is tried, if so; nothing here depends on what the search found."""
    if budgets.max_drop is None:
        return "there is no budget on the drop"
    if budgets.max_drop <= 0:
        return "that nothing drops at all cannot be shown by examples"
    if before is not None:
        return before.sentence() if before.verdict == "cannot" else None
    # The clip is at least so many times the budget.
    extent = 2 * _CLIP * budgets.max_drop
    fewest = mean_needed(budgets.max_drop, deviation=0.0, extent=extent)
    if n >= fewest:
        return None
    return (
        f"{n:,} examples cannot certify a mean, not even of a network that changes no output: that"
        f" takes {fewest:,}"
    )


def _scores(run: OpenedRun, candidate: Candidate, split: Split) -> np.ndarray | None:
    candidate.work.adopt()
    outputs = candidate.work.outputs(candidate.arrays, split.inputs)
    return example_scores(run.task, outputs, split.targets)


def _sequence(outcome: SearchOutcome, budgets: Budgets) -> list[tuple[Candidate, PairedDrop]]:
    """Return the handful with the paired drop of each on the validation split, from safe to bold."""
    dense, task = outcome.dense.work.scores(), outcome.dense.work.task
    if dense is None:
        return []
    sign = 1 if task.direction == "max" else -1
    pairs: dict[str, tuple[Candidate, PairedDrop]] = {}
    found: list[Found] = []
    # Networks of one form are equally fast: the place by all that the search weighs is the cost.
    by_rank = sorted({budgets.rank(candidate.facts)[1:3] for candidate in outcome.alive})
    costs = {
        candidate.proposal.digest: by_rank.index(budgets.rank(candidate.facts)[1:3])
        for candidate in outcome.alive
    }
    for candidate in outcome.alive:
        scores = candidate.work.scores()
        if scores is None or not candidate.passed:
            continue
        pair = paired_drop(dense, scores, sign=sign, clip=float(np.inf))
        digest = candidate.proposal.digest
        pairs[digest] = candidate, pair
        # The order is by the standard error, which all have; the bound that certifies is another one.
        error = float(np.std(pair.differences)) / max(len(dense), 1) ** 0.5
        found.append(Found(digest, float(costs[digest]), pair.drop, pair.drop + error))
    limit = (budgets.max_drop or 0.0) + outcome.slack
    return [pairs[item.name] for item in handful(found, max_drop=limit, most=MOST)]


def _clip(pairs: Sequence[PairedDrop], max_drop: float) -> float:
    """Return the bound on one example's difference, from the validation split alone."""
    if all(pair.shares for pair in pairs):
        return 1.0
    largest = max(float(np.abs(pair.differences).max()) for pair in pairs)
    return max(_CLIP * largest, _CLIP * max_drop)
