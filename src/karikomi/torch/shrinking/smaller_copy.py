"""`shrink`: a smaller copy of a module, with units really removed, proven and reported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

import karikomi.torch.shrinking.operators  # noqa: F401  (registers the rules)
from karikomi.errors import InvalidArgument, Unsupported, check_known
from karikomi.prune import as_score
from karikomi.prune.scores.score import Score
from karikomi.select import select
from karikomi.shrink.account import ShrinkReport
from karikomi.shrink.groups import ALLOCATIONS, Group, groups_of, kept_of, to_budget
from karikomi.shrink.labels import Block
from karikomi.torch.modules.codes import holds_codes
from karikomi.torch.modules.prunable import EMBEDDINGS, layouts
from karikomi.torch.shrinking.costs import macs_of, milliseconds, parameters_of
from karikomi.torch.shrinking.exported import exported
from karikomi.torch.shrinking.label_run import OUTPUT, LabelRun, Propagated
from karikomi.torch.shrinking.module_form import copied, in_module_form
from karikomi.torch.shrinking.planes import Labelled
from karikomi.torch.shrinking.proof import difference, is_blind, random_like, randomized
from karikomi.torch.shrinking.rewriting import Kept, Rewritten, rewritten
from karikomi.torch.shrinking.unit_scores import unit_scores
from karikomi.torch.tracing.batches import leaves

WHERE = "torch.shrink"
Target = tuple[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How units are chosen: the target, the score, and the limits."""

    target: Target
    score: Score
    allocation: str
    multiple: int
    least: int
    whole: bool
    data: Iterable[Any] | None
    loss: Any
    only: Any
    exclude: Any


class Shrinking:
    """One shrink of a module on example inputs: the graph, its labels, what is chosen, and the proof."""

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        options: dict[str, Any],
        choice: Choice,
        dynamic_shapes: Any = None,
    ) -> None:
        self.module = module
        self.inputs = inputs
        self.options = options
        self.choice = choice
        self.graph = exported(module, inputs, options, dynamic_shapes)
        self.found: Propagated = LabelRun(self.graph, whole=choice.whole).run()
        self.flat = _flat_inputs(self.graph, inputs, options)
        self.costs: list[tuple[float, float]] = []

    def chosen(self) -> np.ndarray:
        """Return a boolean per label: whether it stays."""
        groups = self._groups()
        choice = self.choice
        scores = unit_scores(self.module, groups, choice.score, data=choice.data, loss=choice.loss)
        allocate = ALLOCATIONS[choice.allocation]

        def kept(share: float) -> np.ndarray:
            gone = allocate(groups, scores, share, choice.multiple, choice.least)
            return kept_of(self.found.classes, gone)

        unit, value = choice.target
        if unit == "width":
            return kept(value)
        cost = self._cost(unit, kept)
        budget = value * cost(1.0) if value <= 1 and not isinstance(value, int) and unit != "ms" else value
        share = to_budget(cost, budget, unit=unit, steps=7 if unit == "ms" else 24)
        return kept(share)

    def _groups(self) -> list[Group]:
        groups = groups_of(self.found.classes)
        names = dict.fromkeys(name for name, _ in self.module.named_parameters())
        picked = set(
            select(list(names), only=self.choice.only, exclude=self.choice.exclude, where=WHERE)
        )
        free = [
            group
            for group in groups
            if len(group) > 1
            and all(block.owner in picked or block.owner not in names or block.axis for block, _ in group.members)
        ]
        if not free:
            raise Unsupported(
                "no unit can go",
                where=WHERE,
                got="; ".join(f"{name}: {why}" for name, why in list(self.frozen().items())[:3]) or "no layer",
                allowed="units that are no outputs, of layers that only= and exclude= leave",
            )
        return free

    def _cost(self, unit: str, kept: Callable[[float], np.ndarray]) -> Callable[[float], float]:
        if unit == "macs":
            return lambda share: float(macs_of(self.graph, Kept(self.found.values, kept(share))))
        if unit in ("parameters", "bytes"):
            return lambda share: self._stored(kept(share), sizes=unit == "bytes")

        def measured(share: float) -> float:
            small = rewritten(self.graph, self.found, kept(share)).graph
            self.costs.append((share, milliseconds(small, self.inputs, self.options)))
            return self.costs[-1][1]

        return measured

    def _stored(self, kept: np.ndarray, *, sizes: bool) -> float:
        """Return the parameters that stay, or their bytes."""
        stays = Kept(self.found.values, kept)
        total, seen = 0, set()
        for node in self.graph.graph.nodes:
            if node.op != "get_attr":
                continue
            tensor = _stored(self.graph, str(node.target))
            if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                count = int(np.prod(stays.sizes(stays.of(node)), dtype=np.int64))
                total += count * (tensor.element_size() if sizes else 1)
        return float(total)

    def proven(self, kept: np.ndarray) -> tuple[Rewritten, float]:
        """Return the smaller graph and the largest difference to the original in which what went is zero."""
        done = rewritten(self.graph, self.found, kept)
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for inputs in (self.flat, tuple(random_like(value, generator) for value in self.flat)):
            worst = max(worst, difference(self.graph, done.graph, self.found, kept, inputs))
        if is_blind(self.graph, self.flat):
            other = randomized(self.graph)
            again = rewritten_like(other, self.graph, self.found, kept)
            found, graph = again
            worst = max(worst, difference(other, graph, found, kept, self.flat))
        return done, worst

    def frozen(self) -> dict[str, str]:
        """Return parameter name -> why none of its units can go."""
        classes = self.found.classes
        found = {}
        for block in self._layers():
            reasons = [classes.reasons.get(root) for root in classes.roots[block.labels].tolist()]
            if all(reasons):
                found[block.owner] = str(reasons[0])
        return found

    def widths(self, kept: np.ndarray | None = None) -> dict[str, int]:
        """Return layer -> number of units, of those layers whose axis of units is known."""
        return {
            block.owner.removesuffix(".weight"): (
                block.size if kept is None else int(kept[block.labels].sum())
            )
            for block in self._layers()
        }

    def _layers(self) -> list[Block]:
        """Return the axes of units of the layers whose axis of units is known; of an embedding the other one."""
        axes = layouts(self.module)
        tables = {
            f"{path}.weight" if path else "weight"
            for path, layer in self.module.named_modules()
            if isinstance(layer, EMBEDDINGS)
        }
        return [
            block
            for block in self.found.classes.blocks
            if block.owner in axes
            and block.axis == (1 if block.owner in tables else axes[block.owner].units)
        ]


def rewritten_like(
    other: fx.GraphModule, graph: fx.GraphModule, found: Propagated, kept: np.ndarray
) -> tuple[Propagated, fx.GraphModule]:
    """Return the labels of a graph on a copy of it with other tensors, and that copy made smaller."""
    twin = dict(zip(graph.graph.nodes, other.graph.nodes, strict=True))
    values = {twin[node]: value for node, value in found.values.items()}
    statistics = tuple(twin[node] for node in found.statistics)
    moved = Propagated(values, found.classes, statistics, found.unknown)
    return moved, rewritten(other, moved, kept).graph


def _stored(module: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _flat_inputs(
    graph: fx.GraphModule, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the values of the placeholders of a graph."""
    given, _ = torch.utils._pytree.tree_flatten((inputs, options))
    return tuple(given)


@torch.no_grad()
def shrink_to(
    module: nn.Module,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    choice: Choice,
    dynamic_shapes: Any = None,
) -> tuple[nn.Module, ShrinkReport]:
    """Return a smaller copy of a module in which units were removed up to a target, and the report."""
    original = copied(module).eval()
    run = Shrinking(original, inputs, options, choice, dynamic_shapes)
    with torch.enable_grad():
        kept = run.chosen()
    done, worst = run.proven(kept)
    small = in_module_form(module, done, inputs, options)
    form = done.graph if small is None else small
    nothing = np.ones(len(kept), bool)
    before, after = (macs_of(run.graph, Kept(run.found.values, k)) for k in (nothing, kept))
    report = ShrinkReport(
        widths_before=run.widths(),
        widths_after=run.widths(kept),
        parameters_before=parameters_of(original),
        parameters_after=parameters_of(form),
        left_alone=run.frozen(),
        max_difference=worst,
        macs_before=before,
        macs_after=after,
        frozen={**run.frozen(), **run.found.unknown},
        together={g.name: list(g.sites) for g in groups_of(run.found.classes) if g.sites},
        statistics=[node.name for node in run.found.statistics],
        literals=[] if small is not None else [f"{c.site}: {c.before} -> {c.after}" for c in done.changed],
        form="module" if small is not None else "graph",
        latencies=run.costs,
    )
    return form, report
