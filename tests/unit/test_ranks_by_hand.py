"""What ranks add up, worked by hand in one process: shares of copies, other ranks, parts, replicas."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import karikomi as kk
from karikomi.torch.bounding.sharded import ShardedWeights
from karikomi.torch.clipping import joint_norms
from karikomi.torch.distributed import collectives, replicas
from karikomi.torch.distributed.dtensors import Joint, joints
from karikomi.torch.distributed.fsdp import reshard_


def test_squares_count_by_their_shares_and_peaks_as_they_are() -> None:
    numbers, shares = np.array([3.0, 8.0, 8.0]), np.array([1.0, 0.25, 0.25])
    found, present = collectives.reduced(
        (), numbers, np.array([True, True, False]), shares, np.array([False, False, True])
    )
    np.testing.assert_allclose(found, [3.0, 4.0, 8.0], rtol=1e-12)
    assert present.tolist() == [True, True, False]


class Mesh:
    """Six ranks: three shards, of which there are two copies."""

    ndim, shape, mesh = 2, (2, 3), torch.arange(6).reshape(2, 3)

    def size(self, dim: int | None = None) -> int:
        return 6 if dim is None else self.shape[dim]

    def get_coordinate(self) -> list[int]:
        return [0, 0]

    def get_group(self, dim: int) -> str:
        return f"group {dim}"


def test_a_shard_of_which_there_are_copies_counts_by_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 12)
    copied, split = SimpleNamespace(), SimpleNamespace(dim=0)
    mesh = Mesh()
    found: dict[str, Any] = {
        "once": SimpleNamespace(device_mesh=mesh, placements=(split, split)),
        "twice": SimpleNamespace(device_mesh=mesh, placements=(copied, split)),
        "everywhere": SimpleNamespace(device_mesh=mesh, placements=(copied, copied)),
        "plain": torch.ones(2),
    }
    (joint,) = joints(found)
    assert joint.shares == {"once": 1.0, "twice": 0.5}
    assert (joint.over, joint.groups) == (tuple(range(6)), ("group 0", "group 1"))
    (joint,) = joints(found, copied=True)
    assert joint.shares == {"once": 1.0, "twice": 0.5, "everywhere": 1 / 6}


def test_the_norm_of_other_ranks_is_without_that_of_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The norms of three ranks, of which this one is the second; the last has no gradient.
    every = np.array([[3.0, 1.0], [5.0, 1.0], [0.0, 0.0]])
    monkeypatch.setattr(collectives, "gathered", lambda group, own: every)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    other: Any = SimpleNamespace(group=None)
    numbers, present = np.array([3.0, 4.0]), np.array([True, True])
    for peak in (False, True):
        found = joint_norms._elsewhere(other, np.array([0, 1]), peak, True, numbers, present)
        assert found == (3.0, True)
    found = joint_norms._elsewhere(other, np.array([0, 1]), False, False, numbers, present)
    assert found == (0.0, False)


def test_entries_at_the_bound_count_by_their_shares() -> None:
    weights = object.__new__(ShardedWeights)
    weights._joints = [Joint((0, 1), (), {"a": 0.5, "c": 0.25}), Joint((2, 3), (), {"b": 1.0})]
    assert weights.totals({"a": 8, "b": 3, "d": 5}) == {"a": 4.0, "b": 3.0, "d": 5}


def test_all_gathered_modules_are_sharded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Unit(nn.Linear):
        def reshard(self) -> None:
            calls.append(self.out_features)

    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", SimpleNamespace(FSDPModule=Unit))  # type: ignore[arg-type]
    reshard_(nn.Sequential(Unit(1, 2), nn.Linear(2, 2), Unit(2, 3)))
    assert calls == [2, 3]


def test_a_replica_knows_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1, 1)
    assert (replicas.rank_of(model), replicas.gathered(model, "own")) == (0, ["own"])
    monkeypatch.setattr(replicas, "replica_count", lambda module: 3)
    monkeypatch.setattr(dist, "get_rank", lambda group: 2)
    assert replicas.rank_of(model) == 2


def test_a_penalty_of_a_sharded_weight_acts_on_what_is_marked() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(2, 2, bias=False)
        rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        model.weight = nn.Parameter(distribute_tensor(rows, mesh, [Shard(0)]))
        masks = {"weight": torch.tensor([[True, False], [False, True]])}
        rule = kk.prune.GrowingL2(1.0, growth=1.0)
        value = kk.torch.penalty(model, rule, masks=masks, step=0)
        value.backward()
        assert float(value.detach()) == (4.0 + 9.0) / 2
        gradient: Any = model.weight.grad
        assert gradient.to_local().tolist() == [[0.0, 2.0], [3.0, 0.0]]
    finally:
        dist.destroy_process_group()
