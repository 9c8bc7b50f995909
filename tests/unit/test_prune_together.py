"""Clip, bound, penalty and gradual pruning in one PyTorch loop: killed and resumed is not stopping."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import karikomi as kk

STEPS, STOP = 40, 17
PENALTIES = {
    "group lasso": kk.prune.GroupLasso(1e-3),
    "l1 that fades": kk.prune.L1(kk.schedule.Linear(1e-3, 0.0, steps=(0, 30))),
}
SCHEDULES = {
    "gradual": kk.prune.Gradual(0.8, steps=(3, 30), every=5),
    "gradual by gradients": kk.prune.Gradual(0.8, steps=(3, 30), every=5, score="taylor"),
    "units": kk.prune.Gradual(0.5, steps=(3, 30), every=5, pattern="units"),
    "rewound": kk.prune.Iterative(0.8, steps=(8, 30), rounds=3, rewind=4),
    "rigl": kk.prune.RigL(0.8, until=30, every=5),
}


class Run:
    """A network, its optimizer and its handle, at a step."""

    def __init__(self, schedule: Any, penalty: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()
        ).append(nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.penalty = penalty
        self.handle = kk.torch.attach(
            self.optimizer,
            self.model,
            clip=kk.clip.AutoClip(50),
            bound=kk.bound.MaxNorm(1.5),
            prune=schedule,
        )

    def steps(self, first: int, last: int) -> Run:
        """Train from one step to another."""
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(32, 12, generator=generator)
            loss = nn.functional.cross_entropy(self.model(inputs), inputs[:, :4].argmax(1))
            loss = loss + kk.torch.penalty(self.model, self.penalty, step=step)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return self

    def saved(self) -> io.BytesIO:
        """Return everything in a file."""
        file = io.BytesIO()
        parts = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "handle": self.handle.state_dict(),
        }
        torch.save(parts, file)
        file.seek(0)
        return file

    def loaded(self, file: io.BytesIO) -> Run:
        """Go on from a file."""
        parts = torch.load(file, weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.handle.load_state_dict(parts["handle"])
        return self


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_killed_and_resumed_is_not_stopping(schedule: str, penalty: str) -> None:
    made = SCHEDULES[schedule], PENALTIES[penalty]
    whole = Run(*made).steps(0, STEPS)
    first = Run(*made).steps(0, STOP)
    again = Run(*made).loaded(first.saved()).steps(STOP, STEPS)
    for (name, one), other in zip(
        whole.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    for name, mask in (whole.handle.masks or {}).items():
        assert torch.equal(mask, again.handle.masks[name]), name  # type: ignore[index]


def test_each_of_them_does_its_part() -> None:
    run = Run(SCHEDULES["gradual"], PENALTIES["group lasso"]).steps(0, STEPS)
    assert run.handle.masks is not None and abs(run.handle.masks.sparsity - 0.8) < 1e-3
    assert run.handle.last_bound is not None and run.handle.last is not None
    rows = run.model[0].weight.norm(dim=1)  # type: ignore[union-attr]
    assert (rows <= 1.5 + 1e-5).all()
    for name, parameter in run.model.named_parameters():
        if name in run.handle.masks:
            assert (parameter[~run.handle.masks[name]] == 0).all()
            moments = run.optimizer.state[parameter]["exp_avg"]
            assert (moments[~run.handle.masks[name]] == 0).all()
