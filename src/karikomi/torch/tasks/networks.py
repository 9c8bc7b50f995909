"""The networks of the built-in tasks, each a plain `nn.Sequential` with named layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

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


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "digits-mlp": digits_mlp,
    "lenet300": lenet300,
    "lenet5": lenet5,
}


def _mlp(*widths: int) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for place, (before, after) in enumerate(zip(widths, widths[1:], strict=False), start=1):
        layers[f"fc{place}"] = nn.Linear(before, after)
        if place < len(widths) - 1:
            layers[f"relu{place}"] = nn.ReLU()
    return nn.Sequential(layers)
