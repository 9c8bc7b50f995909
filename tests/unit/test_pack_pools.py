"""Which tensors are coded together: pools have an end, and slow levels are counted over the whole file."""

from __future__ import annotations

import numpy as np
import pytest

from karikomi.pack.codecs import adaptive
from karikomi.pack.groups import pools
from karikomi.pack.stored import describe


def test_a_pool_ends_before_it_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "MOST_POOLED", 1_000)
    generator = np.random.default_rng(0)
    made = pools.Pools()
    ended = [
        [stored.name for plan in made.add(describe(name, array)) for stored in plan[0]]
        for name, array in {n: generator.normal(size=400).astype("f4") for n in "abc"}.items()
    ]
    assert ended == [[], [], ["a", "b"]]
    assert [stored.name for plan in made.close() for stored in plan[0]] == ["c"]


def test_slow_levels_are_those_of_all_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "SLOW_LEVELS", 5_000)
    monkeypatch.setattr(pools, "LARGE", 2_000)
    generator = np.random.default_rng(0)
    spread = np.exp(np.repeat(generator.normal(size=20), 100))
    levels = np.rint(generator.laplace(size=2_000) * spread).astype("i2")
    made = pools.Pools()
    codecs = [plan[1].codec for name in "abc" for plan in made.add(describe(name, levels))]
    assert codecs[:2] == [adaptive.NAME] * 2 and codecs[2] != adaptive.NAME
    assert made.slow_left == 1_000
