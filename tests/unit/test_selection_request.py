"""One prune request, without a framework: defaults, selection, reasons, facts to measure, the built request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from karikomi.errors import InvalidArgument, KarikomiError, UnknownName, Unsupported
from karikomi.prune import FACTS, Layout, Target
from karikomi.prune.facts import TABLE, check_facts, measured_on
from karikomi.selection.exact_masks import find_masks
from karikomi.selection.request import (
    NO_INPUTS,
    NO_SHARE,
    NO_UNITS,
    NOT_SELECTED,
    SCALES_UNITS,
    PruneRequest,
    check_masks_alone,
    facts_of,
    request_of,
    selected,
    totals_of,
)
from karikomi.selection.weight_source import source_of

WEIGHTS = {
    "a.weight": np.array([[3.0, -1.0], [2.0, -4.0]]),
    "b.weight": np.array([[0.5, 8.0], [7.0, 6.0]]),
}
LAYOUTS = {name: Layout(units=0, inputs=1) for name in WEIGHTS}


def asked(**options: Any) -> PruneRequest:
    defaults: dict[str, Any] = {"score": "magnitude", "allocation": None, "pattern": "unstructured"}
    return request_of("prune_", **defaults | options)


def removed(request: PruneRequest, facts: Mapping[str, Any] | None = None) -> dict[str, list[int]]:
    """Return name -> flat indices of what goes, with whole weights of this file."""
    names, _, shares = request.chosen(WEIGHTS, {}, allowed="weights")
    coupled = (
        request.grouped({n: WEIGHTS[n].shape for n in names}, LAYOUTS, {})[0]
        if request.pattern.coupled
        else []
    )
    sources = {
        name: source_of(
            name, WEIGHTS[name], layout=LAYOUTS[name], facts=facts_of(name, facts or {})
        )
        for name in names
    }
    masks = find_masks(
        request.selection(sources, facts or {}, shares=shares, coupled=coupled)
    ).masks
    return {name: np.flatnonzero(~mask).tolist() for name, mask in masks.items()}


@pytest.mark.parametrize(
    ("options", "allocation", "last"),
    [
        ({"sparsity": 0.5}, "global", False),
        ({"sparsity": 0.5, "score": "wanda"}, "uniform", False),
        ({"width": 0.5, "score": "l2", "pattern": "units"}, "uniform", True),
        ({"width": 0.5, "pattern": "layers"}, "global", True),
    ],
)
def test_defaults_follow_from_pattern_and_score(
    options: dict[str, Any], allocation: str, last: bool
) -> None:
    request = asked(**options)
    assert request.allocation == allocation
    assert ("last" in request.protect) == last and "norms" in request.protect
    assert asked(**options, protect=()).protect == ()


def test_who_is_chosen_and_why_the_others_are_not() -> None:
    request = asked(sparsity={"a*": 0.5, "a.bias": 0.0}, exclude="c*")
    with pytest.raises(UnknownName, match=r"a\.bias"):
        request.chosen(["a", "b", "c"], {"a.b": "a bias"}, allowed="weights")
    request = asked(sparsity={"a": 0.5}, exclude="c*")
    names, reasons, shares = request.chosen(["a", "b", "c"], {"a.b": "a bias"}, allowed="weights")
    assert (names, shares) == (["a"], {"a": 0.5})
    assert reasons == {"a.b": "a bias", "b": NO_SHARE, "c": NOT_SELECTED}


def test_nothing_to_prune_is_an_error_with_the_reasons_of_what_was_selected() -> None:
    with pytest.raises(Unsupported, match=r"nothing of this.*got b: a bias; allowed: weights"):
        selected(["a"], {"b": "a bias"}, only="b", exclude=None, where="p", allowed="weights")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, InvalidArgument, "one target"),
        ({"sparsity": 0.5, "bytes": 0.5}, InvalidArgument, "one target"),
        ({"sparsity": {}}, InvalidArgument, "no sparsity"),
        ({"sparsity": {"a": 0.5}, "allocation": "erk"}, InvalidArgument, "allocation='erk'"),
        ({"sparsity": 0.5, "score": "apoz"}, Unsupported, "APoZ scores units"),
        ({"width": 0.5, "score": "obc", "pattern": "units"}, Unsupported, "single weights"),
        ({"width": 0.5}, InvalidArgument, "width is a share of units"),
    ],
)
def test_arguments_are_checked_before_anything_is_measured(
    options: dict[str, Any], error: type[KarikomiError], text: str
) -> None:
    with pytest.raises(error, match=text):
        asked(**options)


def test_needs_are_those_of_score_allocation_and_target_that_were_not_given() -> None:
    assert asked(sparsity=0.5, score="random").needs() == set()
    assert asked(macs=0.5, score="taylor").needs() >= {"macs", "gradient"}
    assert asked(sparsity=0.5, allocation="owl").needs() == {"input_norm"}
    given = asked(sparsity=0.5, allocation="owl", facts={"outliers": {"a.weight": 0.1}})
    assert given.needs() == set() and given.gathered(lambda needs: 1 / 0) == given.facts  # type: ignore[arg-type,return-value]
    calls = []
    wanda = asked(sparsity=0.5, score="wanda")
    found = wanda.gathered(lambda needs: calls.append(needs) or {"input_norm": {}})
    assert calls == [{"input_norm"}] and found == {"input_norm": {}}
    macs = {"a.weight": 2.0}
    taylor = asked(macs=0.5, score="taylor", facts={"macs": macs})
    assert taylor.needs() == {"gradient"}
    assert taylor.gathered(lambda needs: {"gradient": {}}) == {"macs": macs, "gradient": {}}


def test_rounds_cut_the_way_to_the_target() -> None:
    request = asked(sparsity=0.75)
    assert list(request.rounds()) == [request]
    score = replace(request.score)  # type: ignore[type-var]
    object.__setattr__(score, "rounds", 2)
    targets = [part.target for part in replace(request, score=score).rounds()]
    assert targets == [Target("sparsity", 0.5), Target("sparsity", 0.75)]


def test_from_request_to_masks() -> None:
    assert removed(asked(sparsity=0.25)) == {"a.weight": [1], "b.weight": [0]}
    assert removed(asked(sparsity=0.25, allocation="uniform", only="b*")) == {"b.weight": [0]}
    assert removed(asked(sparsity={"a*": 0.5})) == {"a.weight": [1, 2]}
    assert removed(asked(width=0.5, score="l2", pattern="units")) == {
        "a.weight": [0, 1],
        "b.weight": [0, 1],
    }


def test_outliers_are_the_share_above_five_times_the_mean() -> None:
    norms = {"a.weight": np.where(np.eye(8), 1e3, 1.0), "b.weight": np.ones((8, 8))}
    sources = {
        name: source_of(name, np.ones((8, 8)), facts={"input_norm": norm})
        for name, norm in norms.items()
    }
    built = asked(sparsity=0.5, allocation="owl").selection(sources, {}, shares={})
    assert built.outliers == {"a.weight": 0.125, "b.weight": 0.0}


def test_groups_take_what_goes_with_their_units() -> None:
    shapes = {"w": (2, 3), "scale": (2,), "flat": (5,)}
    layouts = {"w": Layout(units=0, inputs=1), "scale": Layout(units=0)}
    units = asked(width=0.5, score="l2", pattern="units")
    groups, left_alone = units.grouped(shapes, layouts, {"w": ["bias", "scale"]})
    assert [(group.of, group.items) for group in groups] == [("w", 2)]
    members = [(member.name, member.scored) for member in groups[0].members]
    assert members == [("w", True), ("bias", False), ("scale", False)]
    assert left_alone == {"scale": SCALES_UNITS, "flat": NO_UNITS}
    with pytest.raises(Unsupported, match="which axis are its units is not known; give layouts"):
        units.grouped({"flat": (5,)}, {}, {}, hint="give layouts")
    layers = asked(width=0.5, pattern="layers")
    assert [group.items for group in layers.grouped(shapes, {}, {})[0]] == [1, 1, 1]


def test_weights_without_the_axes_are_left_alone() -> None:
    layouts = {"w": Layout(units=0, inputs=1), "scale": Layout(units=0), "flat": None}
    assert asked(sparsity=0.5).without_axes(layouts) == {}
    rows = asked(sparsity=0.5, score="wanda")
    assert rows.without_axes(layouts) == {"scale": NO_INPUTS, "flat": NO_UNITS}
    with pytest.raises(Unsupported, match="flat: no weight has the axes"):
        rows.without_axes({"flat": None})


def test_totals_and_facts_per_tensor() -> None:
    facts: dict[str, Any] = {"macs": {"w": 6.0, "v": 2.0}, "gradient": {"w": np.ones(3)}}
    assert totals_of([(6, 4), (2, 2)], facts) == {"parameters": 8.0, "bytes": 28.0, "macs": 8.0}
    assert set(facts_of("w", facts)) == {"gradient"} and facts_of("v", facts) == {}


def test_one_table_of_facts() -> None:
    assert set(FACTS) == set(TABLE)
    assert measured_on("gradients") == {"gradient", "squared_gradient", "hessian_gradient"}
    check_facts({"trust": {"w": 1.0}}, {"trust"}, ["w"], where="p")
    for facts, text in [
        ({"gradiant": {}}, "p: unknown fact; got 'gradiant'; did you mean 'gradient'"),
        ({"gradient": {"v": 1.0}}, r"facts\['gradient'\]: no selected tensor"),
        ({"gradient": 1.0}, r"facts\['gradient'\]: not a mapping; got float"),
        ([], "p: facts: not a mapping; got list"),
    ]:
        with pytest.raises(KarikomiError, match=text):
            check_facts(facts, (), ["w"], where="p")  # type: ignore[arg-type]


def test_scores_that_reconstruct_make_no_masks_alone() -> None:
    with pytest.raises(Unsupported, match=r"p: score: OBC re-fits.*kk\.torch\.prune_"):
        check_masks_alone(asked(sparsity=0.5, score="obc").score, where="p")
