"""What a record costs a step of ResNet-20, paired in one run: ``python benchmarks/record_overhead.py``.

Two copies of the network on random images take the same steps in turn, both attached, only the second with a record:
norms of gradients, weights and updates of every tensor, rows written. Printed: medians and the median of the paired
ratios, of the process's CPU time, which other programs on the machine disturb less than the time on the clock.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from prune_resnet20 import ResNet20
from torch import nn

import karikomi as kk

AIM = 0.02


def side(
    model: nn.Module, record: kk.record.Recorder | None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network with its optimizer, attached."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), record=record)
    return model, optimizer


def seconds(
    pair: tuple[nn.Module, torch.optim.Optimizer], images: torch.Tensor, labels: torch.Tensor
) -> float:
    """Take one step and return the CPU time that it took."""
    model, optimizer = pair
    start = time.process_time()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    return time.process_time() - start


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResNet20()
    images, labels = torch.randn(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))
    with tempfile.TemporaryDirectory() as folder:
        recorder = kk.record.Recorder(Path(folder) / "record.jsonl", flush_every=10)
        sides = [side(copy.deepcopy(model), None), side(model, recorder)]
        times = [
            [seconds(own, images, labels) for own in sides] for _ in range(options.rounds + 2)
        ][2:]
        recorder.close()
    without, recorded = ([row[place] for row in times] for place in (0, 1))
    cost = statistics.median(b / a for a, b in times) - 1.0
    apart = statistics.median(recorded) - statistics.median(without)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    print(
        f"step {1e3 * statistics.median(without):.1f} ms, with a record {1e3 * statistics.median(recorded):.1f} ms"
    )
    print(f"the record costs {cost:.2%} of a step ({1e3 * apart:.2f} ms); aim {AIM:.0%}")


if __name__ == "__main__":
    main()
