"""Rules of which there are two of something: stages that learn, groups in groups, limits, skips in a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import karikomi as kk
from contract.probe import Noting
from karikomi.clip import ByGlobalNorm, ByNorm, ByValue, Chain, EMARatio, Groups, SkipSpikes
from karikomi.rule import Scope
from karikomi.rules.decide import begin, decide_stage
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import alone
from karikomi.torch.attachment import limit_warnings
from karikomi.torch.numerics import norms

NAN = float("nan")
Series = list[dict[str, float]]
Found = tuple[list[str], list[dict[str, float]], dict[str, Any]]
Run = Callable[..., Found]
"""Returns the actions, the entries after each step, and the state."""


def in_numpy(rule: Any, series: Series, nonfinite: str = "skip") -> Found:
    state, actions, entries = None, [], []
    for step in series:
        grads = {name: np.array([entry]) for name, entry in step.items()}
        found, outcome, state = kk.numpy.clip(grads, rule, state, nonfinite=nonfinite)
        actions.append(outcome.action)
        entries.append({name: float(array[0]) for name, array in found.items()})
    return actions, entries, state or {}


def on_host(rule: Any, series: Series, nonfinite: str = "skip", *, fused: bool = False) -> Found:
    pairs = {name: nn.Parameter(torch.zeros(1, dtype=torch.float64)) for name in series[0]}
    model = nn.Module()
    for name, parameter in pairs.items():
        owner = model
        for part in name.split(".")[:-1]:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(name.rpartition(".")[2], parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    handle = kk.torch.attach(optimizer, model, clip=rule, nonfinite=nonfinite)
    actions, entries = [], []
    for step in series:
        before = {name: float(pairs[name].detach()) for name in step}
        for name, entry in step.items():
            pairs[name].grad = torch.tensor([entry], dtype=torch.float64)
        optimizer.step()
        assert handle.last is not None
        actions.append(handle.last.action)
        entries.append({name: before[name] - float(pairs[name].detach()) for name in step})
    return actions, entries, handle.state_dict()["clip"]


def on_device(rule: Any, series: Series, nonfinite: str = "skip") -> Found:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "on_cpu", lambda tensor: False)
        return on_host(rule, series, nonfinite, fused=True)


def folded(rule: Any, series: Series, nonfinite: str = "skip") -> Found:
    return on_host(rule, series, nonfinite, fused=True)


everywhere = pytest.mark.parametrize("run", [in_numpy, on_host, folded, on_device])


@everywhere
def test_rules_that_learn_in_different_stages_learn_each_its_own(run: Run) -> None:
    rule = Chain(
        EMARatio(2.0, beta=0.5, per="tensor"),
        ByValue(6.0),
        EMARatio(1.25, beta=0.5, per="tensor"),
    )
    _, entries, state = run(rule, [{"a": 4.0, "b": 1.0}, {"a": 20.0, "b": 1.0}])
    # 20 is clipped to 2 * 4, clamped to 6, and clipped to 1.25 * 4.
    assert entries == [{"a": 4.0, "b": 1.0}, pytest.approx({"a": 5.0, "b": 1.0}, rel=1e-6)]
    assert state["rule.0.mean"] == pytest.approx([(2.0 + 8.0) / 2, 0.75], rel=1e-6)
    assert state["rule.2.mean"] == pytest.approx([(2.0 + 5.0) / 2, 0.75], rel=1e-6)
    assert state["rule.0.weight"] == state["rule.2.weight"] == [0.75, 0.75]


@everywhere
def test_a_chain_in_a_chain_keeps_its_statistics_to_itself(run: Run) -> None:
    rule = Chain(Chain(ByNorm(9.0), EMARatio(2.0, beta=0.5)), EMARatio(1.5, beta=0.5))
    _, entries, state = run(rule, [{"a": 4.0}, {"a": 20.0}])
    assert entries[1]["a"] == pytest.approx(6.0, rel=1e-6)
    assert state["rule.0.1.mean"] == pytest.approx([5.0], rel=1e-6)
    assert state["rule.1.mean"] == pytest.approx([4.0], rel=1e-6)


def test_the_statistics_of_each_stage_follow_their_tensors_by_name() -> None:
    rule = Chain(
        EMARatio(2.0, beta=0.5, per="tensor"), ByValue(6.0), EMARatio(1.25, beta=0.5, per="tensor")
    )
    _, _, state = in_numpy(rule, [{"a": 4.0, "b": 1.0}, {"a": 20.0, "b": 1.0}])
    state = json.loads(json.dumps(state))
    # Without a history 50 is only clamped; 9 is 2 * 1, then 1.25 * 1; 9 is 6, below 1.25 * 14 / 3.
    expected = {"new": 6.0, "b": 1.25, "a": 14 / 3 * 1.25}
    for entries in ({"new": 50.0, "b": 9.0, "a": 9.0}, {"b": 9.0, "a": 9.0}, {"b": 9.0}):
        turned = {name: np.array([entry]) for name, entry in entries.items()}
        found, _, after = kk.numpy.clip(turned, rule, state)
        for name, array in found.items():
            assert float(array[0]) == pytest.approx(expected[name], rel=1e-9)
        assert after["names"] == after["names.2"] == list(entries)


NESTED: dict[str, tuple[Any, dict[str, tuple[float, float]]]] = {
    "groups in a group": (
        Groups(
            {"a.*": Groups({"*.weight": ByNorm(1.0)}, default=ByNorm(2.0))}, default=ByNorm(8.0)
        ),
        {
            "a.weight": (4.0, 1.0),
            "a.bias": (4.0, 2.0),
            "b.weight": (4.0, 4.0),
            "b.bias": (16.0, 8.0),
        },
    ),
    # 1.5 and 2 have the joint norm 2.5.
    "groups in a chain in a group": (
        Groups(
            {"a.*": Chain(Groups({"*.weight": None}, default=ByNorm(2.0)), ByGlobalNorm(3.0))},
            default=ByNorm(10.0),
        ),
        {
            "a.weight": (1.5, 1.5),
            "a.bias": (8.0, 2.0),
            "b.weight": (7.0, 7.0),
            "b.bias": (20.0, 10.0),
        },
    ),
}


@everywhere
@pytest.mark.parametrize(("rule", "norms"), NESTED.values(), ids=NESTED)
def test_inner_groups_are_parts_of_the_outer_one(
    run: Run, rule: Any, norms: dict[str, tuple[float, float]]
) -> None:
    _, entries, _ = run(rule, [{name: before for name, (before, _) in norms.items()}])
    assert entries[0] == pytest.approx(
        {name: after for name, (_, after) in norms.items()}, rel=1e-6
    )


@everywhere
@pytest.mark.parametrize("limits", [(1.0, 3.0), (3.0, 1.0)])
def test_of_two_limits_the_smaller_one_stands(run: Run, limits: tuple[float, float]) -> None:
    _, entries, _ = run(Chain(*map(ByValue, limits)), [{"a": 4.0, "b": -0.5}])
    assert entries == [{"a": 1.0, "b": -0.5}]


@everywhere
def test_the_next_rule_of_a_stage_is_given_what_the_first_left(run: Run) -> None:
    # 6 becomes 3, so that the joint norm of 3 and 4 is 5.
    _, entries, _ = run(Chain(ByNorm(4.0), ByGlobalNorm(2.5)), [{"a": 3.0, "b": 8.0}])
    assert entries[0] == pytest.approx({"a": 1.5, "b": 2.0}, rel=1e-6)


@everywhere
def test_entries_are_clamped_after_the_norm_is_clipped(run: Run) -> None:
    # 6 and 8 become 3 and 4.
    _, entries, _ = run(Chain(ByGlobalNorm(5.0), ByValue(2.0)), [{"a": 6.0, "b": -8.0}])
    assert entries[0] == pytest.approx({"a": 2.0, "b": -2.0}, rel=1e-6)


SPIKES = SkipSpikes(2.0, window=3, warmup=2, patience=2)


@everywhere
def test_a_non_finite_step_neither_counts_nor_ends_the_skips_in_a_row(run: Run) -> None:
    actions, _, state = run(SPIKES, [{"a": x} for x in (1.0, 3.0, 99.0, NAN, 99.0, 99.0)])
    assert actions == ["kept", "kept", "skipped", "skipped", "skipped", "kept"]
    assert (state["attempted"], state["accepted"], state["skipped_in_a_row"]) == (6, 3, 0)


@everywhere
def test_an_accepted_step_ends_the_skips_in_a_row(run: Run) -> None:
    actions, _, state = run(SPIKES, [{"a": x} for x in (1.0, 3.0, 99.0, 2.0, 99.0, 99.0, 99.0)])
    assert actions == ["kept", "kept", "skipped", "kept", "skipped", "skipped", "kept"]
    assert state["bad_in_a_row"] == 0 and sorted(state["rule.ring"]) == [2.0, 3.0, 99.0]


@pytest.mark.parametrize("run", [in_numpy, on_host])
@pytest.mark.parametrize("nonfinite", ["zero", "pass"])
def test_an_entry_that_is_not_finite_in_the_first_stage_is_counted(
    run: Run, nonfinite: str
) -> None:
    rule = Chain(ByNorm(1.0), ByValue(0.5), ByGlobalNorm(10.0))
    actions, entries, state = run(rule, [{"a": NAN, "b": 3.0}], nonfinite)
    assert entries[0]["b"] == pytest.approx(0.5)
    assert actions == ["zeroed" if nonfinite == "zero" else "passed"]
    assert (state["bad_in_a_row"], state["accepted"], state["skipped_in_a_row"]) == (1, 1, 0)


def test_the_joint_facts_are_those_of_the_finite_tensors_that_are_there() -> None:
    rule, numbers = Noting(Scope.GLOBAL), np.array([3.0, 7.0, 4.0, NAN])
    stage = alone(rule, ["a", "b", "c", "d"])
    decide_stage(
        stage,
        numbers,
        begin(rule, numbers, xp=np),
        present=np.array([True, False, True, True]),
        xp=np,
        facts={
            "sizes": np.array([4.0, 9.0, 16.0, 25.0]),
            "weights": np.array([5.0, 1.0, 12.0, 1.0]),
        },
    )
    assert rule.noted["norms"].tolist() == [5.0] and rule.noted["sizes"].tolist() == [20.0]
    assert rule.noted["weights"].tolist() == [13.0]


def outcome_of(norms: list[float], after: list[float], **how: Any) -> Outcome:
    names = how.pop("names", tuple("abcd"[: len(norms)]))
    return Outcome(names, np.array(norms), np.array(after), False, **how)


def test_the_outcome_of_two_stages_joins_what_they_changed() -> None:
    first = outcome_of([6.0, 8.0], [3.0, 4.0])
    outcome = outcome_of([3.0, 4.0], [3.0, 4.0], earlier=(first,))
    assert (outcome.pre, outcome.post, outcome.factor) == (10.0, 5.0, 0.5)
    assert outcome.engaged and outcome.action == "clipped"
    assert outcome.as_row()["clipped"] is True


def test_factors_of_stages_by_entry_are_multiplied() -> None:
    first = outcome_of([4.0, 1.0], [2.0, 1.0], element_wise=True)
    outcome = outcome_of([3.0, 4.0], [2.4, 3.2], earlier=(first,))
    assert outcome.factor == pytest.approx(0.5 * 0.8)
    last = outcome_of([2.4, 3.2], [0.8, 0.8], earlier=(first, outcome), element_wise=True)
    assert last.factor == pytest.approx(0.5 * 0.8 * 0.25)


def test_a_tensor_that_was_not_finite_in_the_first_stage_is_named() -> None:
    first = outcome_of([NAN, 4.0], [0.0, 4.0], nonfinite_policy="zero")
    outcome = outcome_of([0.0, 4.0], [0.0, 4.0], nonfinite_policy="zero", earlier=(first,))
    assert (outcome.nonfinite, outcome.action) == (("a",), "zeroed")


def test_units_are_joined_and_peaks_are_in_no_joint_norm() -> None:
    outcome = outcome_of([3.0, 4.0, 12.0, 99.0], [3.0, 4.0, 12.0, 1.0], names=("a", "a", "b", "c"))
    assert outcome.tensors() == {"a": 5.0, "b": 12.0, "c": 99.0}
    peaked = outcome_of(
        *([3.0, 4.0, 12.0, 99.0], [3.0, 4.0, 12.0, 1.0]),
        names=("a", "a", "b", "c"),
        peaks=frozenset({"c"}),
    )
    assert (peaked.pre, peaked.post, peaked.factor, peaked.engaged) == (13.0, 13.0, 1.0, True)
    assert peaked.top() == [("b", pytest.approx(144 / 169)), ("a", pytest.approx(25 / 169))]


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_limits_of_entries_are_those_of_unscaled_gradients(
    fused: bool, device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device:
        monkeypatch.setattr(norms, "on_cpu", lambda tensor: False)
    slopes = torch.tensor([3.0, -0.25, -4.0])
    rules = [(ByValue(0.5), [0.5, -0.25, -0.5]), (Chain(ByValue(0.5), ByNorm(0.375)), None)]
    for rule, expected in rules:
        # The clamped entries have the norm 0.75, so the second rule halves them.
        expected = expected or [0.25, -0.125, -0.25]
        model = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
        handle = kk.torch.attach(optimizer, model, clip=rule)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale((model.weight * slopes).sum()).backward()
        scaler.step(optimizer)
        assert model.weight.detach()[0].tolist() == pytest.approx([-x for x in expected], rel=1e-6)
        assert handle.last is not None and handle.last.pre in (4.0, pytest.approx(4.0))


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_limits_in_units_of_moments_are_those_of_unscaled_gradients(
    fused: bool, device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device:
        monkeypatch.setattr(norms, "on_cpu", lambda tensor: False)
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    kk.torch.attach(optimizer, model, clip=kk.clip.SPAM(4000.0, warmup=0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for slopes in ([3.0, 0.125], [30.0, 0.125]):
        optimizer.zero_grad()
        before = model.weight.detach().clone()
        scaler.scale((model.weight * torch.tensor([slopes])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    # Of moments 0.001 * 9 the limit is the root of 4000 * 0.009.
    assert (before - model.weight.detach())[0].tolist() == pytest.approx([6.0, 0.125], rel=1e-5)


@pytest.mark.parametrize(
    ("nonfinite", "device"), [("zero", False), ("pass", False), ("skip", False), ("skip", True)]
)
def test_a_non_finite_step_teaches_no_moments(
    nonfinite: str, device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device:
        monkeypatch.setattr(norms, "on_cpu", lambda tensor: False)
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=device)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.SPAM(4.0), nonfinite=nonfinite)
    kept = []
    for entries in ([3.0, 1.0], [NAN, 1.0]):
        model.weight.grad = torch.tensor([entries])
        optimizer.step()
        kept.append(handle.state_dict()["clip"]["second_moment"]["weight"])
    torch.testing.assert_close(kept[0], torch.tensor([[0.009, 0.001]]))
    assert torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("device", [False, True])
def test_skipped_steps_are_in_no_share_of_clipped_ones(
    device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device:
        monkeypatch.setattr(norms, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(limit_warnings, "ENOUGH_FOR_OFTEN", 6)
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    handle = kk.torch.attach(optimizer, model, clip=ByNorm(1.0))
    with pytest.warns(UserWarning, match=r"100\.0% of \d steps were clipped"):
        for entry in (3.0, NAN, 3.0, NAN, *[3.0] * 6):
            model.weight.grad = torch.tensor([[entry]])
            optimizer.step()
    assert handle.state_dict()["clip"]["accepted"] == 8
