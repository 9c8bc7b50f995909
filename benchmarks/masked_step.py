"""The cost of masks in a training step: ResNet-20, batches of 128, with masks at 90 % and without, in alternation.

Prints the median ratio of a masked step (``attach(prune=masks)``) to a plain step, and to a step with ``attach``
but without masks, and the size of the masks in a checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
import time

import torch
import torch.nn.functional as F
from prune_resnet20 import ResNet20
from torch import nn

import karikomi as kk


def trainer(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the paper's recipe."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> float:
    """Return the time of one training step."""
    started = time.perf_counter()
    F.cross_entropy(model(images), torch.arange(len(images)) % 10).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    plain = ResNet20().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    attached, masked = copy.deepcopy(plain), copy.deepcopy(plain)
    masks = kk.torch.prune_(masked, sparsity=0.9)
    models = {"plain": plain, "attached": attached, "masked": masked}
    optimizers = {name: trainer(model) for name, model in models.items()}
    kk.torch.attach(optimizers["attached"], attached)
    handle = kk.torch.attach(optimizers["masked"], masked, prune=masks)
    images = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(options.rounds + 3):
        for name, model in models.items():
            taken = seconds(model, optimizers[name], images)
            if number >= 3:
                times[name].append(taken)
    for name in ("plain", "attached"):
        ratio = statistics.median(a / b for a, b in zip(times["masked"], times[name], strict=True))
        print(
            f"masked step / {name + ' step':13} {ratio:.3f}  ({statistics.median(times[name]) * 1e3:.0f} ms)"
        )
    file = io.BytesIO()
    torch.save(handle.state_dict()["masks"], file)
    size = sum(mask.numel() for mask in masks.values())
    print(
        f"masks on disk: {file.tell():,} bytes for {size:,} weights ({size / 8:,.0f} bytes of bits)"
    )


if __name__ == "__main__":
    main()
