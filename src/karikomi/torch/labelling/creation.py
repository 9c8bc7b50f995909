"""Operators that make a tensor of a given size: each axis gets labels, as its size can change."""

from __future__ import annotations

import torch

from karikomi.shrink.label_planes import Labelled
from karikomi.torch.labelling.constants import FILLED
from karikomi.torch.labelling.label_run import Call, LabelRun, Value, bare, rule, shape_of


@rule(*FILLED, "rand", "randn")
def creation(run: LabelRun, call: Call) -> Value:
    """Label all axes of a tensor of numbers."""
    found = call.node.meta["val"]
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        return bare(call.node)
    return run.fresh("", shape_of(found))


@rule("arange", "linspace", "scalar_tensor", "eye", "tensor", "_assert_tensor_metadata", "item")
def without_labels(run: LabelRun, call: Call) -> Value:
    """Return no labels: the numbers depend on the size."""
    found = bare(call.node)
    return found if isinstance(found, list) else Labelled(found.shape)
