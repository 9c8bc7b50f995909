"""Recovery of replicas: one file for all ranks, from which each goes on as if it had not been stopped."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import karikomi as kk
from karikomi.files import write_atomically
from ranks.networks import message, rank


class Stopped(Exception):
    """Somebody pulls the plug."""


def replica() -> tuple[Any, Any]:
    """Return replicas, each with statistics of its own, and their masks."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(*layers), broadcast_buffers=False)
    return wrapped, kk.torch.prune_(wrapped, 0.5)


def own_data() -> Any:
    """Return batches that are this rank's own, in an order that is its own."""
    numbers = torch.Generator().manual_seed(10 + rank())
    inputs = torch.randn(48, 6, generator=numbers)
    pairs = TensorDataset(inputs, inputs[:, :3].argmax(1))
    return DataLoader(pairs, batch_size=12, shuffle=True, generator=numbers)


def recover(wrapped: Any, masks: Any, *, stop_at: int = 99, **given: Any) -> Any:
    """Recover for three epochs of four batches; `stop_at`: the batch at which it is stopped."""
    calls = 0

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > stop_at:
            raise Stopped
        return F.cross_entropy(outputs, targets)

    how = {"loss": loss, "epochs": 3, "rate": 0.05, "progress": False, **given}
    return kk.torch.recover_(wrapped, masks, own_data(), **how)


def as_lists(wrapped: Any) -> dict[str, list]:
    """Return weights and statistics as lists."""
    return {name: one.tolist() for name, one in wrapped.module.state_dict().items()}


def folder_of_all() -> Path:
    """Return a new folder, the same on all ranks."""
    made: list[Any] = [tempfile.mkdtemp() if rank() == 0 else None]
    dist.broadcast_object_list(made)
    return Path(made[0])


def continued() -> dict[str, Any]:
    """Stopped in the second epoch and continued, it is the recovery that was not stopped."""
    folder = folder_of_all()
    path = folder / "recovery.pt"
    straight, masks = replica()
    wanted = recover(straight, masks)
    with mock.patch(
        "karikomi.torch.recovery.retraining.write_atomically", side_effect=write_atomically
    ) as w:
        stopped, masks = replica()
        raised = message(lambda: recover(stopped, masks, stop_at=6, checkpoint=path))
        again, masks = replica()
        found = recover(again, masks, checkpoint=path)
    dist.barrier()
    other, masks = replica()
    elsewhere = path if rank() == 0 else folder / "elsewhere.pt"
    said = [
        message(lambda: recover(other, masks, checkpoint=elsewhere)),
        message(lambda: recover(other, masks, checkpoint=path, seed=rank())),
        message(lambda: recover(other.module, masks, checkpoint=path)),
    ]
    judged, masks = replica()
    dense = as_lists(judged)
    says = iter([1.0, 2.0 if rank() == 0 else 0.0])
    verdict = recover(judged, masks, judge=lambda _: next(says))
    files = sorted(one.name for one in folder.iterdir())
    dist.barrier()
    if rank() == 0:
        shutil.rmtree(folder)
    weights = {n: p.tolist() for n, p in again.module.named_parameters()}
    return {
        "facts": [
            ["stopped", raised.startswith("Stopped"), True],
            ["losses", found.losses == wanted.losses, True],
            ["bits", as_lists(again) == as_lists(straight), True],
            ["written", w.call_count, 3 if rank() == 0 else 0],
            ["files", files, ["recovery.pt"]],
            ["elsewhere", "the ranks found different checkpoints" in said[0], True],
            ["another", "Unsupported" in said[1] and ("seed 0, now 1" in said[1]), True],
            ["judges", [verdict.kept, as_lists(judged) == dense], [False, True]],
            ["alone", "replicas 2, now 1" in said[2], True],
        ],
        "same": {"weights": weights},
    }
