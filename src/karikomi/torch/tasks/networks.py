"""The networks of the built-in tasks, with named layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def digits_mlp() -> nn.Module:
    """Return the MLP 64-256-128-10, 50,826 parameters."""
    return _mlp(64, 256, 128, 10)


def lenet300() -> nn.Module:
    """Return LeNet-300-100: 784-300-100-10, 266,610 parameters (LeCun et al. 1998)."""
    return _mlp(784, 300, 100, 10)


def lenet5() -> nn.Module:
    """Return the Caffe variant of LeNet-5, 431,080 parameters, for inputs of shape (n, 1, 28, 28)."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu1=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights, which adds channels of zeros where it halves the size."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = width // before
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.missing = (width - before) // 2

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the activations after the sum."""
        found = F.relu(self.bn1(self.conv1(inputs)))
        found = self.bn2(self.conv2(found))
        if self.missing:
            inputs = F.pad(inputs[:, :, ::2, ::2], (0, 0, 0, 0, self.missing, self.missing))
        return F.relu(found + inputs)


class CifarResNet(nn.Module):
    """A ResNet for images (n, 3, 32, 32) of ten classes, of 6 `blocks` + 2 layers (He et al. 2016, option A)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = _blocks(16, 16, blocks)
        self.layer2 = _blocks(16, 32, blocks)
        self.layer3 = _blocks(32, 64, blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        found = F.relu(self.bn1(self.conv1(images)))
        found = self.layer3(self.layer2(self.layer1(found)))
        return self.linear(found.mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "digits-mlp": digits_mlp,
    "lenet300": lenet300,
    "lenet5": lenet5,
    "cifar-resnet20": partial(CifarResNet, 3),
    "cifar-resnet56": partial(CifarResNet, 9),
}


def _blocks(before: int, width: int, count: int) -> nn.Sequential:
    others = [ResidualBlock(width, width) for _ in range(count - 1)]
    return nn.Sequential(ResidualBlock(before, width), *others)


def _mlp(*widths: int) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for place, (before, after) in enumerate(zip(widths, widths[1:], strict=False), start=1):
        layers[f"fc{place}"] = nn.Linear(before, after)
        if place < len(widths) - 1:
            layers[f"relu{place}"] = nn.ReLU()
    return nn.Sequential(layers)
