"""What is selected of small arrays, worked by hand: facts, budgets, earlier masks, units, blocks and layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

import karikomi as kk
from karikomi.errors import InvalidArgument
from karikomi.prune import Blocks, Coupled, Layout, Magnitude, Member, NofM
from karikomi.selection import block_scores
from karikomi.selection.granularity import of_weights
from karikomi.selection.shard import Shard
from karikomi.selection.threads import evenly
from karikomi.selection.weight_source import Source

ROWS = Layout(units=0, inputs=1)


def gone(weights: dict[str, Any], **how: Any) -> dict[str, list[list[int]]]:
    """Return the places that are masked, by name."""
    _, masks = kk.numpy.prune({n: np.array(array, float) for n, array in weights.items()}, **how)
    return {name: np.argwhere(~mask).tolist() for name, mask in masks.items()}


def test_masks_of_arrays_that_are_not_chosen_are_kept() -> None:
    masks = {"b": np.array([False, True, True]), "a": np.array([True, False, True, True])}
    weights = {"a": [4.0, 9.0, 1.0, 3.0], "b": [1.0, 2.0, 3.0]}
    assert gone(weights, sparsity=0.5, only="a", masks=masks) == {"a": [[1], [2]], "b": [[0]]}


def test_a_budget_of_macs_is_that_of_each_weight() -> None:
    # 4 of each weight of a, and 1 of each of b: of 12 at most 6 stay when 5 weights are gone.
    facts = {"macs": {"a": 8.0, "b": 4.0}}
    weights = {"a": [5.0, 6.0], "b": [1.0, 2.0, 3.0, 4.0]}
    assert gone(weights, macs=0.5, facts=facts) == {"a": [[0]], "b": [[0], [1], [2], [3]]}
    assert gone(weights, macs=8, facts=facts) == {"a": [], "b": [[0], [1], [2], [3]]}


def test_a_budget_of_parameters_is_a_share_of_the_whole_network() -> None:
    # Of 10 weights and 3 biases 9 may stay.
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    masks = kk.torch.prune_(model, parameters=0.75)
    assert sum(removed for removed, _ in masks.counts().values()) == 4
    # Of 52 bytes, and 10 bits for the masks, 41 may stay: 36 and 1.25 do.
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    masks = kk.torch.prune_(model, bytes=41)
    assert sum(removed for removed, _ in masks.counts().values()) == 4


def test_the_blocks_of_a_tensor_have_their_own_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_scores, "BLOCK", 2)
    facts = {"gradient": {"a": np.array([1.0, 4.0, 5.0, 2.0])}}
    assert gone({"a": np.ones(4)}, sparsity=0.5, score="snip", facts=facts) == {"a": [[0], [3]]}
    masks = {"a": np.array([True, True, False, True])}
    found = gone({"a": np.ones(4)}, sparsity=0.5, score="snip", facts=facts, masks=masks)
    assert found == {"a": [[0], [2]]}


@pytest.mark.parametrize(("width", "stays"), [(0.25, [1]), (0.75, [0, 1, 3])])
def test_a_width_is_the_share_of_units_that_stays(width: float, stays: list[int]) -> None:
    weights = {"w": [[3.0, 0.0], [9.0, 9.0], [1.0, 1.0], [0.0, 2.0]]}
    found = gone(weights, width=width, score="l2", pattern="units", layouts={"w": ROWS})
    assert found == {"w": [[unit, i] for unit in range(4) if unit not in stays for i in (0, 1)]}


def test_random_numbers_differ_from_tensor_to_tensor_and_with_the_seed() -> None:
    weights = {"a": np.ones((8, 8)), "b": np.ones((8, 8))}
    found = [
        gone(weights, sparsity=0.5, score=kk.prune.Random(seed=seed), allocation="uniform")
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] and found[0]["a"] != found[0]["b"]
    assert found[0]["a"] != found[2]["a"] and len(found[0]["a"]) == 32


def test_n_of_m_keeps_the_best_that_are_left() -> None:
    how: dict[str, Any] = {"layouts": {"w": ROWS}}
    weights = {"w": [[4.0, -3.0, 2.0, 1.0], [1.0, -2.0, 3.0, 5.0]]}
    found = gone(weights, pattern=NofM(keep=1, of=4), **how)
    assert found == {"w": [[0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2]]}
    masks = {"w": np.array([[False, True, True, True], [True] * 4])}
    found = gone(weights, pattern=NofM(keep=2, of=4), masks=masks, **how)
    assert found == {"w": [[0, 0], [0, 3], [1, 0], [1, 1]]}


def test_coupled_parts_are_scored_and_go_together() -> None:
    # Unit 0 has 1 of a and 9 of b, unit 1 has 2 of a and 1 of b; the ends of b are of neither.
    weights = {"a": [[1.0, 0.0], [0.0, 2.0]], "b": [[7.0, 4.0, 1.0, 7.0], [7.0, 5.0, 0.0, 7.0]]}
    group = Coupled("u", 2, (Member("a", 0), Member("b", 1, start=1)))
    found = gone(weights, width=0.5, pattern="units", coupled=[group])
    assert found == {"a": [[1, 0], [1, 1]], "b": [[0, 2], [1, 2]]}
    # What goes along without a score decides nothing.
    group = Coupled("u", 2, (Member("a", 0), Member("b", 1, start=1, scored=False)))
    found = gone(weights, width=0.5, pattern="units", coupled=[group])
    assert found == {"a": [[0, 0], [0, 1]], "b": [[0, 1], [1, 1]]}


def test_layers_are_compared_by_their_means() -> None:
    weights = {"a": [3.0, 3.0], "b": [1.0] * 8}
    assert gone(weights, width=0.5, pattern="layers") == {"a": [], "b": [[i] for i in range(8)]}


def test_blocks_are_units_by_inputs() -> None:
    weights = {"w": [[1.0, 9.0, 9.0], [1.0, 9.0, 9.0], [9.0, 9.0, 0.5], [9.0, 9.0, 0.5]]}
    for share, expected in ((1 / 6, [[2, 2], [3, 2]]), (2 / 6, [[0, 0], [1, 0], [2, 2], [3, 2]])):
        found = gone(weights, sparsity=share, pattern=Blocks(2, 1), layouts={"w": ROWS})
        assert found == {"w": expected}


def test_rows_that_lost_more_before_give_up_less() -> None:
    masks = {"w": np.array([[True, False, False, False], [True] * 4, [True] * 4])}
    for remove, counts in ((6, [3, 2, 1]), (7, [3, 2, 2]), (11, [4, 4, 3])):
        _, found = kk.numpy.prune(
            {"w": np.ones((3, 4))},
            sparsity=remove / 12,
            score="wanda",
            facts={"input_norm": {"w": np.arange(1.0, 5.0)}},
            layouts={"w": ROWS},
            masks=masks,
        )
        assert (~found["w"]).sum(axis=1).tolist() == counts


def test_wanda_ranks_the_magnitudes_of_a_row() -> None:
    # Times 1, 3 and 2: 4, 3, 2 and 2, 6, 4.
    facts = {"input_norm": {"w": np.array([1.0, 3.0, 2.0])}}
    weights = {"w": [[-4.0, 1.0, 1.0], [2.0, -2.0, -2.0]]}
    found = gone(weights, sparsity=1 / 3, score="wanda", facts=facts, layouts={"w": ROWS})
    assert found == {"w": [[0, 2], [1, 0]]}


def test_n_of_m_takes_no_target() -> None:
    with pytest.raises(InvalidArgument, match=r"itself determines how much goes: 50%.*sparsity"):
        gone({"w": [[1.0] * 4]}, sparsity=0.5, pattern=NofM(keep=2, of=4), layouts={"w": ROWS})


def test_ties_go_in_the_order_of_the_tensors() -> None:
    assert gone({"a": [1.0] * 3, "b": [1.0] * 2}, sparsity=0.4) == {"a": [[0], [1]], "b": []}
    assert gone({"a": [2.0, 1.0, 1.0], "b": [1.0] * 3}, sparsity=0.5) == {
        "a": [[1], [2]],
        "b": [[0]],
    }


def test_lists_of_work_are_even() -> None:
    assert evenly([3, 5, 3, 4, 3], 2, entries=int) == [[5, 3], [4, 3, 3]]
    assert evenly([1], 3, entries=int) == [[1]]


def test_a_part_counts_as_the_whole_of_all_ranks() -> None:
    part = Shard(
        whole=(4,), shape=(2,), offsets=(2,), summed=lambda numbers: 2 * numbers, over=(0, 1)
    )
    source = Source(name="w", shape=(2,), array=lambda: np.ones(2), part=part)
    scored = of_weights(source, Magnitude(), np.array([True, False]))
    assert (source.whole, source.size) == ((4,), 2) and (scored.items, scored.gone) == (4, 2)
