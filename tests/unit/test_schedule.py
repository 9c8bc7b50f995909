"""Schedules: exact at their ends, constant outside, monotone between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import karikomi as kk
from karikomi import spec
from karikomi.errors import InvalidArgument
from karikomi.schedule import Cubic, Linear, Schedule, Stepwise, value_at

ends = st.floats(-1e6, 1e6)
steps = st.tuples(st.integers(0, 1000), st.integers(1, 10_000)).map(lambda p: (p[0], p[0] + p[1]))


@pytest.mark.parametrize("shape", [Linear, Cubic])
@given(start=ends, stop=ends, steps=steps)
def test_the_ends_are_exact_and_hold_outside(
    shape: Any, start: float, stop: float, steps: tuple[int, int]
) -> None:
    schedule = shape(start, stop, steps=steps)
    assert isinstance(schedule, Schedule)
    assert schedule.at(steps[1]) == schedule.at(steps[1] + 1) == schedule.at(10**9) == stop
    assert schedule.at(steps[0]) == schedule.at(0)
    assert schedule.at(0) == pytest.approx(start, rel=1e-12, abs=1e-12 * abs(stop))


@pytest.mark.parametrize("shape", [Linear, Cubic])
@given(start=ends, stop=ends, steps=steps, data=st.data())
def test_between_its_ends_it_goes_one_way(
    shape: Any, start: float, stop: float, steps: tuple[int, int], data: st.DataObject
) -> None:
    first, second = sorted(data.draw(st.tuples(st.integers(*steps), st.integers(*steps))))
    schedule = shape(start, stop, steps=steps)
    values = [start, schedule.at(first), schedule.at(second), stop]
    slack = 1e-12 * max(abs(start), abs(stop), 1.0)
    assert (np.diff(values) * np.sign(stop - start) >= -slack).all()


def test_the_cubic_is_the_paper_s() -> None:
    cubic = Cubic(0.0, 0.9, steps=(10, 110))
    for step in (10, 25, 60, 99, 110):
        assert cubic.at(step) == pytest.approx(0.9 + (0.0 - 0.9) * (1 - (step - 10) / 100) ** 3)


def test_a_number_takes_the_dtype_of_the_step() -> None:
    assert value_at(1, np.asarray(0.0, dtype=np.float32), xp=np).dtype == np.float32
    scheduled = value_at(Linear(1.0, 2.0, steps=(0, 4)), np.asarray(1.0, np.float32), xp=np)
    assert float(scheduled) == 1.25


def test_a_value_below_zero_is_taken_for_zero() -> None:
    falling = Linear(1.0, -1.0, steps=(0, 4))
    values = [float(value_at(falling, np.asarray(step), xp=np)) for step in (0.0, 1.0, 3.0, 9.0)]
    assert values == [1.0, 0.5, 0.0, 0.0]
    assert falling.at(3) == -0.5


@pytest.mark.parametrize("shape", [Linear, Cubic])
@pytest.mark.parametrize(
    ("start", "stop", "steps", "text"),
    [
        (float("nan"), 1.0, (0, 1), "start and stop must be finite"),
        (0.0, float("inf"), (0, 1), "start and stop must be finite"),
        ("a", 1.0, (0, 1), "start and stop must be finite"),
        (0.0, True, (0, 1), "start and stop must be finite"),
        (0.0, 1.0, (1, 1), "0 <= first < last"),
        (0.0, 1.0, (-1, 1), "0 <= first < last"),
        (0.0, 1.0, (0, 1, 2), "0 <= first < last"),
        (0.0, 1.0, 5, "0 <= first < last"),
        (0.0, 1.0, ("a", "b"), "0 <= first < last"),
        (0.0, 1.0, (0.5, 2), "0 <= first < last"),
    ],
)
def test_what_is_no_schedule_is_refused(
    shape: Any, start: Any, stop: Any, steps: Any, text: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"^{shape.__name__}: .*{text}"):
        shape(start, stop, steps=steps)


@pytest.mark.parametrize("shape", [Linear, Cubic])
def test_numbers_of_numpy_are_stored_as_python_s(shape: Any) -> None:
    found = shape(np.float32(0.5), np.int64(2), steps=(np.int64(0), np.uint8(9)))
    assert found == shape(0.5, 2, steps=(0, 9))
    assert [type(v) for v in (found.start, found.stop, *found.steps)] == [float, int, int, int]


def test_a_stepwise_limit_is_a_warm_up() -> None:
    warm = Stepwise(((0, float("inf")), (2, 1.0), (3, 0.5)))
    assert isinstance(warm, Schedule)
    assert [warm.at(step) for step in range(5)] == [float("inf"), float("inf"), 1.0, 0.5, 0.5]
    state, sizes = None, []
    for _ in range(4):
        _, outcome, state = kk.numpy.clip([np.array([3.0])], kk.clip.ByGlobalNorm(warm), state)
        sizes.append(outcome.post)
    assert sizes == [3.0, 3.0, 1.0, 0.5]
    rule = kk.clip.ByNorm(warm)
    assert spec.from_dict(spec.to_dict(rule)) == rule


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((1, 1.0),),
        ((0, 1.0), (0, 2.0)),
        ((0, 1.0), (5, 1.0), (3, 1.0)),
        ((0, float("nan")),),
        ((0, 1.0), 3),
        ((0.5, 1.0),),
        ((0, True),),
    ],
)
def test_points_that_are_no_schedule_are_refused(points: Any) -> None:
    with pytest.raises(InvalidArgument, match="^Stepwise: points must be"):
        Stepwise(points)


def test_a_limit_that_is_ever_below_zero_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="must be positive"):
        kk.clip.ByNorm(Stepwise(((0, 1.0), (5, -1.0))))
