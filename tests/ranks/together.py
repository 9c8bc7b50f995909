"""Clip, update clip, bound, pruning and penalties at once on sharded weights, stopped and continued."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

import karikomi as kk
from ranks.bounding import found
from ranks.masks import as_lists, gathered, here, through_a_file
from ranks.networks import gap, gradients, numbers, rank, weights

Build = Callable[[], tuple[Any, Any]]
STEPS, STOP = 8, 3
PENALTIES = {
    "l1": kk.prune.L1(0.1),
    "group lasso": kk.prune.GroupLasso(0.1),
    "growing l2": kk.prune.GrowingL2(1.0, growth=0.1, every=1),
}


class Run:
    """A network, its optimizer and its handle."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        self.handle = kk.torch.attach(
            self.optimizer,
            model,
            clip=kk.clip.AutoClip(50),
            update=kk.clip.BlockRMS(1.0),
            bound=kk.bound.MaxNorm(0.6),
            prune=kk.prune.Gradual(0.7, steps=(1, 6), every=2),
        )

    def steps(self, first: int, last: int) -> Run:
        """Train from one step to another, on data that all ranks have."""
        for step in range(first, last):
            inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            loss = self.model(inputs.to(next(self.model.parameters()).dtype)).square().sum()
            loss = loss + kk.torch.penalty(self.model, kk.prune.GroupLasso(1e-3), step=step)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return self

    def save(self, folder: Path) -> Any:
        """Write what is sharded as torch does, and return the rest, which each rank keeps."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        return through_a_file(self.handle.state_dict())

    def load(self, folder: Path, handle: Any) -> Run:
        """Go on from a file."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
        self.handle.load_state_dict(handle)
        return self


def resumed(build: Build) -> dict[str, Any]:
    """Killed and resumed is not stopping, and both are as in one process."""
    made: list[Any] = [tempfile.mkdtemp() if rank() == 0 else None]
    dist.broadcast_object_list(made)
    folder = Path(made[0])
    model, alone = build()
    straight, whole = Run(model).steps(0, STEPS), Run(alone).steps(0, STEPS)
    handle = Run(build()[0]).steps(0, STOP).save(folder)
    again = Run(build()[0]).load(folder, handle).steps(STOP, STEPS)
    dist.barrier()
    if rank() == 0:
        shutil.rmtree(folder)
    bits = {n: here(one) for n, one in straight.model.named_parameters()}
    same = [torch.equal(here(one), bits[n]) for n, one in again.model.named_parameters()]
    kept = [gathered(one.handle.masks) for one in (straight, again)]
    rows = weights(again.model)["up.weight"].norm(dim=1)
    return {
        "facts": [
            ["bits", same, [True] * len(same)],
            ["masks", kept[1] == kept[0], True],
            ["masks alone", kept[0], as_lists(whole.handle.masks)],
            ["clip", numbers(again.handle.last), numbers(whole.handle.last)],
            ["bound", found(again.handle.last_bound), found(whole.handle.last_bound)],
            ["weights", gap(weights(again.model), weights(alone)), 0.0],
            ["bounded", bool((rows < 0.6 + 1e-5).all() and (rows > 0.59).any()), True],
        ],
        "same": {"masks": kept[1]},
    }


def penalised(build: Build, rule: Any, *, beside: bool) -> dict[str, Any]:
    """A penalty is that of the whole, and so is its gradient, alone or beside a loss."""
    model, alone = build()
    masks = expected = None
    if isinstance(rule, kk.prune.GrowingL2):
        marked = build()
        options = {"sparsity": 0.5, "protect": ()}
        masks, expected = (kk.torch.prune_(one, **options) for one in marked)
        # Whole ones, of which each rank takes its part.
        masks = masks if beside else kk.torch.Masks(expected)
    facts = []
    terms = []
    for one, kept in ((model, masks), (alone, expected)):
        torch.manual_seed(2)
        inputs = torch.randn(8, 6).to(next(one.parameters()).dtype)
        loss = one(inputs).square().sum() if beside else 0.0
        term = kk.torch.penalty(one, rule, step=3, masks=kept)
        (loss + term).backward()
        terms.append(term)
    facts.append(["term", *(float(one.detach()) for one in terms)])
    facts.append(["plain", isinstance(terms[0], DTensor), False])
    facts.append(["gradients", gap(gradients(model), gradients(alone)), 0.0])
    return {"facts": facts}


class Normed(nn.Module):
    """A batch norm between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return one number per row."""
        return self.down(self.norm(self.up(inputs)))


def scenarios(label: str, build: Build) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the scenarios of one way in which weights lie."""
    return {
        f"penalty {label}, {key}{' beside a loss' if beside else ''}": partial(
            penalised, build, rule, beside=beside
        )
        for key, rule in PENALTIES.items()
        for beside in (False, True)
    }
