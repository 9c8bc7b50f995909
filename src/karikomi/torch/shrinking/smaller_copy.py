"""`shrink`: a smaller copy of a module, with units really removed, proven and reported."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

import karikomi.torch.labelling  # noqa: F401  (registers the rules)
from karikomi.errors import InvalidArgument, KarikomiError, Unsupported, check_known
from karikomi.prune.scores.score import Score
from karikomi.shrink.account import SINGLE, Refit, ShrinkReport
from karikomi.shrink.choice import Choice, choice_of
from karikomi.shrink.cuts import Cuts
from karikomi.shrink.labels import Block
from karikomi.shrink.unit_groups import Group, groups_of
from karikomi.torch.compensation.in_place import compensate_
from karikomi.torch.compensation.lanes import Pairs, lanes_of
from karikomi.torch.distributed.dtensors import is_sharded
from karikomi.torch.exporting.equivalence import equal
from karikomi.torch.exporting.exported import exported
from karikomi.torch.exporting.proof import difference, is_blind, randomized, samples_of
from karikomi.torch.exporting.rewriting import Kept, Rewritten, rewritten
from karikomi.torch.exporting.summed_entries import changed_sums
from karikomi.torch.internals import flattened, unflattened
from karikomi.torch.labelling.label_run import LabelRun, Propagated
from karikomi.torch.modules.codes import holds_codes
from karikomi.torch.modules.deep_copies import copied
from karikomi.torch.modules.kept_units import Move, recall, remember_, sizes_in_attributes
from karikomi.torch.modules.parameters import check_values, every_name, other_names, unwrapped
from karikomi.torch.modules.prunable import NORMS, PRUNED, TRANSPOSED, layouts
from karikomi.torch.modules.resizing import HOOKED
from karikomi.torch.recovery.following import follow_
from karikomi.torch.shrinking.any_batch import for_any_batch
from karikomi.torch.shrinking.costs import in_turn, macs_of, milliseconds, parameters_of
from karikomi.torch.shrinking.dead_units import DeadUnits
from karikomi.torch.shrinking.fixed_numbers import counted
from karikomi.torch.shrinking.graph_form import graph_form
from karikomi.torch.shrinking.module_form import cuts_of, in_module_form
from karikomi.torch.shrinking.unit_scores import made_axes, tensors_of, unit_scores
from karikomi.torch.shrinking.whole_layers import without_layers

WHERE = "torch.shrink"
COMPUTED = (
    *HOOKED,
    "parametrizations.weight.original",
    "parametrizations.weight.original1",
)
"""Of what a weight can be computed, with its axes."""


class Shrinking:
    """One shrink of a module on example inputs: the graph, its labels, what is chosen, and the proof."""

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        options: dict[str, Any],
        choice: Choice | None,
        dynamic_shapes: Any = None,
    ) -> None:
        self.module = module
        self.inputs = inputs
        self.options = options
        self.choice = choice
        began = time.perf_counter()
        self.dynamic_shapes = dynamic_shapes
        self.dynamic = dynamic_shapes is not None
        self.made = made_axes(module)
        self.graph = exported(module, inputs, options, dynamic_shapes)
        self.seconds = {"export": time.perf_counter() - began}
        began = time.perf_counter()
        whole, exact = choice is not None and choice.whole, choice is None
        self.found: Propagated = LabelRun(self.graph, whole=whole, exact=exact).run()
        self.seconds["labels"] = time.perf_counter() - began
        flat, self.tree = flattened((inputs, options))
        self.flat = tuple(flat)
        self.costs: list[tuple[float, float]] = []

    @cached_property
    def groups(self) -> list[Group]:
        """All groups of units that can go."""
        return groups_of(self.found.classes, rows=self._makes)

    def _makes(self, block: Block) -> bool:
        return self.made.get(block.owner) == block.axis

    def chosen(self) -> np.ndarray:
        """Return a boolean per label: whether it stays."""
        choice = self.choice
        assert choice is not None  # noqa: S101
        names = dict.fromkeys(
            name for name, _ in self.module.named_parameters(remove_duplicate=False)
        )
        groups = choice.free(self.groups, names, self._makes, self.frozen)
        scores = unit_scores(self.module, groups, choice.score, data=choice.data, loss=choice.loss)
        return choice.kept(self.found.classes, groups, scores, self._cost)

    def _cost(self, share: float, kept: np.ndarray) -> float:
        assert self.choice is not None  # noqa: S101
        unit = self.choice.target.unit
        if unit == "macs":
            return float(macs_of(self.graph, Kept(kept, self.found.values)))
        if unit in ("parameters", "bytes"):
            return self._stored(kept, sizes=unit == "bytes")
        small = rewritten(self.graph, self.found, kept).graph
        self.costs.append((share, milliseconds(small, self.inputs, self.options)))
        return self.costs[-1][1]

    def _stored(self, kept: np.ndarray, *, sizes: bool) -> float:
        """Return the parameters that stay, or their bytes."""
        stays = Kept(kept, self.found.values)
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
        worst, samples = 0.0, self.samples
        for inputs in samples:
            worst = max(worst, difference(self.graph, done.graph, self.found, kept, inputs))
        if is_blind(self.graph, samples):
            other = randomized(self.graph)
            small = rewritten(other, self.found, kept).graph
            worst = max(worst, difference(other, small, self.found, kept, self.flat))
        return done, worst

    def compensated_(self, done: Rewritten, kept: np.ndarray) -> dict[str, Refit]:
        """Re-fit the smaller graph on the data, in place."""
        choice = self.choice
        assert choice is not None and choice.data is not None  # noqa: S101
        pairs = Pairs(
            self.module,
            self.graph,
            self.found,
            done,
            kept,
            whole=choice.whole,
            example=(self.inputs, self.options),
            dynamic=self.dynamic,
        )
        return compensate_(lanes_of(pairs, choice.data), choice.loss)

    @cached_property
    def samples(self) -> list[tuple[Any, ...]]:
        """The example inputs, and random ones."""
        return samples_of(self.graph, self.flat)

    def held_(self, module: nn.Module, done: Rewritten, kept: np.ndarray) -> bool:
        """Let the units stay that numbers in the code count, and return whether others than these may go.

        False where the module runs with the smaller tensors. Raises `Unsupported` where no number is found.
        """
        if in_module_form(module, done, self.inputs, self.options) is not None:
            return False
        reasons = counted(self.module, self.graph, self.found, done, kept)
        if not reasons:
            raise _not_in_its_code(module)
        classes = self.found.classes
        every = replace(classes, reasons={**classes.reasons, **reasons})
        self.found = replace(self.found, classes=every)
        for cached in ("groups", "frozen"):
            self.__dict__.pop(cached, None)
        return True

    def result(
        self,
        module: nn.Module,
        done: Rewritten,
        kept: np.ndarray,
        worst: float,
        left_alone: dict[str, str],
    ) -> tuple[nn.Module, ShrinkReport]:
        """Return the smaller network, as a module of its class if possible, and the report."""
        small = in_module_form(module, done, self.inputs, self.options)
        timed = done.graph if small is None else small
        ms_before, ms_after = in_turn(self.module, timed, self.inputs, self.options)
        form = small or graph_form(self._open(done, kept).graph, training=module.training)
        nothing = np.ones(len(kept), bool)
        before, after = (macs_of(self.graph, Kept(k, self.found.values)) for k in (nothing, kept))
        cuts = Cuts(
            axes=cuts_of(module, done),
            attributes={} if small is None else sizes_in_attributes(module, small),
            form="graph" if small is None else "module",
        )
        earlier = recall(module)
        remember_(form, cuts if earlier is None else earlier.then(cuts))
        together = {g.name: list(g.sites) for g in self.groups if g.sites}
        members = {g.name: [f"{b.owner}, axis {b.axis}" for b, _ in g.members] for g in self.groups}
        literals = [
            f"{change.site}: {change.before} -> {change.after}"
            for change in done.changed
            if not isinstance(change.before, list)
        ]
        return form, ShrinkReport(
            widths_before=self.widths(),
            widths_after=self.widths(kept),
            parameters_before=parameters_of(self.module),
            parameters_after=parameters_of(form),
            left_alone=left_alone,
            max_difference=worst,
            macs_before=before,
            macs_after=after,
            ms_before=ms_before,
            ms_after=ms_after,
            frozen={**self.frozen, **self.found.unknown},
            together=together,
            members=members,
            statistics=self.statistics(kept),
            literals=[] if small is not None else literals,
            form="module" if small is not None else "graph",
            latencies=self.costs,
            kept=cuts.indices(),
        )

    def statistics(self, kept: np.ndarray) -> list[str]:
        """Return the places where a statistic, or a sum of what is not zero, is taken over fewer entries."""
        changed = self.found.changed_statistics(kept)
        if self.choice is not None:
            changed |= changed_sums(self.graph, self.found, kept, self.flat)
        return list(changed.values())

    def _open(self, done: Rewritten, kept: np.ndarray) -> Rewritten:
        """Return the smaller graph for other batch sizes than that of the example, if the caller chose no shapes."""
        if self.dynamic_shapes is not None:
            return done
        given, named = self.inputs, self.options
        whole, exact = self.choice is not None and self.choice.whole, self.choice is None
        return for_any_batch(
            self.module, given, named, done, self.found, kept, whole=whole, exact=exact
        )

    @cached_property
    def frozen(self) -> dict[str, str]:
        """Layer -> why none of its units can go."""
        classes = self.found.classes
        found = {}
        for name, labels in self._layers().items():
            reasons = [classes.reasons.get(root, "") for root in classes.roots[labels].tolist()]
            if all(reasons):
                found[name] = reasons[0] if reasons else SINGLE
        return found

    def widths(self, kept: np.ndarray | None = None) -> dict[str, int]:
        """Return layer -> number of units, of those layers whose axis of units is known."""
        widths = {}
        for name, labels in self._layers().items():
            widths[name] = max(len(labels), 1) if kept is None else max(int(kept[labels].sum()), 1)
        return widths

    def _layers(self) -> dict[str, np.ndarray]:
        """Return layer -> labels of its units, of an embedding of its columns; none for a single unit."""
        axes = layouts(self.module)
        labels = {(block.owner, block.axis): block.labels for block in self.found.classes.blocks}
        # The graph reads a tied weight under the first of its names.
        first = other_names(self.module)
        found = {}
        for path, layer in self.module.named_modules():
            for leaf, _ in layer.named_parameters(recurse=False):
                name = f"{path}.{leaf}" if path else leaf
                if name not in axes or isinstance(layer, NORMS):
                    continue
                key = (first.get(name, name), self.made[name])
                found[name.removesuffix(".weight")] = labels.get(key, np.zeros(0, int))
            if isinstance(layer, PRUNED) and "weight" not in dict(
                layer.named_parameters(recurse=False)
            ):
                axis = int(isinstance(layer, TRANSPOSED))
                stored = [f"{path}.{leaf}".lstrip(".") for leaf in COMPUTED]
                own = [labels[name, axis] for name in stored if (name, axis) in labels]
                found[path] = own[0] if own else np.zeros(0, int)
        return found


def _stored(module: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def shrink(
    module: nn.Module,
    example_inputs: Any,
    *,
    width: float | None = None,
    heads: float | None = None,
    layers: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,
    ms: float | None = None,
    score: str | Score = "magnitude",
    allocation: str = "uniform",
    data: Iterable[Any] | None = None,
    loss: Any = None,
    multiple_of: int = 1,
    least: int = 1,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    compensate: bool = True,
    form: str = "any",
    dynamic_shapes: Any = None,
    follow: Any = (),
) -> tuple[nn.Module, ShrinkReport]:
    """Return a smaller copy of a module, with neurons, channels, heads or hidden units really removed, and a report.

    The module is exported (`torch.export`) and run on labels, one per index of each axis of each weight: what
    meets in an operation goes together or not at all. Inputs and outputs of the network stay, and what reaches
    an operator without a rule; ``report.frozen`` has the reasons.

    Without a target, only dead units go: those whose outgoing weights are all zero, or whose incoming weights
    are, or whose batch norm scale is: then its constant output is added to the next bias. The outputs do not
    change. With one target, the units of the lowest score go: `width`, the share of units that stays in each
    group, in (0, 1]; `heads`, the same for whole heads and groups of convolutions instead of their inner units;
    `layers`, the share of residual branches that stays (those go whole without which the `loss` on the `data`, or
    without one the distance of the outputs, is lowest; a constant, the mean of what it added, takes the place of
    each); or a budget for the whole network, a share in (0, 1] or a whole number: `parameters`, `macs`, `bytes`; or
    `ms`, measured on this machine on the example inputs.

    `example_inputs`: a tensor, the tuple of arguments, a mapping of keywords, or a pair of both. `score`: a
    registered score (``karikomi list scores``) or one of `karikomi.prune`; of all weights that a unit is found
    in, together. `data`, `loss`: as in `prune_`. `compensate`: with `data` and a target, re-fit what is left to
    the outputs of the original (below). `allocation`: "uniform", the same share of each group, "global", by the
    scores relative to the mean of their group, or "isomorphic", by the scores among groups of the same shapes.
    `multiple_of`: round the units that stay of each group. `least`: so many stay of each group. `only`, `exclude`:
    globs over parameter names. `dynamic_shapes`: as in `torch.export.export`.

    `follow`: what goes on with the smaller network in the middle of a training: one or several of optimizers,
    averages of weights (`torch.optim.swa_utils.AveragedModel`), `Masks`, and handles of `attach`, which bring
    their optimizers along. They are changed in place: parameter groups and schedulers stay valid, and moments,
    averages and masks are cut along, so that the loss goes on as if the removed units had been masked.
    Sparsities of a schedule are those of the smaller network from then on.

    The copy is a module of the same class if its code runs with the smaller tensors, else the exported graph as
    a module, which needs none of that code (``report.form``; ``report.literals`` has the numbers in the code
    that are in the way). With ``form="module"`` the units that such numbers count stay, and others go: the copy is of
    the same class. Training mode, dtype, device and ``requires_grad`` are kept. ``torch.compile`` and
    data-parallel wrappers are taken off.

    Every shrink is proven: removing units must equal making them zero, to 1e-5 of the largest output on the example
    and on random inputs. Where a norm, a softmax or a mean is taken over entries of which some went, its
    statistics change (as they do in any tool); both sides of the proof then use its affine part, and
    ``report.statistics`` has the places.

    With `compensate`, each linear layer, convolution and recurrent layer whose inputs have changed is re-fitted by
    least squares in the order of the forward pass, ``min |Y - W X - c|^2 + 0.01 mean(diag(X X^T)) |W - W_0|^2``: Y are
    its outputs in the original, X its inputs in the smaller network, c goes to the bias or to the mean of the
    batch norm that follows; other batch norms are re-estimated. A fifth of the batches is held out: a layer
    whose error there is no lower stays as it was, and so do all of them if the `loss` (without one, the
    distance of the outputs) of the whole network is no lower; ``report.compensation`` has the errors. Those
    first batches are used whose activations fit in 4 GiB.

    Raises `Unsupported` with the source line if the module cannot be exported, if nothing can go, or if the
    proof fails; `InvalidArgument` for inputs that do not run, for two targets, and for a budget that is too
    small.

    >>> import torch, karikomi as kk
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> small, report = kk.torch.shrink(net, torch.zeros(1, 4), width=0.5)
    >>> small[0], report.removed, report.parameters_after
    (Linear(in_features=4, out_features=4, bias=True), 4, 30)
    >>> _ = net[0].weight.data[2:].zero_()
    >>> kk.torch.shrink(net, torch.zeros(1, 4))[1].widths_after
    {'0': 2, '2': 2}

    Source: groups as in Fang et al. 2023 (DepGraph), found by labels that are propagated through the
    exported graph instead of tables of layers; constants as in Bragagnolo and Barbano 2022 (Simplify); re-fits
    as in He, Zhang and Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", with a bias and
    damped to the original weights.
    """
    module = unwrapped(module)
    inputs, options = _arguments(example_inputs)
    _check_module(module, inputs, options)
    targets = {
        "width": width,
        "heads": heads,
        "layers": layers,
        "parameters": parameters,
        "macs": macs,
        "bytes": bytes,
        "ms": ms,
    }
    check_known(form, ("any", "module"), "unknown form", where=WHERE)
    if isinstance(data, Iterator):
        data = list(data)
    strict = form == "module"
    if all(value is None for value in targets.values()):
        small, report = _without_dead_units(module, inputs, options, dynamic_shapes, strict)
    else:
        choice = choice_of(
            targets,
            where=WHERE,
            score=score,
            allocation=allocation,
            multiple_of=multiple_of,
            least=least,
            data=data,
            loss=loss,
            only=every_name(module, only, where=WHERE),
            exclude=every_name(module, exclude, where=WHERE),
        )
        if choice.target.unit == "layers":
            small, report = without_layers(module, inputs, options, choice, dynamic_shapes)
        else:
            refit = compensate and data is not None
            small, report = _smaller(
                module, inputs, options, choice, refit, dynamic_shapes, strict=strict
            )
    if strict and report.form != "module":
        # It ran as it was chosen, and differs from the graph after its layers were re-fitted.
        raise _not_in_its_code(module)
    follow_(follow, Move(module, small, report.kept))
    return small, report


def _not_in_its_code(module: nn.Module) -> Unsupported:
    return Unsupported(
        "the code of the module does not run with smaller tensors",
        where=WHERE,
        got=type(module).__name__,
        hint='form="any" returns the exported graph, which needs none of that code',
    )


def _arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, tuple) and len(given) == 2:
        positional, named = given
        if isinstance(positional, tuple) and isinstance(named, dict):
            return positional, named
    return (given if isinstance(given, tuple) else (given,)), {}


def _check_module(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    if holds_codes(module) or any(".quantized" in type(m).__module__ for m in module.modules()):
        raise Unsupported(
            "the weights are quantized, and a shrunk layer has other codes",
            where=WHERE,
            hint="shrink before quantize_",
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise Unsupported(
            "a scripted module cannot be exported",
            where=WHERE,
            hint="shrink the module that was scripted, and script the smaller one",
        )
    for path, part in module.named_modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise Unsupported(
                "the parameters of a module are one flat tensor, which is sharded over ranks",
                where=f"{WHERE}: {path}".rstrip(": "),
                got=type(part).__name__,
                hint="load the full state dict into an unwrapped module, shrink that, and shard the smaller one",
            )
    tensors = tensors_of(module)
    check_values(tensors, where=WHERE)
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            raise Unsupported(
                "the tensor is sharded over ranks",
                where=f"{WHERE}: {name}",
                hint="load the full state dict into an unwrapped module, shrink that, and shard the smaller one",
            )
    try:
        with torch.no_grad():
            copied(module).eval()(*inputs, **options)
    except KarikomiError:
        raise
    except Exception as error:
        raise InvalidArgument(
            "the module does not run on the example inputs", where=WHERE, got=error
        ) from error


@torch.no_grad()
def _smaller(
    module: nn.Module,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    choice: Choice,
    refit: bool,
    dynamic_shapes: Any,
    *,
    strict: bool,
) -> tuple[nn.Module, ShrinkReport]:
    run = Shrinking(copied(module).eval(), inputs, options, choice, dynamic_shapes)
    while True:
        with torch.enable_grad():
            kept = run.chosen()
        done, worst = run.proven(kept)
        if not strict or not run.held_(module, done, kept):
            break
    refits = run.compensated_(done, kept) if refit else {}
    small, report = run.result(module, done, kept, worst, run.frozen)
    return small, replace(report, compensation=refits)


@torch.no_grad()
def _without_dead_units(
    module: nn.Module,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    dynamic_shapes: Any,
    strict: bool,
) -> tuple[nn.Module, ShrinkReport]:
    original = copied(module).eval()
    run = Shrinking(original, inputs, options, None, dynamic_shapes)
    while True:
        search = DeadUnits(copied(run.graph), run.found, run.samples)
        kept = search.kept()
        done = rewritten(search.graph, run.found, kept)
        if not strict or not run.held_(module, done, kept):
            break
    small, report = run.result(module, done, kept, 0.0, {**run.frozen, **search.left_alone})
    worst = 0.0
    evaluated = copied(small).eval()
    for sample in run.samples:
        given, named = unflattened(list(sample), run.tree)
        worst = max(worst, equal(original, evaluated, given, named))
    return small, replace(report, max_difference=worst)
