"""`karikomi.numpy`: what it takes and gives back, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported
from karikomi.rule import Decision, Quantity, Scope, Stateless, leave

G = np.array([3.0, 4.0])


@dataclass(frozen=True)
class Halve(Stateless):
    """Halve every unit; needs nothing."""

    scope: ClassVar[Scope] = Scope.UNIT
    of: ClassVar[Quantity] = Quantity.WEIGHT

    def decide(self, norms: Any, state: Any, *, present: Any, facts: Any, xp: Any) -> Any:
        return Decision(0.5 * xp.ones_like(norms), None, leave(xp)), state


@pytest.mark.parametrize("container", [list, tuple])
def test_a_sequence_comes_back_as_it_was(container: Any) -> None:
    found, outcome, _ = kk.numpy.clip(container([G, None]), kk.clip.ByNorm(1.0))
    assert type(found) is container and found[1] is None
    assert outcome.names == ("0", "1")


def test_a_generator_is_consumed_once_and_an_exhausted_one_refused() -> None:
    arrays = (array for array in [G, G])
    found, outcome, _ = kk.numpy.clip(arrays, kk.clip.ByGlobalNorm(1.0))  # type: ignore[type-var]
    assert len(found) == 2 and outcome.pre == pytest.approx(50**0.5)
    with pytest.raises(InvalidArgument, match="no array to act on; an exhausted generator"):
        kk.numpy.clip(arrays, kk.clip.ByGlobalNorm(1.0))  # type: ignore[type-var]


def test_scalars_of_numpy_are_arrays_without_axes() -> None:
    for number in (np.float32(3.0), np.array(3.0, dtype=np.float32)):
        for rule in (kk.clip.ByValue(1.0), kk.clip.ByNorm(1.0)):
            found, _, _ = kk.numpy.clip({"x": number}, rule)  # type: ignore[dict-item]
            assert isinstance(found["x"], np.ndarray) and found["x"].dtype == np.float32
            assert found["x"].shape == () and float(found["x"]) == 1.0


@pytest.mark.parametrize("function", ["clip", "bound"])
@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        (G, "not a dict or list of arrays; got ndarray"),
        (3, "not a dict or list of arrays; got int"),
        ({}, "there is no array to act on"),
        ({"w": np.arange(3)}, "w: not a floating array; got int64"),
        ({"w": [1.0]}, "w.0: not a floating array; got float"),
    ],
)
def test_what_is_no_array_is_refused(function: str, arrays: Any, text: str) -> None:
    rule = kk.clip.ByNorm(1.0) if function == "clip" else kk.bound.Clamp(1.0)
    with pytest.raises(InvalidArgument, match=rf"^numpy\.{function}: {text}"):
        getattr(kk.numpy, function)(arrays, rule)


def test_weights_are_never_absent() -> None:
    with pytest.raises(InvalidArgument, match="w: not a floating array; got NoneType"):
        kk.numpy.bound({"w": None}, kk.bound.Clamp(1.0))  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("limit", [0.1, 0.3, 0.7])
def test_a_clamp_that_stands_is_reported_as_standing(dtype: type, limit: float) -> None:
    weights = {"w": np.array([9.0, -9.0, 0.0, 0.0], dtype=dtype)}
    for _ in range(2):
        weights, outcome, _ = kk.numpy.bound(weights, kk.bound.Clamp(limit))
        assert outcome.share_at_bound == 0.5
    assert not outcome.engaged and weights["w"][0] == dtype(limit)


def test_a_limit_beyond_the_dtype_changes_nothing() -> None:
    half = {"w": np.array([65504.0, -1.0], dtype=np.float16)}
    found, outcome, _ = kk.numpy.clip(half, kk.clip.ByValue(1e30))
    assert np.array_equal(found["w"], half["w"]) and outcome.action == "kept"


def test_complex_entries_are_refused_by_element() -> None:
    mixed = {"a": G, "z": np.array([3 + 4j])}
    with pytest.raises(Unsupported, match="z: complex entries have no order to clamp by"):
        kk.numpy.clip(mixed, kk.clip.ByValue(9.0))
    with pytest.raises(Unsupported, match="z: complex entries have no order to clamp by"):
        kk.numpy.bound(mixed, kk.bound.Clamp(9.0))


def test_units_are_bounded_along_the_axis_that_is_named() -> None:
    weights = {"w": np.ones((2, 3)), "z": np.full((2, 2), 2 + 2j), "b": np.ones(2)}
    found, outcome, _ = kk.numpy.bound(weights, Halve(), unit_axes={"w": 1, "z": -1})
    assert outcome.names == ("w", "w", "w", "z", "z")
    np.testing.assert_array_equal(found["w"], 0.5)
    np.testing.assert_array_equal(found["z"], 1 + 1j)
    assert found["b"] is weights["b"]
    assert outcome.left_alone == {"b": "no unit axis was named"}


@pytest.mark.parametrize(
    ("axes", "error", "text"),
    [
        ({"w": 2}, InvalidArgument, r"w: the tensor has no such axis; got 2; .*\(2, 3\)"),
        (
            {"v": 0},
            UnknownName,
            r"numpy.bound \(unit_axes\): the pattern matches no tensor; got 'v'; known: w",
        ),
        ({}, InvalidArgument, "no tensor to bound; name unit axes"),
        (None, InvalidArgument, "no tensor to bound; name unit axes"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        kk.numpy.bound({"w": np.ones((2, 3))}, Halve(), unit_axes=axes)


def test_units_without_entries_are_no_error() -> None:
    for shape in [(0, 3), (3, 0)]:
        _, outcome, _ = kk.numpy.bound({"w": np.ones(shape)}, Halve(), unit_axes={"w": 0})
        assert len(outcome.norms) == shape[0] and outcome.pre == 0.0


def test_a_bad_weight_is_named_and_nothing_comes_back() -> None:
    weights = {"a": np.ones(2), "w": np.array([1.0, np.nan])}
    with pytest.raises(NonFinite, match="non-finite entries in w$"):
        kk.numpy.bound(weights, kk.bound.Clamp(0.5))


NORMALISED = {
    "stem": {"conv.weight": np.ones(2), "bn1.weight": np.ones(2), "bn1.bias": np.ones(2)},
    "norm": [{"scale": np.ones(2), "mean": np.ones(2)}],
    "BatchNorm_0": {"scale": np.ones(2), "var": np.ones(2)},
    "gamma": np.ones(2),
}


def test_gains_and_statistics_are_spared_unless_they_are_selected() -> None:
    rule = kk.bound.Clamp(0.25)
    spared = [
        "stem.bn1.weight",
        "norm.0.scale",
        "norm.0.mean",
        "BatchNorm_0.scale",
        "BatchNorm_0.var",
        "gamma",
    ]
    found, outcome, state = kk.numpy.bound(NORMALISED, rule)
    assert list(outcome.left_alone) == spared
    assert found["BatchNorm_0"]["var"][0] == found["stem"]["bn1.weight"][0] == 1.0
    assert found["stem"]["conv.weight"][0] == found["stem"]["bn1.bias"][0] == 0.25
    assert kk.numpy.bound(NORMALISED, rule, state)[0]["gamma"][0] == 1.0
    earlier = {key: value for key, value in state.items() if key != "spared"}
    for again in range(2):
        found, outcome, earlier = kk.numpy.bound(NORMALISED, rule, earlier)
        assert found["gamma"][0] == 0.25 and not outcome.left_alone, again
    assert not kk.numpy.bound(NORMALISED, rule, only="*")[1].left_alone
    found, outcome, _ = kk.numpy.bound(NORMALISED, rule, only="*.scale", exclude="norm.*")
    assert outcome.names == ("BatchNorm_0.scale",) and found["norm"][0]["scale"][0] == 1.0
    assert outcome.left_alone["gamma"] == "not selected"
    with pytest.raises(InvalidArgument, match="no tensor to bound; .*gamma: a gain"):
        kk.numpy.bound({"gamma": np.ones(2)}, rule)
