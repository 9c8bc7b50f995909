"""The answer of a sweep on cases worked out by hand: choice, noise, divergence, seeds that are needed, words."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from karikomi import clip, schedule
from karikomi.errors import InvalidArgument, UnknownName, Unsupported
from karikomi.search.grid_account import answer_of
from karikomi.search.grid_answer import bounds_of, groups_of, looseness
from karikomi.search.grid_noise import Difference, adjusted, wilson
from karikomi.search.rule_text import rule_of, text_of
from karikomi.tasks import Task

TASK = Task(name="t", model=dict, data=dict)
ERROR = Task(name="t", model=dict, data=dict, metric="mean_squared_error")


def point(limit: float | None, scores: list[float | None], **more: Any) -> dict[str, Any]:
    known = [score for score in scores if score is not None]
    mean = sum(known) / len(known) if known else None
    lost = len(scores) - len(known)
    plain = {"rule": None, "bound": None, "rate": None, "sparsity": 0.0, "bits": None}
    figures = {"validation": {"mean": mean}, "accuracy": {"mean": mean}, "clipped": {"mean": 0.5}}
    counts = {"runs": len(known), "diverged": lost}
    interval = list(wilson(lost, len(scores)))
    return (
        {**plain, "limit": limit, "scores": scores, "diverged_interval": interval}
        | figures
        | counts
        | more
    )


def answered(points: list[dict[str, Any]], task: Task = TASK) -> tuple[Any, list[str]]:
    groups = groups_of(task, points)
    return groups[0], answer_of(task, points, groups)["sentences"]


# Paired differences from 10: of 1 (0.01, 0.00, 0.02): mean 0.01, error 0.01/sqrt(3); of 0.1: 0.1, 0.1, 0.13.
KNOWN = [
    point(0.1, [0.80, 0.82, 0.78]),
    point(1.0, [0.895, 0.92, 0.905]),
    point(10.0, [0.90, 0.92, 0.91]),
    point(None, [0.95, None, 0.97]),
]


def test_the_loosest_within_one_standard_error_is_chosen_and_what_diverges_is_not() -> None:
    group, said = answered(KNOWN)
    assert (group.best, group.chosen) == (2, 2)
    assert group.diverging == [3] and group.worse == [0] and set(group.noise) == {1, 2}
    verdicts = [group.verdict(place) for place in range(4)]
    assert verdicts == ["worse", "within noise", "chosen", "diverges"]
    assert said[0].startswith(
        "Limit 10 (the best; nothing looser is within one standard error of it). On the validation split acc"
    )
    assert "1 to 10 are within noise; worse: limit 0.1 (by 11.00 points)." in said
    assert "No clip diverges in 1 of 3 runs (Wilson 6 to 79 %)." in said


def test_the_words_of_the_issue() -> None:
    best, near = [0.91, 0.93, 0.92, 0.94, 0.90], [0.92, 0.92, 0.92, 0.93, 0.905]
    points = [point(limit, best) for limit in (0.1,)] + [
        point(1.0, near),
        point(10.0, [0.93, 0.91, 0.93, 0.91, 0.90]),
        point(None, [0.99, None, 0.99, None, 0.99]),
    ]
    group, said = answered(points)
    # 0.1: mean 0.920; 1: 0.919, differences -1, 1, 0, 1, -0.5 points, error 0.41; 10: 0.916, error 0.73.
    assert group.best == 0 and group.chosen == 2
    assert said[0].startswith(
        "Limit 10 (the loosest within one standard error of the best, limit 0.1)."
    )
    assert "0.1 to 10 are within noise." in said
    assert "No clip diverges in 2 of 5 runs (Wilson 12 to 77 %)." in said


def test_a_looser_setting_beyond_one_standard_error_is_not_chosen() -> None:
    # Differences 0.02, 0.02, 0.05: mean 0.03, error 0.01.
    points = [point(1.0, [0.92, 0.92, 0.95]), point(None, [0.90, 0.90, 0.90])]
    group, _ = answered(points)
    assert (group.chosen, group.noise) == (0, [0, 1])
    # 0.01 and 0.03 and -0.01: mean 0.01, error 0.0115.
    group, _ = answered([point(1.0, [0.91, 0.93, 0.89]), point(None, [0.90, 0.90, 0.90])])
    assert group.chosen == 1


def test_of_an_error_the_lowest_is_the_best() -> None:
    points = [point(1.0, [2.0, 2.1, 2.2]), point(None, [1.0, 1.1, 1.2])]
    group, said = answered(points, ERROR)
    assert (group.best, group.worse) == (1, [0])
    assert "Worse: limit 1 (by 1)." in said and "validation split" in said[0]
    assert said[0].startswith(
        "No clip (the best, and no other is looser). On the validation split mean_squared_error 1.1"
    )


def test_one_seed_claims_nothing() -> None:
    group, said = answered([point(1.0, [0.9]), point(None, [0.8])])
    assert [group.verdict(0), group.verdict(1)] == ["chosen", "undecided"]
    assert said[0].startswith("Limit 1 has the best validation accuracy.")
    # Of two that are equal the loosest is chosen, and it is the one whose test accuracy stands beside it.
    tied = [point(1.0, [0.9], accuracy={"mean": 0.7}), point(None, [0.9])]
    group, said = answered(tied)
    assert group.chosen == 1
    assert said[0].startswith(
        "No clip has the best validation accuracy, as limit 1 has, and is looser. On the validation split accuracy "
        "90.00 %, on the test split 90.00 %"
    )
    assert any(text.startswith("Too few seeds: one shows no noise") for text in said)
    assert not any("within noise" in text for text in said)


def test_the_seeds_that_are_needed() -> None:
    # Differences 0.03, -0.01, 0.01: mean 0.01, sd 0.02; t(2) 4.303 -> 0.0497; t(17) 2.110 * 0.02 / sqrt(18) < 0.01.
    points = [point(1.0, [0.93, 0.91, 0.92]), point(None, [0.90, 0.92, 0.91])]
    group, said = answered(points)
    found = group.as_dict()
    assert found["rival"] == 1 and found["seeds_needed"] == 18
    assert found["shows"] == pytest.approx(0.0496828, abs=1e-6)
    wanted = (
        "3 seeds are too few to tell no clip from the best: it is 1.00 points behind, and so many show 4.97 points; "
        "about 18 seeds are needed."
    )
    assert wanted in said
    assert said[-1].startswith("Below 6 seeds")


def test_everything_diverged() -> None:
    group, said = answered([point(1.0, [None, None]), point(None, [None, None])])
    assert group.chosen is None and group.diverging == [0, 1]
    assert said[0] == "Every setting diverged in all of its 2 runs"
    assert [group.verdict(k) for k in (0, 1)] == ["diverges", "diverges"]


def test_groups_are_sparsities_and_bits() -> None:
    points = [
        point(limit, [0.9 - cost, 0.91 - cost], sparsity=sparsity, bits=bits)
        for sparsity, bits, cost in ((0.0, None, 0.0), (0.9, None, 0.1), (0.9, 4, 0.2))
        for limit in (1.0, None)
    ]
    groups = groups_of(TASK, points)
    assert [group.chosen for group in groups] == [1, 3, 5]
    said = answer_of(TASK, points, groups)["sentences"]
    assert [text.partition(":")[0] for text in said if "split" in text] == [
        *("sparsity 0 %", "sparsity 90 %", "sparsity 90 %, 4 bits")
    ]


def test_whether_a_bound_helps_is_asked_at_the_chosen_clip() -> None:
    bound = "MaxNorm(2.0)"
    points = [
        point(1.0, [0.5, 0.52, 0.51]),
        point(1.0, [0.91, 0.93, 0.92], bound=bound),
        point(None, [0.4, 0.42, 0.44]),
        point(None, [0.41, 0.41, 0.44], bound=bound),
    ]
    group, said = answered(points)
    (found,) = bounds_of(group)
    assert (found["bound"], found["place"], found["without"], found["verdict"]) == (
        *(bound, 1, 0),
        "helps",
    )
    assert found["gain"] == pytest.approx(0.41)
    assert any(text.startswith(f"Bound {bound} helps: +41.00 points") for text in said)
    points[0]["scores"], points[0]["diverged"] = [0.5, None, 0.51], 1
    assert bounds_of(groups_of(TASK, points)[0])[0]["verdict"] == "helps"


def test_the_rate_is_named_where_it_is_at_an_end_and_where_limits_are_always_met() -> None:
    points = [
        point(1.0, [0.9, 0.92], rate=rate, clipped={"mean": 1.0}) for rate in (0.1, 0.01, 0.001)
    ]
    points[2]["scores"] = [0.95, 0.97]
    said = answered(points)[1]
    assert "The rate of the chosen setting, 0.001, is the lowest that was tried." in said
    assert not any("--rates" in text for text in said)
    alone = answered([point(1.0, [0.9, 0.92], clipped={"mean": 0.99}), point(None, [0.9, 0.9])])[1]
    assert any(text.startswith("Limit 1: met in at least 95 % of the steps") for text in alone)


def test_looseness_has_no_clip_last_and_rules_first() -> None:
    points = [
        point(None, [1.0], rule="AutoClip(20.0)"),
        point(0.1, [1.0], bound="MaxNorm(2.0)"),
        point(0.1, [1.0]),
        point(10.0, [1.0]),
        point(None, [1.0]),
    ]
    assert sorted(points, key=looseness) == points


def test_wilson_by_hand() -> None:
    # (0.4 + 1.92073 / 5) / 1.76829 = 0.44341, half 0.32595.
    assert wilson(2, 5) == pytest.approx((0.11762, 0.76928), abs=1e-4)
    assert wilson(0, 5)[0] == 0.0 and wilson(0, 5)[1] == pytest.approx(0.43448, abs=1e-4)
    assert wilson(5, 5)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=12),
)
def test_the_paired_test_is_scipys(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = Difference.of(first, second)
    assert found is not None and found.n == len(pairs)
    if found.sd is None or found.sd < 1e-9:
        return
    assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=1e-9)
    needed = found.needed()
    if needed is not None and needed > 2:

        def half(n: int) -> float:
            return float(stats.t.ppf(0.975, n - 1)) * (found.sd or 0.0) / math.sqrt(n)

        assert half(needed) < abs(found.mean) <= half(needed - 1) * (1 + 1e-9)


def test_holm_by_hand() -> None:
    assert adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted([]) == [] and adjusted([0.9, 0.8]) == [1.0, 1.0]


def test_pairs_without_a_common_seed_show_nothing() -> None:
    assert Difference.of([1.0, None], [None, 1.0]) is None
    alone = Difference.of([1.0], [0.5])
    assert alone is not None and alone.p is alone.error is alone.needed() is alone.shows() is None
    same = Difference.of([1.0, 2.0], [1.0, 2.0])
    assert same is not None and (same.p, same.needed()) == (1.0, None)


@pytest.mark.parametrize(
    "text",
    [
        *("ByGlobalNorm(1.0)", "AutoClip()", "AutoClip(20.0)", "ZClip(alpha=0.9)"),
        "Chain(ZClip(), ByGlobalNorm(1.0))",
    ],
)
def test_a_rule_is_a_text_and_back(text: str) -> None:
    assert text_of(rule_of(text)) == text


def test_texts_that_are_no_rule_are_refused() -> None:
    for text in (
        "",
        "1",
        "AutoClip(",
        "__import__('os').getcwd()",
        "AutoClip(*[1])",
        "(lambda: 1)()",
    ):
        with pytest.raises(InvalidArgument, match="not a clip"):
            rule_of(text)
    with pytest.raises(UnknownName, match="AutoClip"):
        rule_of("AutoClp(1)")
    with pytest.raises(InvalidArgument, match="other arguments"):
        rule_of("AutoClip(nope=1)")
    assert repr(rule_of("AutoClip")) == repr(rule_of("AutoClip()"))
    with pytest.raises(Unsupported, match="cannot be written"):
        text_of(clip.ByGlobalNorm(schedule.Linear(1.0, 0.1, (0, 100))))
