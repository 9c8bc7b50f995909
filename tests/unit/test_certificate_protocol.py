"""The protocol of a certificate: splits, the order from safe to bold, early decisions, the ledger, simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karikomi.errors import BadFile, InvalidArgument, Unsupported
from karikomi.search.certificate import (
    DropBound,
    Flips,
    Found,
    SpentIds,
    drop_bound,
    examined,
    example_ids,
    fixed_sequence,
    handful,
    needed,
    overlap,
    partition,
)


def by_flips(flips: Flips, alpha: float) -> DropBound:
    return DropBound(flips.drop, drop_bound(flips, alpha=alpha), flips.examples, "Tango", {})


def certified_of(
    random: np.random.Generator, budget: float, drop: float, flips: float, n: int, candidates: int
) -> int:
    """Return how many of so many candidates, with one true drop, are certified after a search."""
    cells = ((flips + drop) / 2, (flips - drop) / 2, 1 - flips)
    search, certify = random.multinomial(n, cells, size=(2, candidates))
    found = []
    for place, (lost, gained, _) in enumerate(search.tolist()):
        seen = Flips(lost, gained, n)
        # Of what does not hold, no bound is read.
        bound = drop_bound(seen) if seen.drop <= budget else np.inf
        found.append(Found(str(place), -place, seen.drop, bound))
    chosen = handful(found, max_drop=budget)
    counts = [Flips(*certify[int(item.name), :2].tolist(), n) for item in chosen]
    return fixed_sequence(counts, by_flips, max_drop=budget, alpha=0.05).count


def test_fifty_candidates_beyond_the_budget_are_hardly_ever_certified() -> None:
    """True drop twice the budget: by chance many hold on the search split, and none may pass for that."""
    random = np.random.default_rng(0)
    runs = [certified_of(random, 0.005, 0.01, 0.02, 1_000, 50) for _ in range(200)]
    assert sum(count > 0 for count in runs) <= 15


def test_a_drop_just_at_the_budget_is_certified_at_the_level() -> None:
    random = np.random.default_rng(1)
    runs = [certified_of(random, 0.01, 0.01, 0.03, 2_000, 20) for _ in range(200)]
    # 10 expected; 20 has a probability below 1 %.
    assert sum(count > 0 for count in runs) <= 20


def test_the_stated_number_of_examples_certifies_what_did_not_drop() -> None:
    random = np.random.default_rng(2)
    n = needed(0.01, flips=0.02)
    runs = [certified_of(random, 0.01, 0.0, 0.02, n, 1) for _ in range(200)]
    # At the power 0.8, after a search that itself refuses drops above the budget.
    assert np.mean([count > 0 for count in runs]) >= 0.7


def test_nothing_behind_the_first_failure_is_tested() -> None:
    seen = []

    def test(flips: Flips, alpha: float) -> DropBound:
        seen.append(flips.lost)
        return by_flips(flips, alpha)

    sequence = [Flips(lost, 0, 1000) for lost in (0, 1, 30, 0)]
    result = fixed_sequence(sequence, test, max_drop=0.01, alpha=0.05)
    assert (result.count, seen) == (2, [0, 1, 30])
    rows = result.as_dict()["tests"]
    assert [row["passed"] for row in rows] == [True, True, False]


def test_a_bound_that_is_nan_certifies_nothing() -> None:
    result = fixed_sequence(
        [0], lambda *_: DropBound(0.0, float("nan"), 1, "none", {}), max_drop=1.0, alpha=0.05
    )
    assert result.count == 0


def test_what_chance_put_behind_a_bolder_one_stands_between() -> None:
    safe, bold = Found("2.5", 10, 0.0, 0.002), Found("1.6", 4, 0.003, 0.005)
    middle, beyond = Found("2.0", 7, 0.004, 0.006), Found("book", 8, 0.009, 0.012)
    every = [beyond, bold, middle, safe]
    assert handful(every, max_drop=0.01) == [safe, middle, bold]
    assert handful(every, max_drop=0.0055) == [safe, bold], "one that cannot be within the budget"
    assert handful(every, max_drop=0.01, most=2) == [safe, bold]
    alike = Found("4.0", 20, 0.0, 0.002)
    assert handful([bold, safe, alike], max_drop=0.01) == [alike, safe, bold]


def test_the_handful_goes_from_safe_to_bold() -> None:
    drops = np.random.default_rng(0).uniform(0, 0.02, 40)
    # Bolder ones cost less, and some cost more than a safer one.
    found = [
        Found(str(k), float((0.02 - drop) * (1 + k % 3)), float(drop), float(drop) + 0.003)
        for k, drop in enumerate(drops)
    ]
    chosen = handful(found, max_drop=0.01, most=4)
    assert len(chosen) == 4 and all(item.drop <= 0.01 for item in chosen)
    assert [item.bound for item in chosen] == sorted(item.bound for item in chosen)
    assert [item.cost for item in chosen] == sorted((item.cost for item in chosen), reverse=True)
    # The boldest is the cheapest of all that hold.
    assert chosen[-1].cost == min(item.cost for item in found if item.drop <= 0.01)
    assert handful(found, max_drop=0.01, most=1) == chosen[-1:]
    assert handful(found, max_drop=-1.0) == []


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_parts_are_disjoint_exact_and_stratified(sizes: list[int], share: float, seed: int) -> None:
    strata = np.repeat(np.arange(len(sizes)), sizes)
    n = len(strata)
    first = int(share * n)
    counts = {"search": first, "certify": (n - first) // 2}
    parts = partition(strata, counts, seed=seed)
    assert {name: len(part) for name, part in parts.items()} == counts
    joined = np.concatenate(list(parts.values()))
    assert len(np.unique(joined)) == len(joined)
    for name, part in parts.items():
        got = np.bincount(strata[part], minlength=len(sizes))
        assert (np.abs(got - np.array(sizes) * counts[name] / n) <= 2).all()


def test_parts_depend_on_the_seed_alone() -> None:
    strata = np.arange(200) % 7
    first, again, other = (partition(strata, {"a": 80}, seed=seed)["a"] for seed in (3, 3, 4))
    assert (first == again).all() and not (first == other).all()
    with pytest.raises(InvalidArgument, match="more examples"):
        partition(strata, {"a": 201}, seed=0)


def test_an_example_is_known_again_in_whatever_layout() -> None:
    images = np.random.default_rng(0).normal(size=(20, 3, 4)).astype(np.float32)
    labels = np.arange(20)
    ids = example_ids([images, labels])
    assert (example_ids([np.asfortranarray(images), labels]) == ids).all()
    assert overlap(ids, example_ids([images[15:], labels[15:]])) == 5
    assert overlap(ids, example_ids([images, labels + 1])) == 0


@given(st.integers(1, 300), st.floats(0, 0.4), st.integers(1, 64), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_an_early_decision_is_that_of_all_examples(
    n: int, rate: float, chunk: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    before, margins = random.random(n) < 0.8, random.random(n)
    after = before ^ (random.random(n) < rate * (1 - margins))
    asked: list[int] = []

    def right_after(places: np.ndarray) -> np.ndarray:
        asked.extend(places.tolist())
        return after[places]

    def passes(flips: Flips) -> bool:
        return drop_bound(flips) <= 0.1

    found = examined(before, margins, right_after, passes, chunk=chunk)
    whole = Flips.of(before, after)
    assert found.passed == passes(whole)
    assert len(set(asked)) == len(asked) == found.flips.examples
    assert found.stopped or found.flips == whole


def test_a_bad_candidate_costs_few_examples() -> None:
    random = np.random.default_rng(0)
    before, margins = np.ones(10_000, dtype=bool), random.random(10_000)
    after = random.random(10_000) > 0.5 * (margins < 0.2)
    found = examined(before, margins, lambda places: after[places], lambda f: f.drop <= 0.01)
    assert not found.passed and found.stopped and found.flips.examples <= 512
    assert 0.01 < found.least_drop <= Flips.of(before, after).drop


def test_certify_examples_are_spent_once(tmp_path: Path) -> None:
    ids, path = np.arange(5, dtype=np.uint64), tmp_path / "spent.json"
    assert SpentIds(path).spend(ids, ["a", "b"], alpha=0.05) == 0.05
    # The same certificate again, after a kill.
    assert SpentIds(path).spend(ids[::-1], ["a", "b"], alpha=0.05) == 0.05
    for others, alpha in ((["a"], 0.05), (["b", "a"], 0.05), (["a", "b"], 0.1)):
        with pytest.raises(Unsupported, match="spent"):
            SpentIds(path).spend(ids, others, alpha=alpha)
    assert SpentIds(path).spend(ids + 9, ["a"], alpha=0.05) == 0.05


def test_planned_uses_share_the_level(tmp_path: Path) -> None:
    ids, ledger = np.arange(5, dtype=np.uint64), SpentIds(tmp_path / "spent.json", uses=3)
    levels = [ledger.spend(ids, [name], alpha=0.04) for name in "abc"]
    assert levels == [0.02, 0.01, 0.005] and sum(levels) < 0.04
    with pytest.raises(Unsupported, match="3 of 3"):
        ledger.spend(ids, ["d"], alpha=0.04)


def test_a_ledger_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "spent.json").write_text("{")
    with pytest.raises(BadFile, match="ledger"):
        SpentIds(tmp_path / "spent.json")
