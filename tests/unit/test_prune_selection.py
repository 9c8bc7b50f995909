"""The radix selection removes exactly what a stable sort would remove."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from niwaki.errors import InvalidArgument
from niwaki.prune import Threshold, threshold
from niwaki.prune.selection import Count

SCORES = st.lists(
    st.one_of(
        st.floats(0, width=32, allow_nan=False, allow_infinity=True),
        st.sampled_from([0.0, 0.5, 0.5000001, 1.0, 1e-45]),
    ),
    min_size=1,
    max_size=60,
)


def counter(scores: np.ndarray) -> Count:
    bits = scores.view(np.uint32)

    def count(prefix: int | None) -> np.ndarray:
        chosen = bits >> 16 if prefix is None else bits[bits >> 16 == prefix] & 0xFFFF
        return np.bincount(chosen, minlength=65536)

    return count


def removed(scores: np.ndarray, found: Threshold) -> np.ndarray:
    bits = scores.view(np.uint32)
    equal = np.flatnonzero(bits == found.bits)
    return np.sort(np.concatenate([np.flatnonzero(bits < found.bits), equal[: found.ties]]))


@given(SCORES, st.data())
def test_equals_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    scores = np.abs(np.array(values, np.float32))
    remove = data.draw(st.integers(0, len(values)))
    found = removed(scores, threshold(counter(scores), remove))
    assert found.tolist() == sorted(np.argsort(scores, kind="stable")[:remove].tolist())


@pytest.mark.parametrize("remove", [0, 1, 7, 10])
def test_all_scores_equal(remove: int) -> None:
    scores = np.full(10, 0.25, np.float32)
    found = removed(scores, threshold(counter(scores), remove))
    assert found.tolist() == list(range(remove))


def test_histograms_of_shards_add_up() -> None:
    scores = np.random.default_rng(0).exponential(size=5_000).astype(np.float32)
    one, other = counter(scores[:1_234]), counter(scores[1_234:])
    whole = threshold(counter(scores), 4_321)
    assert threshold(lambda prefix: one(prefix) + other(prefix), 4_321) == whole


@pytest.mark.parametrize("remove", [-1, 4])
def test_more_than_there_are_is_refused(remove: int) -> None:
    with pytest.raises(InvalidArgument, match="allowed: 0 to 3"):
        threshold(counter(np.ones(3, np.float32)), remove)
