"""Operations that shrinking supports: layers, and calls that keep units separate."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LAYERS: frozenset[Any] = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d})
"""Exact types, since a subclass may compute something else."""

NORMS: frozenset[Any] = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})
"""Normalise each unit by itself in evaluation mode, given running statistics."""

SHAPE_QUERIES: frozenset[Any] = frozenset({"size", "dim", "shape", "ndim", "dtype", "device"})

RESHAPES: frozenset[Any] = frozenset(
    {nn.Flatten, torch.flatten, torch.reshape, "flatten", "view", "reshape"}
)
"""Data movement that is applied to the labels."""

_ACTIVATIONS = (
    "relu relu_ relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh hardtanh hardswish "
    "hardsigmoid softplus softsign tanhshrink logsigmoid hardshrink softshrink"
).split()
_MODULES = (
    "ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Sigmoid Tanh Hardtanh Hardswish Hardsigmoid "
    "Softplus Softsign Tanhshrink LogSigmoid Hardshrink Softshrink Threshold Identity Dropout "
    "Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"
).split()
_METHODS = "relu relu_ sigmoid tanh abs neg square sqrt exp clamp add sub mul div contiguous"
_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv, operator.neg)

ELEMENTWISE: frozenset[Any] = frozenset(
    [
        *(getattr(nn, name) for name in _MODULES),
        *(getattr(F, name) for name in _ACTIVATIONS),
        *(getattr(torch, name) for name in _ACTIVATIONS + _METHODS.split() if hasattr(torch, name)),
        *_METHODS.split(),
        *_ARITHMETIC,
        F.dropout,
        F.dropout2d,
    ]
)
"""Element-wise modules, functions and methods of one tensor."""

POOLED_AXES: dict[Any, int] = {
    getattr(place, name): axes
    for axes in (1, 2, 3)
    for place, name in (
        *((F, f"{kind}_pool{axes}d") for kind in ("max", "avg", "adaptive_avg", "adaptive_max")),
        *((torch, f"{kind}_pool{axes}d") for kind in ("max", "avg", "adaptive_avg")),
        *((nn, f"{kind}Pool{axes}d") for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax")),
    )
    if hasattr(place, name)
}
"""Pooling -> number of last axes that it pools over."""
