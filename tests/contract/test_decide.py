"""Every rule decides the same in every array namespace, and asks for nothing that is not listed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from contract.deciding import judge
from contract.namespaces import COMPILED, INSTALLED, NAMES, Guard, Place, load_quietly
from contract.namespaces import place as place_of
from contract.row import Row
from contract.rows import DECIDING, EAGER, ROWS
from depth import FULL, turns
from karikomi import registry
from karikomi.bound import QKClip
from karikomi.functional.library import MEASURE_OPERATIONS
from karikomi.rule import ARRAY_OPERATIONS, Composite, Scope
from karikomi.rules import decide
from karikomi.schedule import Linear

NAN, INF = float("nan"), float("inf")

SERIES = [
    ([0.5, 0.25, 0.125], [True, True, True]),
    ([3.0, 0.0, 4.0], [True, True, True]),
    ([NAN, 2.0, 1.0], [True, True, True]),
    ([7.0, INF, 0.1], [True, True, True]),
    ([2.0, 0.0, 0.3], [True, False, True]),
    ([0.0, 0.0, 0.0], [False, False, False]),
    ([1e-30, 1e30, 1.0], [True, True, True]),
    ([1e30, 1e30, 1e30], [True, True, True]),
    ([1.0, 1.0, 1.0], [True, True, True]),
    ([0.9, 1.7, 0.2], [True, True, True]),
]


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    return place_of(request.param)


def _facts(row: Row, dtype: type, xp: Any) -> dict[str, Any]:
    """Return what measure would bring for three tensors, of what the rule asks for."""
    facts = {"weights": [1.0, 0.0, 1e-2], "sizes": [9.0, 1.0, 0.0], "fan_in": [3.0, 1.0, 64.0]}
    return {
        key: xp.asarray(np.array(value, dtype=dtype))
        for key, value in facts.items()
        if key in row.rule.needs
    }


def _plain(verdict: decide.StageDecision, state: dict[str, Any]) -> dict[str, np.ndarray]:
    values = {**verdict._asdict(), **state}
    return {key: np.asarray(value) for key, value in values.items() if value is not None}


def _judged(row: Row, place: Place, dtype: type, nonfinite: str) -> list[dict[str, np.ndarray]]:
    """Return verdict and state after each step of the series."""
    xp = place.xp

    def step(norms: Any, present: Any, facts: Any, state: Any) -> Any:
        return judge(
            row.rule, norms, state, present=present, xp=xp, nonfinite=nonfinite, facts=facts
        )

    with place.around():
        compiled, facts = place.compiled(step), _facts(row, dtype, xp)
        series = [
            (xp.asarray(np.array(norms, dtype=dtype)), xp.asarray(np.array(present)))
            for norms, present in SERIES
        ]
        state, rows = decide.begin(row.rule, series[0][0], xp=xp), []
        for norms, present in series:
            verdict, state = compiled(norms, present, facts, state)
            rows.append(_plain(verdict, state))
    return rows


def _compare(found: Any, expected: Any, rounding: float, dtype: type) -> None:
    tiny = float(np.finfo(np.float32).tiny) if dtype is np.float32 else 0.0
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value.shape == theirs[key].shape, (number, key)
            where = f"step {number}: {key}"
            np.testing.assert_allclose(value, theirs[key], rtol=rounding, atol=tiny, err_msg=where)


def _rounding(place: Place, dtype: type) -> float:
    return place.rounding if dtype is np.float64 else 1e-6


@functools.cache
def _expected(row: Row, nonfinite: str) -> list[dict[str, np.ndarray]]:
    return _judged(row, place_of("numpy"), np.float64, nonfinite)


def _name(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


# A rule sees nothing of the policy, so one of each kind of answer shows it: limit, joint, by tensor.
ANSWERS = {"ByValue", "ByGlobalNorm", "TensorEMA"}
POLICIES = [(row, "skip", [np.float32, np.float64]) for row in DECIDING]
POLICIES += [(row, "zero", dtypes) for row, _, dtypes in POLICIES if str(row) in ANSWERS]
POLICIES += [(row, "skip", [np.float64]) for row in EAGER]
QUICK = {"numpy", "torch"}
JUDGED = [
    (row, nonfinite, dtype, name)
    for place, (row, nonfinite, dtypes) in enumerate(POLICIES)
    for number, name in enumerate(NAMES)
    if FULL or name not in COMPILED or (place + number // 2) % 2
    for dtype in (dtypes if name in QUICK else turns(dtypes, row, nonfinite, name))
]


@pytest.mark.parametrize(
    ("row", "nonfinite", "dtype", "place"), JUDGED, ids=_name, indirect=["place"]
)
def test_judgement_is_the_same_everywhere(
    row: Row, place: Place, dtype: type, nonfinite: str
) -> None:
    expected = _expected(row, nonfinite)
    found = _judged(row, place, dtype, nonfinite)
    _compare(found, expected, _rounding(place, dtype), dtype)


DECIDED = [
    (row, name, dtype)
    for row in DECIDING
    for name in NAMES
    if name not in COMPILED  # there the judgement above is this and more
    for dtype in turns([np.float32, np.float64], row, name)
]


@pytest.mark.parametrize(("row", "place", "dtype"), DECIDED, ids=_name, indirect=["place"])
def test_decide_is_the_same_everywhere(row: Row, place: Place, dtype: type) -> None:
    def decisions(place: Place, dtype: type) -> list[dict[str, np.ndarray]]:
        xp, rows = place.xp, []

        def step(norms: Any, present: Any, facts: Any, state: Any) -> Any:
            return row.rule.decide(norms, state, present=present, facts=facts, xp=xp)

        with place.around():
            compiled, state, measured = place.compiled(step), None, _facts(row, dtype, xp)
            for number, (norms, present) in enumerate(SERIES):
                if not np.isfinite(norms).all():
                    continue
                if row.rule.scope is Scope.GLOBAL:
                    norms, present = norms[:1], [any(present)]
                vector = xp.asarray(np.array(norms, dtype=dtype))
                if state is None:
                    state = row.rule.init(vector, xp=xp)
                counts = {"step": number, "skipped_in_a_row": 0}
                counts = {k: xp.asarray(np.array(v, dtype=dtype)) for k, v in counts.items()}
                decision, state = compiled(
                    vector, xp.asarray(np.array(present)), {**measured, **counts}, state
                )
                rows.append(_plain(decision, state))
        return rows

    expected = decisions(place_of("numpy"), np.float64)
    _compare(decisions(place, dtype), expected, _rounding(place, dtype), dtype)


def test_every_registered_clip_and_bound_has_a_row() -> None:
    rows = {(row.kind, type(row.rule)) for row in ROWS}
    registered = {(e.kind, e.thing) for kind in ("clip", "bound") for e in registry.entries(kind)}
    # What is made of rules decides nothing by itself, and QKClip needs attention: see `bound_rows`.
    deciding = {(kind, thing) for kind, thing in registered if not _has(thing, Composite)}
    assert deciding - {("bound", QKClip)} == rows


def _has(thing: type, protocol: type) -> bool:
    """Return whether a class has all members of a protocol, some of which are no methods."""
    members = {name for name in vars(protocol) if not name.startswith("_")}
    return all(hasattr(thing, name) for name in members)


def test_the_list_of_operations_holds_nothing_unused() -> None:
    for row in DECIDING:
        _judged(row, place_of("numpy"), np.float64, "zero")
    Linear(1.0, 2.0, steps=(0, 4)).value(np.asarray(1.0), xp=place_of("numpy").xp)
    assert Guard.used == ARRAY_OPERATIONS


def test_the_guard_refuses_other_names() -> None:
    with pytest.raises(AssertionError, match="quantile"):
        _ = Guard(np).quantile


if "tensorflow" in INSTALLED:

    def test_the_adapter_offers_exactly_what_is_asked_for() -> None:
        adapter = load_quietly("karikomi.keras.arrays.tensorflow_namespace").TensorFlowNamespace
        offered = {name for name in dir(adapter) if not name.startswith("_")}
        assert offered == MEASURE_OPERATIONS
