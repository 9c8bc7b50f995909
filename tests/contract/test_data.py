"""Rules and their state as data: continued bit for bit, written and read back the same."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

import niwaki as nw
from contract.frameworks import Apply
from contract.rows import LIMITED, ROWS, Row
from contract.test_laws import assert_equal, cases, sample
from niwaki import conduct, spec
from niwaki.errors import InvalidArgument, Refused
from niwaki.rule import Rule, Scope

SERIES = [sample(seed, scale=2.0 ** (seed - 2)) for seed in range(6)]


@dataclasses.dataclass(frozen=True)
class Misfit(Row):
    """Takes the way of a kind through a driver, whatever its rule is."""

    way: str = ""

    @property
    def kind(self) -> str:
        return self.way


def _run(row: Row, apply: Apply, state: Any, start: int) -> tuple[list[dict], list[Any]]:
    results, states = [], []
    for tensors in SERIES[start:]:
        found, _, state = apply(row, tensors, state)
        results.append(found)
        states.append(state)
    return results, states


@cases(ROWS)
@pytest.mark.parametrize("stop", range(len(SERIES)))
def test_a_saved_state_continues_bit_for_bit(row: Row, apply: Apply, stop: int) -> None:
    whole, states = _run(row, apply, None, 0)
    _, outcome, _ = apply(row, SERIES[0])
    text = json.dumps(conduct.to_plain(states[stop]), allow_nan=False)
    fresh = conduct.begin(row.rule, np.zeros(len(outcome.norms)), xp=np)
    restored = conduct.from_plain(json.loads(text), fresh, xp=np)
    rest, after = _run(row, apply, restored, stop + 1)
    for found, expected in zip(rest, whole[stop + 1 :], strict=True):
        assert_equal(found, expected)
    for found, expected in zip(after, states[stop + 1 :], strict=True):
        assert conduct.to_plain(found) == conduct.to_plain(expected)
        assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_state_of_something_else_is_refused(row: Row) -> None:
    fresh = conduct.begin(row.rule, np.zeros(2), xp=np)
    with pytest.raises(InvalidArgument, match="another rule"):
        conduct.from_plain({**conduct.to_plain(fresh), "rule.other": 1.0}, fresh, xp=np)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_rule_is_a_frozen_dataclass_with_one_positional_argument(row: Row) -> None:
    fields = [field for field in dataclasses.fields(row.rule) if field.init]
    assert isinstance(row.rule, Rule)
    assert all(field.kw_only for field in fields[1:])
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(row.rule, fields[0].name, 2.0)
    assert hash(row.rule) == hash(dataclasses.replace(row.rule))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_dict_gives_the_rule_back(row: Row) -> None:
    plain = spec.to_dict(row.rule, row.kind)
    assert json.loads(json.dumps(plain)) == plain
    assert spec.from_dict(plain, row.kind) == row.rule


@pytest.mark.parametrize("row", LIMITED, ids=str)
def test_toml_gives_the_rule_back(row: Row, tmp_path) -> None:
    limit = "limit = {schedule = 'Linear', start = 2.0, stop = 0.5, steps = [0, 10]}"
    file = tmp_path / "rule.toml"
    file.write_text(f"[here]\nrule = '{type(row.rule).__name__}'\n{limit}\n", encoding="utf-8")
    expected = dataclasses.replace(row.rule, limit=nw.schedule.Linear(2.0, 0.5, steps=(0, 10)))
    rule = spec.from_dict(spec.read_toml(file)["here"], row.kind)
    assert rule == expected
    assert spec.from_dict(spec.to_dict(rule, row.kind), row.kind) == expected


@cases(LIMITED)
def test_a_scheduled_limit_follows_the_attempted_steps(row: Row, apply: Apply) -> None:
    schedule = nw.schedule.Linear(2.0, 0.5, steps=(0, 3))
    scheduled = dataclasses.replace(row, rule=dataclasses.replace(row.rule, limit=schedule))
    state = None
    for step in range(5):
        tensors = sample(20 + step, scale=10.0)
        found, _, state = apply(scheduled, tensors, state)
        fixed = dataclasses.replace(
            row, rule=dataclasses.replace(row.rule, limit=schedule.at(step))
        )
        assert_equal(found, apply(fixed, tensors)[0], rtol=1e-15)


@pytest.mark.parametrize("row", LIMITED, ids=str)
@pytest.mark.parametrize(
    "limit",
    [-1, -1.0, 0, 0.0, math.nan, -math.inf, "1.0", None, True, [1.0]],
    ids=repr,
)
def test_a_limit_that_is_no_positive_number_is_refused(row: Row, limit: Any) -> None:
    name = type(row.rule).__name__
    with pytest.raises(
        InvalidArgument, match=f"^{name}: the limit must be .*; got .*; allowed: > 0"
    ):
        dataclasses.replace(row.rule, limit=limit)
    with pytest.raises(ValueError):
        spec.from_dict({**spec.to_dict(row.rule, row.kind), "limit": limit}, row.kind)


@pytest.mark.parametrize("row", LIMITED, ids=str)
@pytest.mark.parametrize("ends", [(1.0, 0.0), (-1.0, 1.0), (1.0, -0.5)])
def test_a_schedule_that_leaves_the_positive_numbers_is_refused(
    row: Row, ends: tuple[float, float]
) -> None:
    schedule = nw.schedule.Linear(*ends, steps=(0, 10))
    with pytest.raises(InvalidArgument, match="of the schedule.*must be positive"):
        dataclasses.replace(row.rule, limit=schedule)


@cases(ROWS)
def test_what_is_no_rule_is_refused(row: Row, apply: Apply) -> None:
    for wrong in (type(row.rule), None, 1.0, "ByNorm"):
        with pytest.raises(InvalidArgument, match="this is no rule"):
            apply(Misfit(wrong, row.reference, way=row.kind), sample(0))


@cases(ROWS)
def test_a_rule_for_something_else_is_refused(row: Row, apply: Apply) -> None:
    others = [other.rule for other in ROWS if other.kind != row.kind]
    for other in others:
        with pytest.raises(Refused, match="acts on a"):
            apply(Misfit(other, row.reference, way=row.kind), sample(0))


@cases(ROWS)
def test_facts_that_nobody_measures_are_refused(row: Row, apply: Apply) -> None:
    class Demanding(type(row.rule)):  # type: ignore[misc]
        needs = frozenset({"weights"})

    demanding = Demanding(
        **{f.name: getattr(row.rule, f.name) for f in dataclasses.fields(row.rule)}
    )
    with pytest.raises(Refused, match="needs weights"):
        apply(dataclasses.replace(row, rule=demanding), sample(0))


@pytest.mark.parametrize("scope", [Scope.UNIT, Scope.GROUP])
@cases([row for row in ROWS if row.kind == "clip"])
def test_a_clip_of_a_scope_that_is_not_measured_is_refused(
    row: Row, apply: Apply, scope: Scope
) -> None:
    finer = type("Finer", (type(row.rule),), {"scope": scope, "__slots__": ()})
    rule = finer(**{f.name: getattr(row.rule, f.name) for f in dataclasses.fields(row.rule)})
    with pytest.raises(Refused, match=f"per {scope.value}"):
        apply(dataclasses.replace(row, rule=rule), sample(0))
