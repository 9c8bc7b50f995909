"""The smaller graph for batches of any size: an export in which the first axes of the inputs are open."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ShapesCollection

from karikomi.errors import Unsupported
from karikomi.torch.exporting.exported import Inputs, exported
from karikomi.torch.exporting.proof import TOLERANCE, apart
from karikomi.torch.exporting.rewriting import Rewritten, owner_of, rewritten
from karikomi.torch.internals import flattened
from karikomi.torch.labelling.label_run import LabelRun, Propagated
from karikomi.torch.modules.deep_copies import undisturbed
from karikomi.torch.tracing.batches import leaves


@torch.no_grad()
def for_any_batch(
    module: nn.Module,
    inputs: Inputs,
    options: dict[str, Any],
    done: Rewritten,
    found: Propagated,
    kept: np.ndarray,
    *,
    whole: bool,
    exact: bool,
) -> Rewritten:
    """Return the smaller graph of `done` with first axes of any size, or `done` where the forward does not allow that.

    The open export has to have the same labels, and the same outputs on the example.
    """
    shapes = ShapesCollection()
    for value in flattened((inputs, options))[0]:
        if isinstance(value, torch.Tensor) and value.dim():
            shapes[value] = {0: Dim.AUTO}
    try:
        graph = exported(module, inputs, options, shapes.dynamic_shapes(module, inputs, options))
    except Unsupported:
        return done
    other = LabelRun(graph, whole=whole, exact=exact).run()
    alike = other.classes.blocks == found.classes.blocks
    if not alike or not np.array_equal(other.classes.roots, found.classes.roots):
        return done
    small = rewritten(graph, other, kept)
    for name in small.stored:
        owner, leaf = owner_of(small.graph, name)
        source, _ = owner_of(done.graph, name)
        setattr(owner, leaf, getattr(source, leaf))
    with undisturbed(small.graph, done.graph):
        before = leaves(done.graph(*inputs, **options))
        try:
            after = leaves(small.graph(*inputs, **options))
        except RuntimeError:
            # A width that is computed of a batch size has no smaller literal: the example's size stays.
            return done
    return small if max(map(apart, before, after), default=0.0) <= TOLERANCE else done
