"""The selection by counts removes exactly what a stable sort would remove."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karikomi.errors import InvalidArgument
from karikomi.prune import Threshold, threshold
from karikomi.prune.radix_threshold import Count, keys, shift

SCORES = st.lists(
    st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=True),
        st.sampled_from([0.0, -0.0, 0.5, -0.5, 0.50000006, 1.0, 1e-45]),
    ),
    min_size=1,
    max_size=60,
)


def counter(scores: np.ndarray) -> Count:
    every = keys(scores)

    def count(low: int, high: int) -> tuple[int, np.ndarray]:
        inside = every[(every >= low) & (every <= high)]
        places = (inside - low) >> shift(low, high)
        bins = np.bincount(places, minlength=((high - low) >> shift(low, high)) + 1)
        return int(np.count_nonzero(every < low)), bins

    return count


def removed(scores: np.ndarray, found: Threshold) -> np.ndarray:
    equal = np.flatnonzero(scores == found.value)
    return np.sort(np.concatenate([np.flatnonzero(scores < found.value), equal[: found.ties]]))


@given(SCORES, st.data())
def test_equals_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    scores = np.array(values, np.float32)
    remove = data.draw(st.integers(0, len(values)))
    found = removed(scores, threshold(counter(scores), remove))
    assert found.tolist() == sorted(np.argsort(scores, kind="stable")[:remove].tolist())


@given(SCORES, SCORES, st.data())
def test_no_sample_changes_the_result(
    values: list[float], sample: list[float], data: st.DataObject
) -> None:
    scores, drawn = np.array(values, np.float32), np.array(sample, np.float32)
    remove = data.draw(st.integers(0, len(values)))
    expected = threshold(counter(scores), remove)
    assert threshold(counter(scores), remove, sample=keys(drawn), total=len(scores)) == expected


def test_a_fair_sample_spares_most_of_the_counting() -> None:
    scores = np.random.default_rng(0).exponential(size=200_000).astype(np.float32)
    inside = []

    def count(low: int, high: int) -> tuple[int, np.ndarray]:
        below, bins = counter(scores)(low, high)
        inside.append(bins.sum())
        return below, bins

    threshold(count, 180_000, sample=keys(scores[::20]), total=len(scores))
    assert sum(inside) < 0.05 * len(scores)


@pytest.mark.parametrize("remove", [0, 1, 7, 10])
def test_all_scores_equal(remove: int) -> None:
    scores = np.full(10, 0.25, np.float32)
    found = removed(scores, threshold(counter(scores), remove))
    assert found.tolist() == list(range(remove))


def test_histograms_of_shards_add_up() -> None:
    scores = np.random.default_rng(0).exponential(size=5_000).astype(np.float32)
    one, other = counter(scores[:1_234]), counter(scores[1_234:])
    whole = threshold(counter(scores), 4_321)

    def both(low: int, high: int) -> tuple[int, np.ndarray]:
        first, second = one(low, high), other(low, high)
        return first[0] + second[0], first[1] + second[1]

    assert threshold(both, 4_321) == whole


@pytest.mark.parametrize("remove", [-1, 4])
def test_more_than_there_are_is_refused(remove: int) -> None:
    with pytest.raises(InvalidArgument, match="allowed: 0 to 3"):
        threshold(counter(np.ones(3, np.float32)), remove)
