"""A recorded series of gradient norms, on which rules are compared with their published definitions.

It was recorded once, from a tanh RNN that learns to add two marked numbers with a learning rate at
the edge of what it bears, so that it has calm stretches, drifts and spikes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

FILE = Path(__file__).parent / "norms.json"
STEPS = 560


def load() -> np.ndarray:
    """Return the norms, shape (steps, tensors)."""
    return np.array(json.loads(FILE.read_text(encoding="utf-8"))["norms"])


def joint() -> np.ndarray:
    """Return the global norm of every step."""
    return np.sqrt(np.sum(np.square(load()), axis=1))


def record(seed: int = 5) -> dict[str, list]:
    """Return the series anew; on another machine it drifts apart from `FILE`, the training being chaotic."""
    torch.manual_seed(seed)
    body, head = nn.RNN(2, 24, bias=False, batch_first=True), nn.Linear(24, 1)
    body.get_parameter("weight_hh_l0").data.mul_(
        2.0
    )  # beyond the edge, where gradients explode now and then
    parameters = [*body.named_parameters(), *head.named_parameters()]
    optimizer = torch.optim.SGD([p for _, p in parameters], lr=0.06, momentum=0.8)
    rows = []
    for _ in range(STEPS):
        values, marks = torch.rand(20, 30), torch.zeros(20, 30)
        marks.scatter_(1, torch.rand(20, 30).argsort(1)[:, :2], 1.0)
        _, last = body(torch.stack([values, marks], dim=2))
        loss = (head(last[0])[:, 0] - (values * marks).sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        found = [float(p.grad.norm()) for _, p in parameters if p.grad is not None]
        rows.append([float(f"{norm:.5g}") for norm in found])
        nn.utils.clip_grad_norm_([p for _, p in parameters], 20.0)
        optimizer.step()
    return {"tensors": [name for name, _ in parameters], "norms": rows}


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(), separators=(",", ":")) + "\n", encoding="utf-8")
