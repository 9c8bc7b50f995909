"""Schedules of pruning: when masks change, by how much, and weights that move from place to place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import karikomi as kk
from karikomi import spec
from karikomi.errors import InvalidArgument, KarikomiError, NonFinite, UnknownName, Unsupported
from karikomi.prune import NofM
from karikomi.prune.schedules.dynamic import SET, RigL
from karikomi.prune.schedules.gradual import Gradual
from karikomi.prune.schedules.iterative import Iterative
from karikomi.prune.schedules.one_shot import OneShot
from karikomi.prune.schedules.pruning_schedule import PruningSchedule
from karikomi.torch.sparse_training.regrowth import (
    check_whole,
    forget_moments_,
    lowest,
    noise,
    rewired,
)

SCHEDULES: dict[str, PruningSchedule] = {
    "one-shot": OneShot(0.9, step=7),
    "one-shot at 0": OneShot(0.5),
    "gradual": Gradual(0.9, steps=(3, 40), every=5, initial=0.2),
    "iterative": Iterative(0.9, steps=(5, 47), rounds=4, rewind=2),
    "set": SET(0.9, until=41, every=10),
    "rigl": RigL(0.9, until=41, every=10),
}
every_schedule = pytest.mark.parametrize("rule", SCHEDULES.values(), ids=SCHEDULES)


@every_schedule
def test_what_every_schedule_promises(rule: PruningSchedule) -> None:
    due = [step for step in range(200) if rule.due(step)]
    shares = [rule.sparsity_at(step) for step in range(200)]
    assert due and due[-1] <= rule.last < 60
    assert shares == sorted(shares) and shares[-1] == rule.sparsity == shares[rule.last]
    assert rule.score and rule.pattern == "unstructured" and rule.only is rule.exclude is None
    assert all(0.0 <= rule.drop_at(step) < 1.0 for step in due)
    assert (rule.regrows_by is None) == (rule.drop_at(due[0]) == 0.0)


@every_schedule
def test_a_schedule_as_data_and_back(rule: PruningSchedule) -> None:
    plain = spec.to_dict(rule, "prune")
    assert spec.from_dict(plain, "prune") == rule
    with pytest.raises(UnknownName, match="unknown key"):
        spec.from_dict({**plain, "sparsitty": 0.5}, "prune")


class Mine(PruningSchedule):
    """A schedule of one's own, of a field that is left out or says nothing known."""

    def __init__(self, **wrong: Any) -> None:
        fields = {"sparsity": 0.5, "score": "magnitude", "allocation": None}
        fields |= {"pattern": "unstructured", "only": None, "exclude": None, **wrong}
        for name, value in fields.items():
            if value is not ...:
                setattr(self, name, value)

    def due(self, step: int) -> bool:
        return step == 2

    def sparsity_at(self, step: int) -> float:
        return 0.5 if step > 1 else 0.0

    @property
    def last(self) -> int:
        return 2


WRONG: list[tuple[dict[str, Any], type[KarikomiError], str]] = [
    ({"score": "magnitud"}, UnknownName, "magnitude"),
    ({"score": 3}, InvalidArgument, "not a score"),
    ({"score": ...}, InvalidArgument, "got no score"),
    ({"pattern": "unitts"}, UnknownName, "units"),
    ({"pattern": ...}, InvalidArgument, "got no pattern"),
    ({"allocation": "globl"}, UnknownName, "global"),
    ({"allocation": ["erk"]}, InvalidArgument, "registered name"),
    ({"only": 5}, InvalidArgument, "Mine.only"),
    ({"exclude": ...}, InvalidArgument, "got no exclude"),
]


@pytest.mark.parametrize(("wrong", "error", "said"), WRONG)
def test_what_a_schedule_of_ones_own_says_wrongly_is_named_before_the_first_step(
    wrong: dict[str, Any], error: type[KarikomiError], said: str
) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (
        lambda: kk.torch.attach(optimizer, model, prune=Mine(**wrong)),
        lambda: kk.numpy.prune_at({"a": np.ones(4)}, Mine(**wrong), 1),
    ):
        with pytest.raises(error, match=said) as raised:
            call()
        assert "\n" not in str(raised.value)
    handle = kk.torch.attach(optimizer, model, prune=Mine())
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    assert handle.sparsity == 0.5


@given(st.integers(0, 60), st.integers(2, 12), st.integers(0, 300), st.floats(0.01, 0.99))
def test_each_round_removes_the_same_share_of_what_is_left(
    first: int, rounds: int, spare: int, sparsity: float
) -> None:
    last = first + rounds - 1 + spare
    rule = Iterative(sparsity, steps=(first, last), rounds=rounds)
    due = [step for step in range(last + 50) if rule.due(step)]
    assert len(due) == rounds and (due[0], due[-1]) == (first, last)
    exact = first + np.arange(rounds) * (last - first) / (rounds - 1)
    assert np.abs(np.array(due) - exact).max() <= 0.5
    left = [1.0] + [1.0 - rule.sparsity_at(step) for step in due]
    ratios = [after / before for before, after in zip(left, left[1:], strict=False)]
    np.testing.assert_allclose(ratios, (1.0 - sparsity) ** (1.0 / rounds), rtol=1e-9)
    assert rule.sparsity_at(first - 1) == 0.0 and rule.sparsity_at(last) == sparsity


@given(st.integers(1, 2_000), st.integers(1, 200), st.floats(0.01, 0.99))
def test_the_share_that_moves_falls_along_a_cosine(until: int, every: int, drop: float) -> None:
    rule = RigL(0.5, until=until, every=every, drop=drop)
    due = [step for step in range(until + every + 1) if rule.due(step)]
    assert due == list(range(0, until, every))
    shares = [rule.drop_at(step) for step in due]
    assert shares == sorted(shares, reverse=True) and shares[0] == drop
    assert math.isclose(rule.drop_at(until), 0.0, abs_tol=1e-12)
    assert math.isclose(2.0 * rule.drop_at(until // 2), drop, rel_tol=4.0 / until)
    still = SET(0.5, until=until, every=every, drop=drop)
    assert {still.drop_at(step) for step in due} == {drop}


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: OneShot(1.0), InvalidArgument, "OneShot.sparsity"),
        (lambda: OneShot(0.5, step=-1), InvalidArgument, "step: .*>= 0"),
        (lambda: OneShot(0.5, score="magnitud"), UnknownName, "did you mean 'magnitude'"),
        (lambda: OneShot(0.5, pattern="unit"), UnknownName, "did you mean 'units'"),
        (lambda: OneShot(0.5, pattern=NofM(keep=1, of=4)), InvalidArgument, "allowed: 0.75"),
        (lambda: Gradual(0.5, steps=(0, 9), pattern="2:4"), InvalidArgument, "OneShot"),
        (lambda: Iterative(0.5, steps=(0, 9), rounds=1), InvalidArgument, "rounds: .*>= 2"),
        (lambda: Iterative(0.5, steps=(0, 9), rounds=11), InvalidArgument, "2 to 10"),
        (lambda: Iterative(0.5, steps=(4, 9), rounds=2, rewind=5), InvalidArgument, "0 to 4"),
        (
            lambda: Iterative(0.5, steps=(4, 9), rounds=2, rewind=-1),
            InvalidArgument,
            "rewind: .*>= 0",
        ),
        (lambda: Iterative(0.5, steps=(9, 4), rounds=2), InvalidArgument, "first < last"),
        (lambda: SET(0.5, until=0), InvalidArgument, "until: .*>= 1"),
        (lambda: SET(0.5, until=9, drop=1.0), InvalidArgument, "SET.drop"),
        (lambda: RigL(0.5, until=9, every=0), InvalidArgument, "every: .*>= 1"),
        (lambda: RigL(0.5, until=9, seed=0.5), InvalidArgument, "seed: .*got 0.5"),
        (lambda: RigL(0.5, until=9, allocation="erkk"), UnknownName, "did you mean 'erk'"),
    ],
)
def test_bad_arguments(make: Any, error: type[KarikomiError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_pattern_with_a_share_of_its_own_goes_at_once() -> None:
    assert OneShot(0.75, pattern=NofM(keep=1, of=4)).pattern_says
    assert OneShot(0.5, pattern="2:4").pattern_says and not OneShot(0.5).pattern_says


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.data())
def test_the_lowest_are_those_of_a_stable_sort(numbers: list[int], data: st.DataObject) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    marks = data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)))
    among = torch.tensor(marks)
    count = data.draw(st.integers(0, int(among.sum())))
    places = [place for place in range(len(numbers)) if marks[place]]
    expected = sorted(places, key=lambda place: (numbers[place], place))[:count]
    assert lowest(values, among, count).nonzero().flatten().tolist() == sorted(expected)


@given(st.integers(1, 40), st.integers(0, 40), st.floats(0.0, 0.99), st.integers(0, 5))
def test_as_many_weights_come_as_go(size: int, kept: int, share: float, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    mask = torch.randperm(size, generator=drawn).reshape(-1, 1) < kept
    weight = torch.randn(size, 1, generator=drawn) * mask
    worth = torch.rand(size, 1, generator=drawn)
    after = rewired({"w": weight}, {"w": mask}, {"w": worth}, share)["w"]
    assert int(after.sum()) == int(mask.sum())
    moved = int(share * int(mask.sum()))
    assert int((mask & ~after).sum()) <= moved
    survivors = weight.abs()[mask & after]
    lost = weight.abs()[mask & ~after]
    assert len(lost) == 0 or lost.max() <= weight.abs()[mask].sort().values[max(moved - 1, 0)]
    assert len(survivors) + len(lost) == int(mask.sum())


def test_weights_and_gradients_that_are_all_equal_move_by_their_place() -> None:
    mask = torch.tensor([True, False, True, False, True, False, True, False])
    ones = {"w": mask.float()}
    after = rewired(ones, {"w": mask}, {"w": torch.ones(8)}, 0.5)["w"]
    # The first two of the kept go, and the first two of all that is masked then come: 0 at once again.
    assert after.tolist() == [True, True, False, False, True, False, True, False]


def test_what_has_no_worth_stays_and_nan_is_named() -> None:
    mask = torch.tensor([True, False])
    assert rewired({"w": torch.ones(2)}, {"w": mask}, {}, 0.9)["w"] is mask
    wrong = torch.tensor([float("nan"), 0.0])
    with pytest.raises(NonFinite, match="^w: "):
        rewired({"w": torch.ones(2)}, {"w": mask}, {"w": wrong}, 0.9)


def test_noise_is_of_the_seed_the_step_and_the_name_alone() -> None:
    weights = {"a": torch.empty(3, 5), "b": torch.empty(3, 5)}
    first = noise(weights, 1, 2)
    again = noise({"b": weights["b"]}, 1, 2)
    assert torch.equal(first["b"], again["b"]) and not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["b"], noise(weights, 2, 2)["b"])
    assert not torch.equal(first["b"], noise(weights, 1, 3)["b"])


def test_moments_of_what_is_or_was_masked_are_zero() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adam([weight], lr=0.1, amsgrad=True)
    weight.grad = torch.ones(4)
    optimizer.step()
    infinite = optimizer.state[weight]["exp_avg_sq"]
    infinite[0] = math.inf
    before = {"w": torch.tensor([False, False, True, True])}
    after = {"w": torch.tensor([False, True, False, True])}
    forget_moments_(optimizer, {"w": weight}, before, after)
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        moment = optimizer.state[weight][name]
        assert (moment != 0).tolist() == [False, False, False, True], name
    assert float(optimizer.state[weight]["step"]) == 1.0


def test_sharded_weights_do_not_move() -> None:
    class Sharded(torch.Tensor):
        def to_local(self) -> torch.Tensor:
            return self

    with pytest.raises(Unsupported, match="sharded.*got w"):
        check_whole({"w": torch.ones(2).as_subclass(Sharded)}, where="torch.attach(prune)")
