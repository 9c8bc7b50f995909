"""What pruning reports and shares out, on tensors of unequal size, worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import karikomi as kk
from karikomi.errors import InvalidArgument
from karikomi.prune import Layout, NofM, Tensor, allocate, target_of
from karikomi.prune.account import Account, Row, error_ratio, row_of
from karikomi.prune.facts import PER_TENSOR, PER_UNIT, TABLE
from karikomi.prune.penalties.penalty import term
from karikomi.prune.schedules.dynamic import SET, RigL
from karikomi.prune.schedules.gradual import Gradual
from karikomi.prune.schedules.iterative import Iterative
from karikomi.shrink import ShrinkReport, UnitFacts, plan

ROWS = (
    Row(name="a", removed=3, size=4, why="small", output_error=0.5, reads_nothing=(1,)),
    Row(name="b", removed=1, size=12, why="as before", unread=(0, 2)),
)


def test_an_account_counts_weights_and_not_tensors() -> None:
    account = Account(ROWS, output_error=0.25, notes=("a note",))
    assert account.sparsity == 4 / 16 and ROWS[0].sparsity == 0.75
    plain = account.as_dict()
    assert (plain["sparsity"], plain["output_error"]) == (0.25, 0.25)
    assert [row["removed"] for row in plain["rows"]] == [3, 1] and plain["notes"] == ["a note"]
    assert Account().sparsity == 0.0


def test_an_account_prints_what_it_counts() -> None:
    head, *lines, note = str(Account(ROWS, output_error=0.25, notes=("a note",))).splitlines()
    assert head.split() == ["tensor", "removed", "of", "sparsity", "output", "error", "why"]
    cells = [line.split(maxsplit=5) for line in lines]
    assert cells == [
        ["a", "3", "4", "75.0%", "0.5", "small; reads nothing: 1"],
        ["b", "1", "12", "8.3%", "-", "as before; unread: 0, 2"],
        ["all", "4", "16", "25.0%", "0.25"],
    ]
    assert note == "a note"


@pytest.mark.parametrize(
    ("count", "said"), [(6, "0, 1, 2, 3, 4, 5"), (8, "0, 1, 2, 3, 4, 5 and 2 more")]
)
def test_a_row_prints_six_indices_and_how_many_more(count: int, said: str) -> None:
    row = Row(name="a", removed=8, size=9, why="small", unread=tuple(range(count)))
    assert str(Account((row,))).splitlines()[1].endswith(f"small; unread: {said}")


@pytest.mark.parametrize("units", [0, 1])
@pytest.mark.parametrize("kernel", [1, 2])
def test_a_row_names_units_that_read_nothing_and_inputs_that_are_not_read(
    units: int, kernel: int
) -> None:
    mask = np.array([[True, False, True], [False] * 3, [True, False, False], [False] * 3])
    mask = np.repeat((mask if units == 0 else mask.T)[..., None], kernel, axis=2)
    layout = Layout(units=units, inputs=1 - units)
    row = row_of("w", mask, layout, removed=9 * kernel, why=None, output_error=None)
    assert (row.reads_nothing, row.unread) == ((1, 3), (1,))
    assert (row.sparsity, row.why) == (0.75, "as before")


def test_a_ratio_of_errors_is_that_of_norms() -> None:
    assert error_ratio(9.0, 36.0) == 0.5
    assert error_ratio(0.0, 0.0) == 0.0 and error_ratio(1.0, 0.0) == math.inf


def test_masks_count_weights_and_not_tensors() -> None:
    masks = kk.torch.Masks(
        {"a": torch.tensor([False, False]), "b": torch.tensor([True] * 5 + [False])}
    )
    assert masks.sparsity == 3 / 8 and masks.emptied == ("a",)
    assert masks.counts() == {"a": (2, 2), "b": (1, 6)}
    assert repr(masks) == "Masks(2 tensors, 37.50% zero)"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"sparsity": 0.875}, [0.5, 0.75, 0.875]), ({"width": 0.125}, [0.5, 0.25, 0.125])],
)
def test_each_round_leaves_the_same_share(given: Any, expected: list[float]) -> None:
    target = target_of(where="here", **given)
    found = [target.after(number, 3).value for number in (1, 2, 3)]
    assert found == pytest.approx(expected, rel=1e-12) and found[-1] == expected[-1]


def test_the_share_of_n_of_m_is_what_goes() -> None:
    assert NofM(keep=1, of=4).sparsity == 0.75 and NofM(keep=3, of=4).sparsity == 0.25


def removed(name: str, tensors: dict[str, Tensor], sparsity: float) -> dict[tuple[str, ...], int]:
    return {pool.names: pool.remove for pool in allocate(name, tensors, sparsity)}


def test_uniform_rounds_up_where_most_is_left_over() -> None:
    tensors = {name: Tensor(items=items) for name, items in (("a", 3), ("b", 5), ("c", 10))}
    # Of 18 go 6; the quotas are 1.05, 1.75 and 3.5.
    assert removed("uniform", tensors, 0.35) == {("a",): 1, ("b",): 2, ("c",): 3}
    assert removed("global", tensors, 0.35) == {("a", "b", "c"): 6}


def test_what_is_gone_already_counts_and_the_others_give_less() -> None:
    tensors = {"a": Tensor(items=10, gone=8), "b": Tensor(items=10), "c": Tensor(items=20)}
    # 20 go: 8 are gone from a, and 12 are shared by b and c as 5 to 10.
    assert removed("uniform", tensors, 0.5) == {("a",): 8, ("b",): 4, ("c",): 8}


def test_isomorphic_shares_within_a_shape_and_what_is_gone_there_too() -> None:
    tensors = {
        "a": Tensor(items=6, shape=(2, 3)),
        "b": Tensor(items=4, shape=(4,)),
        "c": Tensor(items=6, shape=(2, 3)),
    }
    assert removed("isomorphic", tensors, 0.5) == {("a", "c"): 6, ("b",): 2}
    tensors["c"] = Tensor(items=6, shape=(2, 3), gone=6)
    tensors["a"] = Tensor(items=6, shape=(2, 3), gone=1)
    assert removed("isomorphic", tensors, 0.5) == {("a", "c"): 7, ("b",): 1}


def test_owl_by_hand() -> None:
    tensors = {
        "a": Tensor(items=100, outliers=0.01),
        "b": Tensor(items=100, outliers=0.02),
        "c": Tensor(items=100, outliers=0.05),
    }
    # Levels of 0, 1 / 4 and 1 of 0.16 below the first, whose mean is 0.5: 0.5 + 0.16 * 5 / 12.
    found = removed("owl", tensors, 0.5)
    assert found == {("a",): 57, ("b",): 53, ("c",): 40}


def test_sensitivity_by_hand() -> None:
    # Within a loss of 0.1, a gives one half of 800 and b one quarter of 2400.
    tensors = {
        "a": Tensor(items=800, curve={0.5: 0.1, 0.9: 1.0}),
        "b": Tensor(items=2400, curve={0.25: 0.1, 0.5: 0.4, 0.9: 1.0}),
    }
    assert removed("sensitivity", tensors, 1000 / 3200) == {("a",): 400, ("b",): 600}


def test_a_loss_that_falls_again_is_no_gain() -> None:
    # Half of a costs 0.2, as a quarter does: within a loss of 0.5 both give 0.5 + 0.4 * 3 / 8.
    tensors = {
        "a": Tensor(items=1000, curve={0.25: 0.2, 0.5: 0.1, 0.9: 1.0}),
        "b": Tensor(items=1000, curve={0.5: 0.2, 0.9: 1.0}),
    }
    assert removed("sensitivity", tensors, 0.65) == {("a",): 650, ("b",): 650}


def test_marked_weights_are_those_whose_mask_is_false() -> None:
    weights, kept = np.array([[3.0, -2.0], [4.0, 1.0]]), np.array([[True, False], [False, True]])
    rule = kk.prune.GrowingL2(1.0)
    value = term(rule, weights, (), kept, xp=np, constant=lambda array: array)
    assert float(value) == (4.0 + 16.0) / 2


def test_the_steps_of_gradual_by_hand() -> None:
    rule = Gradual(0.75, steps=(2, 12), every=4, initial=0.25)
    assert [step for step in range(20) if rule.due(step)] == [2, 6, 10, 12]
    # Of 0.5 less what is left to go, cubed: 1, 0.6, 0.2 and 0.
    shares = [0.75 - 0.5 * part**3 for part in (1.0, 0.6, 0.2, 0.0)]
    assert [rule.sparsity_at(step) for step in (2, 6, 10, 12)] == pytest.approx(shares)
    assert rule.last == 12


def test_the_rounds_of_iterative_by_hand() -> None:
    rule = Iterative(0.875, steps=(4, 10), rounds=3, rewind=1)
    assert [step for step in range(20) if rule.due(step)] == [4, 7, 10]
    assert [rule.sparsity_at(step) for step in (3, 4, 6, 7, 10, 11)] == pytest.approx(
        [0.0, 0.5, 0.5, 0.75, 0.875, 0.875]
    )
    assert (rule.rewinds_to, rule.last) == (1, 10)


def test_the_moves_of_set_and_rigl_by_hand() -> None:
    rigl, moves = RigL(0.5, until=8, every=3, drop=0.4), SET(0.5, until=8, every=3, drop=0.4)
    for rule in (rigl, moves):
        assert [step for step in range(12) if rule.due(step)] == [0, 3, 6]
        assert rule.last == 7 and rule.sparsity_at(5) == 0.5
    assert [rigl.drop_at(step) for step in (0, 4, 8)] == pytest.approx([0.4, 0.2, 0.0])
    assert [moves.drop_at(step) for step in (0, 4)] == [0.4, 0.4]
    assert (rigl.regrows_by, moves.regrows_by) == ("gradient", "noise")


def test_a_plan_counts_units_of_all_layers() -> None:
    def facts(incoming: list[int], outgoing: list[int], constants: list[float]) -> UnitFacts:
        return UnitFacts(
            incoming_zero=np.array(incoming, bool),
            outgoing_zero=np.array(outgoing, bool),
            constants=np.array(constants),
        )

    found = plan(
        {
            "a": facts([1, 1, 0, 0], [0, 0, 1, 0], [0.0, 2.0, 5.0, 7.0]),
            "b": facts([0, 1], [0, 0], [1.0, 0.0]),
        }
    )
    assert {name: kept.tolist() for name, kept in found.kept.items()} == {"a": [3], "b": [0]}
    assert {name: units.tolist() for name, units in found.folded.items()} == {"a": [1], "b": []}
    assert found.removed == 4 and not found.left_alone


def test_a_report_of_shrinking_counts_units() -> None:
    report = ShrinkReport(
        widths_before={"a": 5, "b": 3},
        widths_after={"a": 4, "b": 1},
        parameters_before=40,
        parameters_after=11,
        left_alone={},
        max_difference=0.0,
    )
    assert report.removed == 3 and report.as_dict()["removed"] == 3


def test_the_facts_that_have_one_number_per_unit_or_tensor() -> None:
    assert PER_UNIT == {"zeros", "output", "deviation", "gate"}
    assert PER_TENSOR == {"macs", "outliers", "curve"}
    assert TABLE["gate"].on == TABLE["macs"].on == TABLE["flow"].on == "first batch"


def test_the_globs_of_a_schedule_are_strings() -> None:
    assert Gradual(0.5, steps=(0, 1), only=["a", "b"]).only == ("a", "b")  # type: ignore[arg-type]
    for wrong in (("a", 3), 3, [None]):
        with pytest.raises(InvalidArgument, match="Gradual.exclude: globs over names are strings"):
            Gradual(0.5, steps=(0, 1), exclude=wrong)  # type: ignore[arg-type]
