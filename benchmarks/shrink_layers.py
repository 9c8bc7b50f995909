"""Whole blocks or channels out of a trained ResNet-56: ``python benchmarks/shrink_layers.py``.

CIFAR-10, weights as published, no training. A share of the blocks goes, chosen by the loss on some training images;
beside it the same multiply-accumulates are reached by fewer channels, as they are and re-fitted on the same images.
Accuracy on test images, and processor time of one image relative to the dense network, in turns on one thread.

    python benchmarks/shrink_layers.py [--layers 0.8] [--images 50] [--test 1000]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from prune_resnet20 import accuracy, batches, images
from shrink_resnet20 import RESIDUAL
from shrink_resnet56 import trained
from torch import nn

import karikomi as kk


@torch.no_grad()
def times(networks: dict[str, nn.Module], example: torch.Tensor, runs: int) -> dict[str, float]:
    """Return the median processor time of each network, all in turns."""
    found: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(runs):
        for name, module in networks.items():
            start = time.process_time()
            module(example)
            found[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=float, default=0.8, help="the share of blocks that stays")
    parser.add_argument("--images", type=int, default=50, help="training images to choose by")
    parser.add_argument("--test", type=int, default=1_000)
    parser.add_argument("--runs", type=int, default=61)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dense = trained()
    x, y = images("cifar10_train.npz", slice(given.images))
    data, test = batches((x, y), 50), images("cifar10_test.npz", slice(given.test))
    short, report = kk.torch.shrink(
        dense, x[:1], layers=given.layers, data=data, loss=F.cross_entropy
    )
    removed = [name for name, units in report.widths_after.items() if units == 0]
    share = report.macs_after / report.macs_before
    narrow, _ = kk.torch.shrink(dense, x[:1], macs=share, exclude=RESIDUAL)
    fitted, _ = kk.torch.shrink(
        dense, x[:1], macs=share, exclude=RESIDUAL, data=data, loss=F.cross_entropy
    )
    networks = {
        "dense": dense,
        f"{len(removed) // 2} of 27 blocks away": short,
        "fewer channels": narrow,
        "fewer channels, re-fitted": fitted,
    }
    spent = times(networks, x[:1], given.runs)
    print(f"{share:.2f} of the multiply-accumulates; {given.test:,} test images")
    for name, module in networks.items():
        print(f"{name:28} {accuracy(module, test):7.1%} {spent[name] / spent['dense']:6.2f}")


if __name__ == "__main__":
    main()
