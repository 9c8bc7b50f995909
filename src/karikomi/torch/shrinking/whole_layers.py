"""Remove whole residual branches: those of which the outputs depend least, measured."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import Dim, ShapesCollection

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune.account import error_ratio
from karikomi.select import select
from karikomi.shrink.account import ShrinkReport
from karikomi.shrink.choice import Choice
from karikomi.shrink.cuts import Cuts
from karikomi.shrink.unit_groups import staying
from karikomi.torch.exporting.exported import exported
from karikomi.torch.exporting.proof import TOLERANCE, apart, samples_of
from karikomi.torch.exporting.residual_branches import (
    Branch,
    Mean,
    Without,
    branches_of,
    without,
)
from karikomi.torch.exporting.rewriting import Kept
from karikomi.torch.internals import flattened
from karikomi.torch.labelling.label_run import LabelRun
from karikomi.torch.modules.deep_copies import copied, undisturbed
from karikomi.torch.modules.kept_units import recall, remember_
from karikomi.torch.modules.prunable import NORMS, layouts
from karikomi.torch.shrinking.costs import in_turn, macs_of, parameters_of
from karikomi.torch.shrinking.graph_form import graph_form
from karikomi.torch.shrinking.stand_ins import without_their_layers
from karikomi.torch.tracing.batches import MISSING, Batch, batches_of, leaves

WHERE = "torch.shrink: layers"
Constants = dict[str, torch.Tensor]


@torch.no_grad()
def without_layers(
    module: nn.Module,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    choice: Choice,
    dynamic_shapes: Any = None,
) -> tuple[nn.Module, ShrinkReport]:
    """Return a copy of a module in which a share of its residual branches stays, and the report.

    A branch that goes is replaced by the mean of what it adds, a number for each unit of the stream. Which ones go
    is measured on the data, or without it on the example: again and again the one without which the loss (or, without
    one, the distance of the outputs to the original's) is lowest.
    """
    original = copied(module).eval()
    traced = Traced(original, dynamic_shapes)
    graph, every = traced.of(inputs, options)
    branches = _selected(every, module, choice)
    data = [Batch(inputs, options)]
    if choice.data is not None:
        data = list(batches_of(choice.data, module, where=WHERE))
    search = Search(traced, branches, data, choice.loss)
    stay = staying(len(branches), choice.target.value, 1, choice.least)
    gone = search.gone(len(branches) - stay)
    small = without(graph, gone, search.constants)
    flat = tuple(flattened((inputs, options))[0])
    ends = {branch.end: search.constants[branch.end] for branch in gone}
    worst = max(_difference(graph, small, ends, sample) for sample in samples_of(graph, flat))
    form, removed = without_their_layers(module, graph, small, gone, ends, inputs, options)
    if form is None:
        opened = _opened(traced, every, gone, ends, small, inputs, options)
        form = graph_form(opened, training=module.training)
    cuts = Cuts(axes={}, removed=removed, form="module" if removed or not gone else "graph")
    earlier = recall(module)
    remember_(form, cuts if earlier is None else earlier.then(cuts))
    return form, _report(
        original, form, graph, small, branches, gone, search, worst, (inputs, options)
    )


def _selected(branches: Sequence[Branch], module: nn.Module, choice: Choice) -> list[Branch]:
    """Return the branches all of whose matrices are selected; raises `Unsupported` if there is none."""
    named = dict(module.named_parameters(remove_duplicate=False))
    picked = set(select(list(named), only=choice.only, exclude=choice.exclude, where=choice.where))
    found = [
        branch
        for branch in branches
        if all(n in picked for n in branch.weights if n in named and named[n].dim() > 1)
    ]
    if not found:
        raise Unsupported(
            "no layers can go whole",
            where=WHERE,
            got=", ".join(branch.weights[0] for branch in branches[:3])
            or "no branch that is added to what goes past it",
            allowed="residual branches, of layers that only= and exclude= leave",
            hint="width= or heads= removes units",
        )
    return found


@dataclass(slots=True)
class Traced:
    """The graphs of a module, one for each set of shapes of its inputs, with the same branches."""

    module: nn.Module
    dynamic_shapes: Any = None
    _known: dict[Any, tuple[fx.GraphModule, list[Branch]]] = field(default_factory=dict)

    def of(
        self, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[fx.GraphModule, list[Branch]]:
        """Return the graph for such inputs, and its branches."""
        signature = tuple(
            getattr(value, "shape", None) for value in flattened((inputs, options))[0]
        )
        key = None if self.dynamic_shapes is not None else signature
        if key not in self._known:
            graph = exported(self.module, inputs, options, self.dynamic_shapes)
            found = graph, branches_of(graph, LabelRun(graph).run())
            first = next(iter(self._known.values()), found)
            if first[1] != found[1]:
                raise InvalidArgument(
                    "batches of different shapes take different ways through the network",
                    where=WHERE,
                    allowed="batches of one shape",
                )
            self._known[key] = found
        return self._known[key]


class Search:
    """The search for the branches that matter least.

    `measure`: what is measured. `lost`: end -> the loss, or the relative distance of the outputs, without that branch
    and those that went before.
    """

    def __init__(
        self,
        traced: Traced,
        branches: Sequence[Branch],
        batches: Sequence[Batch],
        loss: Callable[..., Any] | None,
    ) -> None:
        self.branches = branches
        self.lost: dict[str, float] = {}
        self._traced, self._batches = traced, batches
        labelled = all(batch.targets is not MISSING for batch in batches)
        self._loss = loss if labelled else None
        self.measure = "the relative distance of the outputs" if self._loss is None else "the loss"
        self._dense = [self._run(batch, {}) for batch in batches]
        self.constants = self._means()

    def gone(self, count: int) -> list[Branch]:
        """Return `count` branches that go, or more where they are parts of one another.

        A branch is measured again when others have gone, unless another one was better even before that.
        """
        gone: list[Branch] = []
        waiting = [(self._without([b]), place, 0) for place, b in enumerate(self.branches)]
        self.lost = {self.branches[place].end: lost for lost, place, _ in waiting}
        heapq.heapify(waiting)
        while waiting and len(gone) < count:
            lost, place, seen = heapq.heappop(waiting)
            branch = self.branches[place]
            if any(set(branch.nodes) <= set(other.nodes) for other in gone):
                gone.append(branch)
            elif seen < len(gone):
                self.lost[branch.end] = self._without([*gone, branch])
                heapq.heappush(waiting, (self.lost[branch.end], place, len(gone)))
            else:
                gone.append(branch)
        ends = {branch.end for branch in gone}
        return [branch for branch in self.branches if branch.end in ends]

    def _without(self, branches: Sequence[Branch]) -> float:
        """Return how far the outputs are without some branches; infinity for what is no number."""
        ends = {branch.end: self.constants[branch.end] for branch in branches}
        lost = energy = 0.0
        for batch, dense in zip(self._batches, self._dense, strict=True):
            got = self._run(batch, ends)
            if self._loss is not None:
                lost += float(self._loss(got, batch.targets)) * batch.examples
                energy += batch.examples
                continue
            for expected, found in zip(leaves(dense), leaves(got), strict=True):
                lost += float((expected.double() - found.double()).square().sum())
                energy += float(expected.double().square().sum())
        found = error_ratio(lost, energy)
        return found if math.isfinite(found) else math.inf

    def _run(self, batch: Batch, ends: Constants) -> Any:
        graph, branches = self._traced.of(batch.positional, dict(batch.named))
        own = [branch for branch in branches if branch.end in ends]
        return Without(graph, own, ends).of(batch.positional, dict(batch.named))

    def _means(self) -> Constants:
        """Return end -> the mean of what each branch adds."""
        means = {branch.end: Mean(branch) for branch in self.branches}
        graph, _ = self._traced.of(self._batches[0].positional, dict(self._batches[0].named))
        for batch in self._batches:
            graph, _ = self._traced.of(batch.positional, dict(batch.named))
            Without(graph, [], {}, watched=means).of(batch.positional, dict(batch.named))
        dtypes = {n.name: n.meta["val"].dtype for n in graph.graph.nodes if n.name in means}
        return {end: mean.constant().to(dtypes[end]) for end, mean in means.items()}


def _difference(
    graph: fx.GraphModule, small: fx.GraphModule, ends: Constants, sample: tuple[Any, ...]
) -> float:
    """Return how far the smaller graph is from the original in which the branches are constants."""
    with undisturbed(graph, small):
        expected = leaves(Without(graph, [], ends).run(*sample))
        got = leaves(fx.Interpreter(small).run(*sample))
    worst = max(map(apart, expected, got), default=0.0)
    if not worst <= TOLERANCE:
        raise Unsupported(
            "the network without the branches would differ from the original in which they are constants",
            where=WHERE,
            got=f"a relative difference of {worst:.3g}",
            allowed=f"{TOLERANCE:.3g}",
        )
    return worst


def _opened(
    traced: Traced,
    branches: Sequence[Branch],
    gone: Sequence[Branch],
    ends: Constants,
    small: fx.GraphModule,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
) -> fx.GraphModule:
    """Return the smaller graph for batches of any size, where the forward allows that."""
    if traced.dynamic_shapes is not None:
        return small
    shapes = ShapesCollection()
    for value in flattened((inputs, options))[0]:
        if isinstance(value, torch.Tensor) and value.dim():
            shapes[value] = {0: Dim.AUTO}
    try:
        named = shapes.dynamic_shapes(traced.module, inputs, options)
        graph = exported(traced.module, inputs, options, named)
    except Unsupported:
        return small
    if branches_of(graph, LabelRun(graph).run()) != list(branches):
        return small
    other = without(graph, gone, ends)
    with undisturbed(other, small):
        pairs = zip(
            leaves(small(*inputs, **options)), leaves(other(*inputs, **options)), strict=True
        )
        worst = max((apart(closed, open_) for closed, open_ in pairs), default=0.0)
    return other if worst <= TOLERANCE else small


def _widths(module: nn.Module) -> dict[str, int]:
    """Return layer -> number of units."""
    found = {}
    axes = layouts(module)
    for path, layer in module.named_modules():
        for leaf, weight in layer.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if name in axes and not isinstance(layer, NORMS):
                found[name.removesuffix(".weight")] = weight.shape[axes[name].units]
    return found


def _report(
    original: nn.Module,
    form: nn.Module,
    graph: fx.GraphModule,
    small: fx.GraphModule,
    branches: Sequence[Branch],
    gone: Sequence[Branch],
    search: Search,
    worst: float,
    example: tuple[tuple[Any, ...], dict[str, Any]],
) -> ShrinkReport:
    before = _widths(original)
    away = {name for branch in gone for name in branch.weights}
    after = {
        layer: 0 if layer in away or f"{layer}.weight" in away else width
        for layer, width in before.items()
    }
    ms_before, ms_after = in_turn(original, form, *example)
    found = LabelRun(graph).run()
    every = Kept(np.ones(len(found.classes.roots), bool), found.values)
    return ShrinkReport(
        widths_before=before,
        widths_after=after,
        parameters_before=parameters_of(original),
        parameters_after=parameters_of(form),
        left_alone={
            b.weights[0].removesuffix(".weight"): f"without the branch that is added by {b.site}, "
            f"{search.measure} is {search.lost[b.end]:.3g}"
            for b in branches
            if b not in gone
        },
        max_difference=worst,
        macs_before=macs_of(graph, every),
        macs_after=macs_of(small, every),
        ms_before=ms_before,
        ms_after=ms_after,
        form="graph" if isinstance(form, fx.GraphModule) else "module",
    )
