"""The proposals of a search on made-up figures: curves, halving, structures, and which of them come first."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karikomi.search.candidate_steps import parent_of, stage_of, step_of, structure_of, words_of
from karikomi.search.driver import Asking, Budgets, Finished, Proposal, missing_of, together
from karikomi.search.ladder import Ladder
from karikomi.tasks import Recipe

Facts = Callable[[dict[str, Any]], dict[str, Any] | None]


def ladder(**changes: Any) -> Ladder:
    own = {"prunes", "trains", "integers", "budgets"}
    recipe = {k: v for k, v in changes.items() if k not in own}
    plain: dict[str, Any] = {"sparsities": (), "entries": (16,), "rates": ()}
    return Ladder(
        origin="given",
        recipe=Recipe(**{**plain, **recipe}),
        prunes=changes.get("prunes", True),
        trains=changes.get("trains", True),
        integers=changes.get("integers", False),
        budgets=changes.get("budgets", Budgets(max_drop=0.1, objective="bytes")),
        drop=lambda before, after: before - after,
        slack=1e-9,
        facts_of=lambda found: {**found.facts, "drop": 1.0 - found.facts["validation"]},
    )


def walked(search: Ladder, facts_of: Facts) -> tuple[dict[Proposal, Finished], list[int]]:
    """Return the candidates of a search with these facts (None is a failure), and the sizes of its rounds."""
    finished: dict[Proposal, Finished] = {}
    sizes = []
    while proposals := search.propose(finished):
        sizes.append(len(proposals))
        for proposal in proposals:
            parent = parent_of(proposal)
            assert parent is None or parent in finished, "a candidate goes on from a finished one"
            facts = facts_of(proposal.settings)
            error = {"kind": "Unsupported", "text": "no"} if facts is None else None
            whole = {"validation": 1.0, "bytes": 100.0, **(facts or {})}
            finished[proposal] = Finished("", proposal, {} if error else whole, error=error)
    return finished, sizes


def of_step(found: dict[Proposal, Finished], step: str) -> list[dict[str, Any]]:
    return [proposal.settings for proposal in found if step_of(proposal) == step]


RATES = (6.0, 4.0, 3.0, 2.5, 2.0, 1.6, 1.3)


@given(st.floats(1.0, 7.0))
def test_the_boldest_rate_that_holds_is_found(threshold: float) -> None:
    def facts(settings: dict[str, Any]) -> dict[str, Any]:
        rate = settings.get("rate", 9.0)
        return {"validation": 1.0 if rate >= threshold else 0.5, "bytes": 10 * rate}

    search = ladder(rates=RATES)
    found, _ = walked(search, facts)
    tried = [settings["rate"] for settings in of_step(found, "rate")]
    holding = [rate for rate in RATES if rate >= threshold]
    assert len(tried) <= 5 and all(
        settings["method"] == "gptq" for settings in of_step(found, "rate")
    )
    if holding:
        assert min(holding) in tried
    if holding and len(holding) < len(RATES):
        between = round((min(holding) * RATES[len(holding)]) ** 0.5, 2)
        assert between in tried, "once more, between the last that holds and the next"
    if len(holding) > 1:
        assert holding[-2] in tried, "the next safer one: the certificate may refuse the boldest"


def test_without_a_limit_on_the_drop_the_safest_rate_within_the_bytes_is_found() -> None:
    search = ladder(rates=RATES, budgets=Budgets(max_bytes=30.0))
    found, _ = walked(search, lambda settings: {"bytes": 10 * settings.get("rate", 9.0)})
    assert 3.0 in [settings["rate"] for settings in of_step(found, "rate")]


def test_codebooks_as_pack_makes_them_are_always_tried() -> None:
    for trains in (True, False):
        found, _ = walked(ladder(trains=trains, entries=(32, 16)), lambda settings: {})
        assert [s["codebook"] for s in of_step(found, "codebook")] == [32, 16]


def test_techniques_of_a_structure_share_rounds() -> None:
    search = ladder(rates=RATES, sparsities=(0.5, 0.9), learned=(1.0,))
    found, sizes = walked(search, lambda settings: {})
    assert len(sizes) < len(found) / 1.5 and max(sizes) >= 3


def test_half_of_the_widths_are_recovered_to_the_end() -> None:
    after = {0.9: 0.999, 0.8: 0.95, 0.5: 0.85, 0.25: 0.3}

    def facts(settings: dict[str, Any]) -> dict[str, Any]:
        if "recover" not in settings:
            return {"validation": 0.2 if "width" in settings else 1.0}
        more = 0.06 if len(settings["recover"]) > 1 else 0.0
        return {"validation": after[settings["width"]] + more, "bytes": 100 * settings["width"]}

    search = ladder(widths=tuple(after), prune_epochs=8)
    found, _ = walked(search, facts)
    recovered = [(s["width"], s["recover"]) for s in of_step(found, "recover")]
    assert recovered[:4] == [(width, [2]) for width in after], "all of them for a short while"
    # 0.9 and 0.8 hold already, the others exceed the budget.
    assert recovered[4:] == [(0.9, [2, 6]), (0.8, [2, 6])]
    files = [s for s in of_step(found, "codebook") if "width" in s]
    assert not files, "codebooks are of the dense network alone"


def test_the_bolder_of_equals_is_recovered() -> None:
    search = ladder(widths=(0.9, 0.8, 0.7, 0.6), prune_epochs=4)
    found, _ = walked(search, lambda settings: {})
    assert [s["width"] for s in of_step(found, "recover") if len(s["recover"]) > 1] == [0.7, 0.6]


def test_without_training_a_width_is_a_structure_by_its_re_fit_alone() -> None:
    search = ladder(widths=(0.9, 0.5), rates=(4.0,), trains=False)
    found, _ = walked(search, lambda s: {"validation": 0.5 if s.get("width") == 0.5 else 1.0})
    assert not of_step(found, "recover")
    assert {s.get("width") for s in of_step(found, "rate")} == {None, 0.9}


def test_quantized_training_is_short_first() -> None:
    hopeless = {0.1: 0.2, 0.5: 0.85, 1.0: 0.95, 2.0: 1.0}

    def facts(settings: dict[str, Any]) -> dict[str, Any]:
        return {"validation": hopeless[settings["learned"]]} if "learned" in settings else {}

    found, _ = walked(
        ladder(learned=tuple(sorted(hopeless, reverse=True)), learned_epochs=8), facts
    )
    tried = [(s["learned"], s["epochs"]) for s in of_step(found, "learned")]
    assert tried[:4] == [(goal, 2) for goal in (2.0, 1.0, 0.5, 0.1)]
    assert tried[4:] == [(2.0, 8), (1.0, 8)]
    single, _ = walked(ladder(learned=(0.5,), learned_epochs=8), facts)
    assert [(s["learned"], s["epochs"]) for s in of_step(single, "learned")] == [(0.5, 8)]


def test_units_go_before_quantized_training_alone() -> None:
    found, _ = walked(ladder(learned=(0.5,), units=(8, 4), rates=(3.0,)), lambda settings: {})
    assert [s["width"] for s in of_step(found, "learned")] == [[8, 4]]
    assert all("width" not in s for s in of_step(found, "rate"))


def test_a_width_is_not_cut_by_units_again() -> None:
    found, _ = walked(ladder(learned=(0.5,), units=(8, 4), widths=(0.5,)), lambda settings: {})
    assert {str(s.get("width")) for s in of_step(found, "learned")} == {"0.5", "[8, 4]"}


def test_a_failure_is_no_end() -> None:
    def facts(settings: dict[str, Any]) -> dict[str, Any] | None:
        failing = {"rate", "learned", "codebook", "width"} & set(settings)
        return None if failing else {}

    more = {"widths": (0.5,), "units": (4,), "learned": (1.0, 0.5), "rates": (3.0,)}
    found, _ = walked(ladder(**more), facts)
    assert [s["bits"] for s in of_step(found, "bits")] == [8]


def test_integers_are_tried_on_the_smallest_files_until_one_holds() -> None:
    def facts(settings: dict[str, Any]) -> dict[str, Any]:
        rate = settings.get("rate", 9.0)
        held = rate >= 2.0 and not ("int8" in settings and rate < 3.0)
        return {"validation": 1.0 if held else 0.5, "bytes": 10 * rate}

    budgets = Budgets(max_drop=0.1, objective="ms")
    found, _ = walked(ladder(rates=RATES, integers=True, budgets=budgets), facts)
    tried = [s.get("rate") for s in of_step(found, "int8")]
    assert tried[0] == 2.0 and tried == sorted(tried, key=lambda rate: rate or 9.0)
    last = found[Proposal.of(**of_step(found, "int8")[-1])]
    assert last.facts["validation"] == 1.0
    assert stage_of(last.proposal).endswith("-activations")


@pytest.mark.parametrize("least", [2.5, 3.5, 6.5, math.inf])
def test_finer_weights_are_tried_where_integers_take_a_part_of_the_drop(least: float) -> None:
    def facts(settings: dict[str, Any]) -> dict[str, Any]:
        bits = settings.get(
            "rate", settings.get("bits", 9.0 if "codebook" not in settings else 0.0)
        )
        limit = least if "int8" in settings else 1.0
        return {"validation": 1.0 if bits >= limit else 0.5, "bytes": 10 * bits}

    budgets = Budgets(max_drop=0.1, objective="ms")
    rates = (6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5)
    found, _ = walked(ladder(rates=rates, integers=True, budgets=budgets), facts)
    runs = [s.get("rate", s.get("bits")) for s in of_step(found, "int8")]
    held = [run for run in runs if run >= least]
    # Those that hold without integers, from the boldest on, are 1, 2 and 3.
    assert (
        set(runs)
        == {
            2.5: {1.0, 2.0, 3.0},
            3.5: {1.0, 2.0, 3.0, 4.0, 8},
            6.5: {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8},
            math.inf: {1.0, 2.0, 3.0, 8},
        }[least]
    )
    assert bool(held) == math.isfinite(least)


def test_the_boldest_structure_is_enough_for_a_fast_network() -> None:
    def facts(settings: dict[str, Any]) -> dict[str, Any]:
        return {"bytes": 100 * settings.get("width", 1.0)}

    more: dict[str, Any] = {"widths": (0.7, 0.5), "rates": (3.0,), "trains": False}
    fast, _ = walked(ladder(**more, budgets=Budgets(max_drop=0.1, objective="ms")), facts)
    # And the next safer one, for the certificate.
    assert {s.get("width") for s in of_step(fast, "rate")} == {0.5, 0.7}
    # And the dense network, for one that can show little.
    assert [s.get("width") for s in of_step(fast, "bits")] == [None]
    small, _ = walked(ladder(**more), facts)
    assert {s.get("width") for s in of_step(small, "rate")} == {0.5, 0.7, None}


@given(st.lists(st.lists(st.lists(st.integers(0, 6), max_size=3), max_size=4), max_size=4))
def test_strategies_together_ask_for_what_each_asks_for(plans: list[list[list[int]]]) -> None:
    def asking(rounds: list[list[int]]) -> Asking[list[str]]:
        seen = []
        for numbers in rounds:
            found = yield [Proposal.of(number=number) for number in numbers]
            seen += [item.proposal.text for item in found]
        return seen

    finished: dict[Proposal, Finished] = {}
    rounds = 0
    while missing := missing_of(together(*map(asking, plans)), finished):
        assert len(set(missing)) == len(missing) and not set(missing) & set(finished)
        finished |= {proposal: Finished("", proposal) for proposal in missing}
        rounds += 1
    assert rounds <= max(map(len, plans), default=0)
    whole = together(*map(asking, plans))
    try:
        wanted = next(whole)
        while True:
            wanted = whole.send([finished[proposal] for proposal in wanted])
    except StopIteration as end:
        texts = [[Proposal.of(number=k).text for part in plan for k in part] for plan in plans]
        assert end.value == texts


@pytest.mark.parametrize(
    ("settings", "parent", "words"),
    [
        ({"width": 0.5, "recover": [2, 6]}, {"width": 0.5, "recover": [2]}, "width 0.5, 8 epochs"),
        ({"width": [8, 4], "learned": 0.5, "epochs": 3}, {"width": [8, 4]}, "0.5 bits a weight, 3"),
        (
            {"rate": 2.0, "method": "gptq", "int8": "minmax"},
            {"rate": 2.0, "method": "gptq"},
            "int8",
        ),
    ],
)
def test_each_step_goes_on_from_the_one_before(
    settings: dict[str, Any], parent: dict[str, Any], words: str
) -> None:
    proposal = Proposal.of(dense="given", **settings)
    assert parent_of(proposal) == Proposal.of(dense="given", **parent)
    assert words in words_of(proposal) and structure_of(proposal).settings["dense"] == "given"


@pytest.mark.parametrize("installed", [True, False])
def test_a_structure_that_fails_in_integers_leaves_it_to_a_wider_one(installed: bool) -> None:
    def facts(settings: dict[str, Any]) -> dict[str, Any] | None:
        if "int8" in settings:
            held = settings.get("width") != 0.5
            return {"validation": 1.0 if held else 0.5} if installed else None
        return {}

    more: dict[str, Any] = {
        "widths": (0.7, 0.5),
        "rates": (3.0,),
        "integers": True,
        "trains": False,
    }
    found, _ = walked(ladder(**more, budgets=Budgets(max_drop=0.1, objective="ms")), facts)
    tried = {s.get("width") for s in of_step(found, "int8")}
    # Without the engine the narrowest structure in floats holds; safer ones follow for the certificate.
    assert tried == {0.5, 0.7, None}
    assert len(of_step(found, "rate")) == (3 if installed else 2)
