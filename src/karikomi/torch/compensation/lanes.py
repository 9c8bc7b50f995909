"""Calibration batches for a compensation: graphs that take their shapes, some held out, as many as fit in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from karikomi.errors import InvalidArgument
from karikomi.shrink.refit_outcome import MEMORY, held_examples, held_out
from karikomi.torch.compensation.side_by_side import Lane, Pair, inputs_of, last_reads
from karikomi.torch.exporting.exported import exported
from karikomi.torch.exporting.rewriting import Kept, Rewritten, owner_of, rewritten
from karikomi.torch.labelling.label_run import LabelRun, Propagated, shape_of
from karikomi.torch.tracing.batches import MISSING, Batch, batches_of

WHERE = "torch.shrink: data"
SHAPES = 8
"""The largest number of different shapes of batches: each is exported."""


class Pairs:
    """Pairs of graphs for batches of any shape; those of other shapes than the example are exported anew."""

    def __init__(
        self,
        module: nn.Module,
        graph: fx.GraphModule,
        found: Propagated,
        done: Rewritten,
        kept: np.ndarray,
        *,
        whole: bool,
        example: tuple[tuple[Any, ...], dict[str, Any]],
        dynamic: bool,
    ) -> None:
        self.module, self._whole, self._dynamic = module, whole, dynamic
        self._found, self._done, self._kept = found, done, kept
        self.first = Pair(graph, done.graph, Kept(kept, found.values))
        self._known = {self._signature(*example): self.first}

    def of(self, batch: Batch) -> Pair:
        """Return the pair that takes a batch."""
        named = dict(batch.named)
        signature = self._signature(batch.positional, named)
        if signature not in self._known:
            if len(self._known) > SHAPES:
                raise InvalidArgument(
                    "the batches have too many different shapes",
                    where=WHERE,
                    allowed=f"{SHAPES} shapes",
                    hint="pad the batches, drop the last one, or pass dynamic_shapes=",
                )
            self._known[signature] = self._exported(batch.positional, named)
        return self._known[signature]

    def _signature(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        shapes = (
            (place, None if self._dynamic else getattr(value, "shape", value))
            for place, value in inputs_of(inputs, options)
        )
        return tuple(shapes)

    def _exported(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Pair:
        graph = exported(self.module, inputs, options)
        found = LabelRun(graph, whole=self._whole).run()
        kept = self._transferred(found)
        small = rewritten(graph, found, kept).graph
        for name in self._done.stored:
            # One set of tensors for all shapes.
            owner, leaf = owner_of(small, name)
            setattr(owner, leaf, getattr(owner_of(self._done.graph, name)[0], leaf))
        return Pair(graph, small, Kept(kept, found.values))

    def _transferred(self, found: Propagated) -> np.ndarray:
        """Return what stays by the labels of another run, in which those of padding can have other numbers."""
        before = {(block.owner, block.axis): block.labels for block in self._found.classes.blocks}
        gone = np.zeros(len(found.classes.roots), bool)
        for block in found.classes.blocks:
            if block.owner:
                away = ~self._kept[before[block.owner, block.axis]]
                gone[found.classes.roots[block.labels[away]]] = True
        return ~gone[found.classes.roots]


def lanes_of(pairs: Pairs, data: Iterable[Any]) -> list[Lane]:
    """Return the first batches that fit in memory, of which every fifth is held out, or a part of a single one.

    Raises `InvalidArgument` for data of a single example, of which nothing can be held out.
    """
    batches: list[Batch] = []
    left = float(MEMORY)
    for batch in _divided(batches_of(data, pairs.module, where=WHERE)):
        left -= 2 * _peak(pairs.of(batch).dense)
        if left < 0 and len(batches) > 1:
            break
        batches.append(batch)
    held = held_out(len(batches))
    return [Lane(pairs.of(batch), batch, out) for batch, out in zip(batches, held, strict=True)]


def _divided(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches, a single one as two parts."""
    first = next(batches)
    second = next(batches, None)
    if second is not None:
        yield from (first, second, *batches)
        return
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in first.tensors()}
    size = min(sizes, default=0)
    held = held_examples(size)
    if len(sizes) != 1 or not held:
        raise InvalidArgument(
            "compensation holds a part of the data out, and there is one example",
            where=WHERE,
            allowed="several batches, or one of several examples",
            hint="compensate=False",
        )
    cut = size - held
    for part in (slice(cut), slice(cut, None)):
        own = first.inputs(lambda tensor, part=part: tensor[part])
        targets = first.targets
        if targets is not MISSING and isinstance(targets, torch.Tensor):
            targets = targets[part]
        yield Batch(own.positional, own.named, targets)


def _peak(graph: fx.GraphModule) -> float:
    """Return the largest number of bytes of activations that are needed at one place of a graph."""
    last = last_reads(graph.graph.nodes)
    sizes: dict[str, float] = {}
    now = peak = 0.0
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            sizes[node.name] = math.prod(shape_of(value)) * float(value.element_size())
        now += sizes.get(node.name, 0.0)
        peak = max(peak, now)
        now -= sum(sizes.get(gone, 0.0) for gone in last.get(node.name, ()))
    return peak
