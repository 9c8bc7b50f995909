"""The cost of `attach` in a training step that ``torch.compile`` compiles as a whole.

Prints the graph breaks of one compilation and the median time of a step, with and without `attach`; steps of
all kinds alternate. ``--backend inductor`` needs a C++ compiler; ``eager`` shows what Dynamo does by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

import karikomi as kk

KINDS: dict[str, dict[str, Any] | None] = {
    "without": None,
    "clip": {"clip": kk.clip.ByGlobalNorm(1.0)},
    "clip, bound": {"clip": kk.clip.ZClip(), "bound": kk.bound.Clamp(0.1)},
    "clip, masks": {"clip": kk.clip.ZClip(), "prune": kk.prune.OneShot(0.5, step=0)},
}


def compiled_step(
    rules: dict[str, Any] | None, layers: int, backend: str
) -> Callable[[torch.Tensor], Any]:
    """Return a compiled training step of a network of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(64, 64), nn.Tanh())))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if rules is not None:
        kk.torch.attach(optimizer, model, **rules)

    def step(inputs: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return torch.compile(step, backend=backend)


def main() -> None:
    """Print breaks and times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--backend", default="eager")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the network is small, and threads would be waited for
    inputs = torch.randn(32, 64)
    steps, breaks = {}, {}
    for name, rules in KINDS.items():
        torch._dynamo.reset()
        counters.clear()
        steps[name] = compiled_step(rules, options.layers, options.backend)
        for _ in range(5):
            steps[name](inputs)
        breaks[name] = sum(counters["graph_break"].values())
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(options.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step(inputs)
            times[name].append(time.perf_counter() - started)
    for name in KINDS:
        more = statistics.median(a - b for a, b in zip(times[name], times["without"], strict=True))
        print(
            f"{name:12} {breaks[name]:2} graph breaks  {statistics.median(times[name]) * 1e3:6.2f} ms"
            f"  {more * 1e3:+.2f} ms"
        )


if __name__ == "__main__":
    main()
