"""How long `kk.torch.shrink` takes to build its groups and to choose, and in what memory.

    python benchmarks/shrink_speed.py [--models resnet50 swin_t ...]

Per network, in a process of its own with one thread: seconds to export (torch's own), to propagate the labels,
and to choose half of the units by magnitude; nodes of the graph; peak memory. Then the exponent e of seconds =
c * nodes^e, fitted over a family of residual networks of 8 to 256 blocks: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
from shrink_coverage import torchvision_example
from torch import nn

from karikomi.prune import as_score
from karikomi.prune.target import Target
from karikomi.shrink.choice import Choice
from karikomi.torch.labelling.label_run import LabelRun
from karikomi.torch.shrinking.smaller_copy import Shrinking

MODELS = ("resnet50", "swin_t", "maxvit_t", "mvit_v2_s")
BLOCKS = (8, 16, 32, 64, 128, 256)
REPEATED = 5


class Residual(nn.Module):
    """Blocks of two convolutions with norms, each beside a shortcut."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16),
            )
            for _ in range(blocks)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        images = self.first(images)
        for block in self.blocks:
            images = torch.relu(images + block(images))
        return self.last(images.mean((2, 3)))


def measured(name: str) -> dict[str, Any]:
    """Return seconds, nodes and memory of a network."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if name.isdigit():
        model, inputs, options = Residual(int(name)), (torch.randn(1, 3, 16, 16),), {}
    else:
        model, inputs, options = torchvision_example(name)
    choice = Choice(where="shrink", target=Target("width", 0.5), score=as_score("magnitude"))
    start = time.perf_counter()
    run = Shrinking(model.eval(), inputs, options, choice)
    built = time.perf_counter()
    run.chosen()
    chosen = time.perf_counter()
    again = []
    for _ in range(REPEATED):
        begun = time.perf_counter()
        LabelRun(run.graph).run()
        again.append(time.perf_counter() - begun)
    return {
        "export": run.seconds["export"],
        "labels": run.seconds["labels"],
        "choice": chosen - built,
        "again": statistics.median(again),
        "total": chosen - start,
        "nodes": len(run.graph.graph.nodes),
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def in_a_process(name: str) -> dict[str, Any]:
    """Run `measured` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--one", name],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.one)))
        return
    print(
        f"{'network':14} {'nodes':>6} {'export':>7} {'labels':>7} {'choice':>7} {'total s':>8} {'GB':>5}"
    )
    found = {}
    for name in [*given.models, *map(str, BLOCKS)]:
        row = found[name] = in_a_process(name)
        print(
            f"{name:14} {row['nodes']:6d} {row['export']:7.2f} {row['labels']:7.2f} {row['choice']:7.2f}"
            f" {row['total']:8.2f} {row['gigabytes']:5.2f}",
            flush=True,
        )
    rows = [found[str(blocks)] for blocks in BLOCKS]
    seconds = np.log([row["again"] for row in rows])
    exponent, _ = np.polyfit(np.log([row["nodes"] for row in rows]), seconds, 1)
    print(f"labels, median of {REPEATED}: seconds grow as nodes^{exponent:.2f}")


if __name__ == "__main__":
    main()
