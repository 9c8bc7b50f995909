"""A trained ResNet-56 at 2.1 times fewer MACs, paired with Torch-Pruning: ``python benchmarks/shrink_resnet56.py``.

CIFAR-10, weights as published (93.39 %), then one epoch on 10,000 training images, last weights, several seeds. The
shortcuts of both are fixed 1 x 1 convolutions, which Torch-Pruning can follow. Its importance is the best of several
by the accuracy after training with the first seed (on the test images: in its favour). Both see the same 1,000 training
images before training: ours for the compensation, Torch-Pruning for gradients.

    python benchmarks/shrink_resnet56.py [--quick] [--seeds 3] [--layers 0.7]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from prune_resnet20 import DATA, Block, Pair, accuracy, batches, images
from safetensors.numpy import load_file
from shrink_resnet20 import CALIBRATION, RESIDUAL, train_, training_images
from torch import nn

import karikomi as kk
from karikomi.torch.shrinking.costs import milliseconds

BUDGET = 1 / 2.1
MEASURED = 200
"""Of the calibration images, on which the loss without each block is measured."""
IMPORTANCES = ("GroupMagnitudeImportance", "BNScaleImportance", "GroupTaylorImportance")


class ConvolutionBlock(Block):
    """The block with its shortcut as a fixed convolution."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        self.shortcut: nn.Module = nn.Identity()
        if self.padding:
            self.shortcut = nn.Conv2d(inputs, width, 1, 2, bias=False).requires_grad_(False)
            self.shortcut.weight.zero_()
            self.shortcut.weight[self.padding + np.arange(inputs), np.arange(inputs)] = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations after the addition."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet56(nn.Module):
    """The network of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for number, (inputs, width) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            rest = [ConvolutionBlock(width, width) for _ in range(8)]
            setattr(self, f"layer{number}", nn.Sequential(ConvolutionBlock(inputs, width), *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (n, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def trained() -> nn.Module:
    """Return the network with the published weights, in eval mode."""
    module = ResNet56()
    arrays = load_file(DATA / "resnet56_cifar10.safetensors")
    module.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=False)
    return module.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def ours(data: Pair, layers: float = 1.0) -> nn.Module:
    """Return the network that we make: first without a share of the blocks, then with fewer channels."""
    module, example = trained(), data[0][:1]
    budget: float = BUDGET
    if layers < 1.0:
        some = batches((data[0][:MEASURED], data[1][:MEASURED]), 100)
        module, report = kk.torch.shrink(
            module, example, layers=layers, data=some, loss=F.cross_entropy
        )
        budget = int(BUDGET * report.macs_before)
    small, _ = kk.torch.shrink(
        module,
        example,
        macs=budget,
        data=batches(data, 100),
        loss=F.cross_entropy,
        exclude=RESIDUAL,
    )
    return small


def theirs(data: Pair, importance: str) -> nn.Module:
    """Return the largest network that Torch-Pruning makes within the budget."""
    import torch_pruning as tp

    example = data[0][:1]
    whole = tp.utils.count_ops_and_params(trained(), example)[0]
    low, high, best = 0.0, 1.0, None
    for _ in range(7):
        ratio = (low + high) / 2
        module = trained()
        pruner: Any = tp.pruner.MetaPruner(
            module,
            example,
            importance=getattr(tp.importance, importance)(),
            pruning_ratio=ratio,
            ignored_layers=[module.linear],
        )
        if "Taylor" in importance:
            # It reads a gradient of every layer, the fixed shortcuts included.
            module.requires_grad_(True)
            for x, y in batches(data, 100):
                F.cross_entropy(module(x), y).backward()
        pruner.step()
        module.zero_grad()
        for name, weight in module.named_parameters():
            weight.requires_grad_("shortcut" not in name)
        if tp.utils.count_ops_and_params(module, example)[0] <= BUDGET * whole:
            high, best = ratio, module
        else:
            low = ratio
    assert best is not None
    return best.eval()


def after_training(module: nn.Module, data: Any, seed: int, test: Pair, title: str) -> float:
    """Return the accuracy of the last weights of one epoch."""
    own = copy.deepcopy(module)
    train_(own, data, epochs=1, rate=0.02, seed=seed, title=title)
    return accuracy(own, test)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 test images, short training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=float, default=1.0, help="the share of blocks that stays")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    test = images("cifar10_test.npz", slice(0, 1_000 if arguments.quick else 10_000))
    data = images("cifar10_train.npz", CALIBRATION)
    training = training_images(1_280 if arguments.quick else 10_000)
    dense, small = trained(), ours(data, arguments.layers)
    print(f"dense: {100 * accuracy(dense, test):.2f} %", flush=True)
    made = {name: theirs(data, name) for name in IMPORTANCES}
    first = {n: after_training(m, training, 0, test, n) for n, m in made.items()}
    print({name: round(100 * share, 2) for name, share in first.items()}, flush=True)
    best = max(first, key=first.__getitem__)
    networks = {"karikomi": small, f"Torch-Pruning, {best}": made[best]}
    sizes = (1, 64)
    times_of_dense = [milliseconds(dense, (data[0][:size],), {}) for size in sizes]
    for name, module in networks.items():
        before = accuracy(module, test)
        found = [
            first[best]
            if module is not small and seed == 0
            else after_training(module, training, seed, test, name)
            for seed in range(arguments.seeds)
        ]
        shown = ", ".join(f"{100 * one:.2f}" for one in found)
        times = [
            f"{milliseconds(module, (data[0][:size],), {}) / dense_time:.2f} of the time for {size}"
            for size, dense_time in zip(sizes, times_of_dense, strict=True)
        ]
        print(
            f"{name}: {100 * before:.2f} before training; {shown}: mean {100 * np.mean(found):.2f} %; "
            f"{', '.join(times)} (at most {1 / 1.7:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    Path("runs").mkdir(exist_ok=True)
    main()
