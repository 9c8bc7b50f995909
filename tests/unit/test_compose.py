"""Chains and groups: the same as the rules by hand, one after the other, each on its own tensors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi import spec
from karikomi.clip import ByGlobalNorm, ByNorm, ByValue, Chain, Groups
from karikomi.errors import InvalidArgument, UnknownName, Unsupported
from karikomi.rules.stages import Kind, stages
from karikomi.schedule import Linear

Arrays = dict[str, np.ndarray]


def gradients(seed: int = 0, scale: float = 5.0) -> Arrays:
    generator = np.random.default_rng(seed)
    shapes = {
        "embed.weight": (7, 3),
        "body.weight": (4, 5),
        "body.bias": (4,),
        "head.weight": (2, 4),
    }
    return {name: generator.normal(0, scale, shape) for name, shape in shapes.items()}


def one_after_the_other(arrays: Arrays, *rules: Any) -> Arrays:
    for rule in rules:
        arrays, _, _ = kk.numpy.clip(arrays, rule)
    return arrays


def in_torch(arrays: Arrays, rule: Any) -> tuple[Arrays, kk.Outcome]:
    pairs = {name: nn.Parameter(torch.zeros(array.shape)) for name, array in arrays.items()}
    for name, parameter in pairs.items():
        parameter.data = parameter.data.double()
        parameter.grad = torch.from_numpy(arrays[name].copy())
    outcome, _ = kk.torch.clip_(pairs.items(), rule)
    return {n: p.grad.numpy() for n, p in pairs.items() if p.grad is not None}, outcome


CHAINS = [
    (ByNorm(3.0), ByGlobalNorm(4.0)),
    (ByGlobalNorm(4.0), ByNorm(1.0)),
    (ByValue(2.0), ByGlobalNorm(4.0)),
    (ByGlobalNorm(4.0), ByValue(0.5)),
    (ByValue(3.0), ByValue(1.0)),
    (ByNorm(3.0), ByValue(0.5), ByNorm(0.8)),
]


@pytest.mark.parametrize("rules", CHAINS, ids=str)
def test_a_chain_is_its_rules_one_after_the_other(rules: Any) -> None:
    expected = one_after_the_other(gradients(), *rules)
    ours, outcome, _ = kk.numpy.clip(gradients(), Chain(*rules))
    theirs, _ = in_torch(gradients(), Chain(*rules))
    for name, array in expected.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-12)
        np.testing.assert_allclose(theirs[name], array, rtol=1e-6)
    assert outcome.engaged and outcome.action == "clipped"


def test_a_chain_measures_once_unless_elements_changed() -> None:
    names = list(gradients())
    assert len(stages(Chain(ByNorm(1.0), ByGlobalNorm(1.0), ByNorm(2.0)), names)) == 1
    assert len(stages(Chain(ByValue(2.0), ByValue(1.0)), names)) == 1
    assert len(stages(Chain(ByValue(1.0), ByGlobalNorm(1.0)), names)) == 2
    assert len(stages(Chain(ByGlobalNorm(1.0), ByValue(1.0), ByGlobalNorm(1.0)), names)) == 3
    units = {"embed.weight": 7}
    (stage,) = stages(Chain(ByGlobalNorm(1.0), kk.clip.AGC(0.1)), names, units=units)
    assert set(stage.kinds) == {Kind.UNITS} and stage.counts == (7, 1, 1, 1)


def test_the_outcome_of_a_chain_tells_every_stage() -> None:
    _, outcome, _ = kk.numpy.clip(gradients(), Chain(ByValue(2.0), ByGlobalNorm(1e9)))
    assert outcome.engaged and len(outcome.earlier) == 1
    assert "; then " in str(outcome) and str(outcome).startswith("largest")


def test_a_skip_of_one_rule_teaches_none() -> None:
    rule = Chain(kk.clip.EMARatio(2.0), kk.clip.SkipSpikes(3.0, warmup=4))
    state = None
    for seed in range(12):
        _, outcome, state = kk.numpy.clip(gradients(seed), rule, state)
        assert not outcome.skipped
    before = json.loads(json.dumps(state))
    _, outcome, state = kk.numpy.clip(gradients(0, scale=500.0), rule, state)
    assert outcome.skipped
    changed = {key for key in state if state[key] != before[key]}
    assert changed == {"attempted", "skipped_in_a_row"}


GROUPED = Groups({"embed.*": ByNorm(1.0), "head.*": None}, default=ByGlobalNorm(2.0))


def test_groups_are_clipped_apart_and_the_excluded_left_alone() -> None:
    arrays = gradients()
    body = {name: arrays[name] for name in ("body.weight", "body.bias")}
    expected = {
        **one_after_the_other({"embed.weight": arrays["embed.weight"]}, ByNorm(1.0)),
        **one_after_the_other(body, ByGlobalNorm(2.0)),
        "head.weight": arrays["head.weight"],
    }
    for found in (kk.numpy.clip(arrays, GROUPED)[0], in_torch(arrays, GROUPED)[0]):
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-6)
    assert found["head.weight"].tobytes() == arrays["head.weight"].tobytes()


def test_groups_may_mix_clamps_and_norms() -> None:
    rule = Groups({"embed.*": ByValue(0.5)}, default=ByGlobalNorm(2.0))
    found, outcome = in_torch(gradients(), rule)
    assert np.abs(found["embed.weight"]).max() == 0.5
    rest = [array for name, array in found.items() if name != "embed.weight"]
    assert np.sqrt(sum(np.square(array).sum() for array in rest)) == pytest.approx(2.0)
    assert outcome.post == pytest.approx(2.0) and outcome.peaks == {"embed.weight"}


def test_a_bad_gradient_in_an_excluded_group_skips_the_step() -> None:
    arrays = gradients()
    arrays["head.weight"][0, 0] = np.nan
    _, outcome, _ = kk.numpy.clip(arrays, GROUPED)
    assert outcome.action == "skipped" and outcome.nonfinite == ("head.weight",)


def test_the_first_matching_group_wins_and_predicates_choose_too() -> None:
    rule = Groups([("*.weight", ByNorm(1.0)), (lambda name: name.startswith("body"), ByNorm(9.0))])
    found, _, _ = kk.numpy.clip(gradients(scale=50.0), rule)
    assert np.linalg.norm(found["body.weight"]) == pytest.approx(1.0)
    assert np.linalg.norm(found["body.bias"]) == pytest.approx(9.0)


def test_groups_and_chains_nest() -> None:
    inner = Chain(ByNorm(3.0), ByGlobalNorm(4.0))
    rule = Chain(Groups({"embed.*": inner}, default=ByNorm(2.0)), ByGlobalNorm(1.0))
    found, outcome, state = kk.numpy.clip(gradients(), rule)
    arrays = gradients()
    first = one_after_the_other({"embed.weight": arrays.pop("embed.weight")}, *inner.rules)
    expected = one_after_the_other(
        {**first, **one_after_the_other(arrays, ByNorm(2.0))}, ByGlobalNorm(1.0)
    )
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-12)
    assert outcome.post == pytest.approx(1.0)


def test_the_state_of_groups_goes_through_json_and_finds_its_tensors() -> None:
    rule = Groups({"embed.*": kk.clip.EMARatio(1.5, per="tensor")}, default=kk.clip.EMARatio(1.5))
    arrays, state = gradients(), None
    for seed in range(5):
        _, _, state = kk.numpy.clip(gradients(seed), rule, state)
    turned = dict(reversed(arrays.items()))
    ours, _, one = kk.numpy.clip(arrays, rule, json.loads(json.dumps(state)))
    theirs, _, other = kk.numpy.clip(turned, rule, state)
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-15)
    assert one["accepted"] == other["accepted"] == 6


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Chain(), InvalidArgument, "at least one rule"),
        (lambda: Chain(ByNorm), InvalidArgument, "not a rule"),
        (lambda: Chain(ByNorm(1.0), kk.clip.BlockRMS(1.0)), InvalidArgument, "gradient, update"),
        (lambda: Groups({}), InvalidArgument, "no rule at all"),
        (lambda: Groups({"a": None}), InvalidArgument, "no rule at all"),
        (lambda: Groups(3), InvalidArgument, "a mapping, or pairs"),
        (lambda: Groups([("a",)]), InvalidArgument, "a mapping, or pairs"),
        (lambda: spec.from_dict({"rule": "Chain", "rules": 3}), InvalidArgument, "a list; got 3"),
        (lambda: ByNorm(10**400), InvalidArgument, "too large for a float"),
        (lambda: Groups({3: ByNorm(1.0)}), InvalidArgument, "glob or a predicate; got 3"),
        (lambda: Chain(ByNorm(1.0), kk.bound.Clamp(1.0)), InvalidArgument, "gradient, weight"),
        (
            lambda: kk.numpy.clip(gradients(), Chain(kk.bound.Clamp(1.0))),
            Unsupported,
            "acts on a weight",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_a_pattern_without_a_tensor_is_an_error_with_the_nearest_names() -> None:
    with pytest.raises(UnknownName, match=r"embd.*embed"):
        kk.numpy.clip(gradients(), Groups({"embd.weight": None}, default=ByNorm(1.0)))


def test_groups_that_no_tensor_belongs_to_are_refused() -> None:
    rule = Groups([(lambda name: name == "nothing", ByNorm(1.0))])
    for clip in (kk.numpy.clip, in_torch):
        with pytest.raises(InvalidArgument, match="no tensor belongs to a group"):
            clip(gradients(), rule)


def test_the_row_of_a_chain_has_the_norm_before_all_of_it() -> None:
    rule = Chain(ByGlobalNorm(4.0), ByValue(0.5))
    _, outcome, _ = kk.numpy.clip(gradients(), rule)
    hidden = kk.numpy.clip(gradients(scale=1e6), Chain(ByValue(1e-3), ByGlobalNorm(1.0)))[1]
    assert hidden.pre > 1e6 and hidden.as_row()["norm"] == hidden.pre
    row, alone = outcome.as_row(), kk.numpy.clip(gradients(), ByGlobalNorm(4.0))[1]
    assert row["norm"] == alone.pre and row["factor"] <= alone.factor


def test_compositions_are_data() -> None:
    rule = Chain(
        Groups({"embed.*": ByNorm(Linear(1.0, 2.0, steps=(0, 9)))}, default=ByNorm(2.0)),
        ByGlobalNorm(1.0),
    )
    plain = json.loads(json.dumps(spec.to_dict(rule)))
    assert spec.from_dict(plain) == rule
    with pytest.raises(UnknownName, match="stages.*rules"):
        spec.from_dict({"rule": "Chain", "stages": []})
