"""Small networks that are pruned in tests, and what shows that one was left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)),
    )


def batches(count: int = 3, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(seed)
    return [(torch.randn(4, 3, 6, 6), torch.randint(0, 10, (4,))) for _ in range(count)]


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def linear(rows: Any, dtype: torch.dtype = torch.float32) -> nn.Linear:
    weight = torch.as_tensor(rows, dtype=dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
    layer.weight.data = weight
    return layer


def parameter(module: nn.Module, name: str = "weight") -> torch.Tensor:
    return module.get_parameter(name).detach()


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Show that the block changes no weight, buffer, mode, gradient, flag or hook of a module."""
    before = copy.deepcopy(module.state_dict())
    modes = [(one.training, len(one._forward_hooks)) for one in module.modules()]
    flags = [(one.requires_grad, one.grad) for one in module.parameters()]
    numbers = torch.get_rng_state()
    yield
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], one) for name, one in before.items())
    assert modes == [(one.training, len(one._forward_hooks)) for one in module.modules()]
    assert flags == [(one.requires_grad, one.grad) for one in module.parameters()]
    assert torch.equal(numbers, torch.get_rng_state())
