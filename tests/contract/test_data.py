"""Rules and their state as data: continued bit for bit, written and read back the same."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import karikomi as kk
from contract.frameworks import Apply, torch_attach, torch_updates
from contract.row import Row
from contract.rows import EVERY, LIMITED, PROBES, ROWS
from contract.test_laws import assert_equal, cases, sample
from depth import turns
from karikomi import spec
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.rule import Rule

# Limits of two parts, in the order in which torch.clamp, optax and Keras have them.
POSITIONAL = {"Box": 2, "HalfSpace": 2, "MinMaxNorm": 2}
SERIES = [sample(seed, scale=2.0 ** (seed - 2)) for seed in range(6)]


@dataclasses.dataclass(frozen=True)
class Misfit(Row):
    """Takes the way of a kind through a driver, whatever its rule is."""

    way: str = "clip"

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


@cases(EVERY)
def test_a_saved_state_continues_bit_for_bit(row: Row, apply: Apply) -> None:
    whole, states = _run(row, apply, None, 0)
    for stop in turns(range(len(SERIES)), row, apply, most=2):
        restored = _restored(states[stop])
        assert _plain(restored) == _plain(states[stop])
        rest, after = _run(row, apply, restored, stop + 1)
        for found, expected in zip(rest, whole[stop + 1 :], strict=True):
            assert_equal(found, expected)
        assert _plain(after) == _plain(states[stop + 1 :])


@cases(EVERY)
def test_a_state_is_plain_data(row: Row, apply: Apply) -> None:
    _, _, state = apply(row, SERIES[0])
    assert _plain(_through_torch(state)) == _plain(state)
    allowed = {int, float, bool, str}
    # Vectors as long as a weight is wide are kept where the weights are.
    extra = {torch.Tensor} if "spectral_norm" in getattr(row.rule, "needs", ()) else set()
    assert {type(leaf) for leaf in _leaves(state)} <= allowed | extra


def _restored(state: Any) -> Any:
    """Return a state as its file gives it back: JSON unless tensors are among it."""
    if any(isinstance(leaf, torch.Tensor) for leaf in _leaves(state)):
        return _through_torch(state)
    return json.loads(json.dumps(state, allow_nan=False))


def _through_torch(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.tolist()]
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    else:
        yield value


@cases(EVERY)
def test_a_state_of_something_else_is_refused(row: Row, apply: Apply) -> None:
    _, _, state = apply(row, SERIES[0])
    with pytest.raises(InvalidArgument, match="another rule"):
        apply(row, SERIES[0], {**state, "rule.other": 1.0})
    for wrong in (1.5, [1, 2], "one", None, 2**80):
        with pytest.raises(InvalidArgument, match="accepted: this entry of the state does not fit"):
            apply(row, SERIES[0], {**state, "accepted": wrong})


@cases(PROBES)
def test_what_was_learned_of_a_tensor_goes_with_its_name(row: Row, apply: Apply) -> None:
    *_, state = _run(row, apply, None, 0)[1]
    names = list(state["names"])
    order = sorted(range(len(names)), key=lambda place: names[place])
    # As written by a run that listed its tensors in another order, and had one more of them.
    other = {**state, "names": ["gone", *(names[place] for place in order)]}
    for key in ("rule.mean", "rule.seen"):
        other[key] = [9.0, *(state[key][place] for place in order)]
    other["rule.ring"] = [[9.0, *(r[place] for place in order)] for r in state["rule.ring"]]
    expected, _, after = apply(row, SERIES[1], state)
    found, _, again = apply(row, SERIES[1], other)
    assert_equal(found, expected)
    assert after == again and after["names"] == names


@cases(PROBES)
def test_a_new_tensor_starts_afresh_among_known_ones(row: Row, apply: Apply) -> None:
    _, _, state = apply(row, SERIES[3])
    kept = [place for place, name in enumerate(state["names"]) if name != "gain"]
    assert len(kept) == len(state["names"]) - 1
    less = {**state, "names": [state["names"][place] for place in kept]}
    for key in ("rule.mean", "rule.seen"):
        less[key] = [state[key][place] for place in kept]
    less["rule.ring"] = [[ring[place] for place in kept] for ring in state["rule.ring"]]
    large = {name: np.full_like(array, 100.0) for name, array in SERIES[0].items()}
    known, _, _ = apply(row, large, state)
    fresh, _, _ = apply(row, large)
    found, _, after = apply(row, large, less)
    assert_equal(found, {**known, "gain": fresh["gain"]})
    assert after["rule.largest"] >= state["rule.largest"] and after["attempted"] == 2


@cases(PROBES)
def test_statistics_of_another_length_are_refused(row: Row, apply: Apply) -> None:
    _, _, state = apply(row, SERIES[0])
    for change in ({"rule.mean": [1.0]}, {"rule.ring": [[1.0], [2.0]]}, {"names": ["gain"]}):
        with pytest.raises(InvalidArgument, match=r"of the state does not fit.*shape \("):
            apply(row, SERIES[0], {**state, **change})
    for names in (3, [1] * len(state["names"]), None):
        with pytest.raises(InvalidArgument, match="names of a state are a list of str"):
            apply(row, SERIES[0], {**state, "names": names})


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_rule_is_a_frozen_dataclass_with_one_positional_argument(row: Row) -> None:
    fields = [field for field in dataclasses.fields(row.rule) if field.init]
    assert isinstance(row.rule, Rule)
    assert all(field.kw_only for field in fields[POSITIONAL.get(str(row), 1) :])
    for field in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(row.rule, field.name, 2.0)
    assert hash(row.rule) == hash(type(row.rule)(**_values(row.rule)))


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
    expected = dataclasses.replace(row.rule, limit=kk.schedule.Linear(2.0, 0.5, steps=(0, 10)))
    rule: Any = spec.from_dict(spec.read_toml(file)["here"], row.kind)
    assert rule == expected
    assert spec.from_dict(spec.to_dict(rule, row.kind), row.kind) == expected


@cases(LIMITED)
def test_a_scheduled_limit_follows_the_attempted_steps(row: Row, apply: Apply) -> None:
    schedule = kk.schedule.Linear(2.0, 0.5, steps=(0, 3))
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
def test_a_limit_that_is_no_positive_number_is_refused(row: Row) -> None:
    name = type(row.rule).__name__
    for limit in (-1, -1.0, 0, 0.0, math.nan, -math.inf, "1.0", None, True, [1.0]):
        with pytest.raises(
            InvalidArgument, match=f"^{name}: the limit must be .*; got .*; allowed: > 0"
        ):
            dataclasses.replace(row.rule, limit=limit)
        with pytest.raises(ValueError):
            spec.from_dict({**spec.to_dict(row.rule, row.kind), "limit": limit}, row.kind)


@pytest.mark.parametrize("row", LIMITED, ids=str)
def test_a_schedule_that_leaves_the_positive_numbers_is_refused(row: Row) -> None:
    for ends in ((1.0, 0.0), (-1.0, 1.0), (1.0, -0.5)):
        schedule = kk.schedule.Linear(*ends, steps=(0, 10))
        with pytest.raises(InvalidArgument, match="of the schedule.*must be positive"):
            dataclasses.replace(row.rule, limit=schedule)


def _values(rule: Any) -> dict[str, Any]:
    return {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}


@cases(ROWS)
def test_what_is_no_rule_is_refused(row: Row, apply: Apply) -> None:
    for wrong in (type(row.rule), None, 1.0, "ByNorm"):
        if wrong is None and apply in (torch_attach, torch_updates):
            continue  # there it means: measure only
        with pytest.raises(InvalidArgument, match="not a rule"):
            apply(Misfit(wrong, row.reference, way=row.kind), sample(0))


@cases(ROWS)
def test_a_rule_for_something_else_is_refused(row: Row, apply: Apply) -> None:
    others = [other.rule for other in ROWS if other.kind != row.kind]
    for other in others:
        with pytest.raises(Unsupported, match="acts on a"):
            apply(Misfit(other, row.reference, way=row.kind), sample(0))


@cases(ROWS)
def test_facts_that_nobody_measures_are_refused(row: Row, apply: Apply) -> None:
    class Demanding(type(row.rule)):  # type: ignore[misc]
        needs = frozenset({"telepathy"})

    demanding = Demanding(**_values(row.rule))
    with pytest.raises(Unsupported, match="needs telepathy"):
        apply(dataclasses.replace(row, rule=demanding), sample(0))
