"""Masks of parts and of copies: joined, saved, refused where they do not belong; deep copies and compiled modules."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import karikomi as kk  # noqa: E402
from karikomi.errors import BadFile, InvalidArgument  # noqa: E402
from karikomi.prune.allocations.allocation import Pool  # noqa: E402
from karikomi.selection.block_scores import BlockScores, keep_best  # noqa: E402
from karikomi.selection.shard import Shard  # noqa: E402
from karikomi.torch.pruning.mask_shards import ShardPlace  # noqa: E402
from karikomi.torch.pruning.masks import Masks  # noqa: E402


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))


def parts_of(mask: torch.Tensor, rows: int, columns: int) -> list[Masks]:
    """Return a mask cut at a row and a column."""
    cuts = [(r, c) for r in (slice(0, rows), slice(rows, None)) for c in (0, 1)]
    found = []
    for row, side in cuts:
        column = slice(columns, None) if side else slice(0, columns)
        place = ShardPlace(tuple(mask.shape), (row.start, column.start))
        found.append(Masks({"w": mask[row, column]}, places={"w": place}))
    return found


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    cut=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    seed=st.integers(0, 99),
)
def test_parts_that_were_saved_are_the_whole_again(
    shape: tuple[int, int], cut: tuple[int, int], seed: int
) -> None:
    mask = torch.from_numpy(np.random.default_rng(seed).random(shape) < 0.5)
    parts = parts_of(mask, min(cut[0], shape[0]), min(cut[1], shape[1]))
    states = [part.state_dict() for part in parts]
    whole = Masks.joined(map(Masks.from_state_dict, [*states, states[0]]))
    assert torch.equal(whole["w"], mask) and not whole.places


def test_what_is_no_whole_is_said() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    one, two, three, four = parts_of(mask, 1, 2)
    with pytest.raises(InvalidArgument, match="w: the masks of some ranks are missing; got 4 of 6"):
        Masks.joined([one, two, four])
    other = Masks({"w": ~one["w"]}, places=one.places)
    with pytest.raises(InvalidArgument, match="w: two masks of the same weights differ"):
        Masks.joined([one, two, three, four, other])
    elsewhere = Masks({"w": one["w"]}, places={"w": ShardPlace((3, 3), (0, 0))})
    with pytest.raises(InvalidArgument, match="different tensors"):
        Masks.joined([one, elsewhere])


@pytest.mark.parametrize(
    "damage",
    [
        {"from": [2, 0]},
        {"from": [-1, 0]},
        {"from": [0]},
        {"of": "ab"},
        {"of": None},
        {"of": [1, 1]},
    ],
)
def test_a_damaged_part_is_named(damage: dict[str, Any]) -> None:
    state = parts_of(torch.ones(2, 3, dtype=torch.bool), 1, 2)[0].state_dict()
    state["w"] |= damage
    with pytest.raises(BadFile, match="^w: "):
        Masks.from_state_dict(state)


def test_a_part_does_not_go_onto_a_whole_weight() -> None:
    layer = nn.Linear(2, 2, bias=False)
    place = ShardPlace((4, 2), (2, 0))
    masks = Masks({"weight": torch.zeros(2, 2, dtype=torch.bool)}, places={"weight": place})
    before = layer.weight.detach().clone()
    with pytest.raises(InvalidArgument, match="weight: the mask does not fit.*joined"):
        masks.apply_(layer)
    assert torch.equal(layer.weight, before)


class Meeting:
    """Threads that add up arrays, as ranks do."""

    def __init__(self, size: int) -> None:
        self._barrier, self._given = threading.Barrier(size, timeout=20.0), [np.zeros(0)] * size

    def summed(self, rank: int) -> Any:
        def add(numbers: np.ndarray) -> np.ndarray:
            self._given[rank] = numbers
            self._barrier.wait()
            total = sum(self._given)
            self._barrier.wait()
            return total

        return add


@pytest.mark.parametrize("seed", range(60))
def test_parts_keep_what_the_whole_keeps(seed: int) -> None:
    """Of a tensor in two parts and one that all have; few values, so that most of them are ties."""
    generator = np.random.default_rng(seed)
    rows, columns = generator.integers(1, 7, 2)
    cut, axis, remove = generator.integers(0, [7, 2, rows * columns + 1])
    split, shared = generator.integers(0, 3, (2, rows, columns)).astype(np.float32)
    gone = generator.random(split.shape) < 0.2
    pool = Pool(("split", "shared"), min(remove, 2 * split.size))

    def kept(own: np.ndarray, hidden: np.ndarray, part: Shard | None) -> np.ndarray:
        total = int(np.count_nonzero(hidden))
        values = np.where(hidden, np.float32(np.nan), own).reshape(-1)
        first = BlockScores(
            "split",
            split.size,
            total if part is None else part.total(total)[0],
            lambda stride: [values[::stride]],
            part,
        )
        whole = BlockScores("shared", split.size, 0, lambda stride: [shared.reshape(-1)[::stride]])
        out = {"split": np.zeros(values.size, bool), "shared": np.zeros(split.size, bool)}
        keep_best({"split": first, "shared": whole}, [pool], out)
        return out["split"].reshape(own.shape)

    place = min(cut, split.shape[axis])
    meeting = Meeting(2)

    def rank(number: int) -> np.ndarray:
        where = [slice(None), slice(None)]
        where[axis] = slice(place, None) if number else slice(0, place)
        own = split[tuple(where)]
        offsets = [0, 0]
        offsets[axis] = place * number
        part = Shard(
            whole=split.shape,
            shape=own.shape,
            offsets=tuple(offsets),
            summed=meeting.summed(number),
            over=(0, 1),
        )
        return kept(own, gone[tuple(where)], part)

    with ThreadPoolExecutor(2) as threads:
        sides = list(threads.map(rank, (0, 1)))
    assert np.array_equal(np.concatenate(sides, axis), kept(split, gone, None))


# --- copies and wrappers


def trained(module: nn.Module, masks: Any, steps: int = 3) -> nn.Module:
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    kk.torch.attach(sgd, module, prune=masks)
    for step in range(steps):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        sgd.zero_grad()
        module(inputs).square().sum().backward()
        sgd.step()
    return module


def test_deep_copies_of_module_and_masks_train_alike() -> None:
    module = network()
    masks = kk.torch.prune_(module, 0.7)
    twin, own = copy.deepcopy(module), copy.deepcopy(masks)
    one, other = trained(module, masks), trained(twin, own)
    for name, weight in one.named_parameters():
        assert torch.equal(weight, dict(other.named_parameters())[name])
        if name in masks:
            assert not weight[~masks[name]].any() and weight[masks[name]].all()
            assert own[name].data_ptr() != masks[name].data_ptr()


def test_a_compiled_module_is_pruned_under_the_names_of_its_own() -> None:
    plain, module = network(), network()
    compiled = torch.compile(module, backend="eager")
    masks, expected = kk.torch.prune_(compiled, 0.7), kk.torch.prune_(plain, 0.7)
    assert set(masks) == set(expected) == {"0.weight", "2.weight"}
    trained(compiled, masks), trained(plain, expected)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(dict(module.named_parameters())[name], weight)
    assert not module[0].weight[~masks["0.weight"]].any()
    again = Masks.from_state_dict(masks.state_dict())
    again.apply_(torch.compile(network(), backend="eager"))
