"""`shrink`: a smaller copy of a Keras model, with units really removed, proven and reported."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

import karikomi.keras.labelling  # noqa: F401  (registers the rules)
from karikomi.errors import InvalidArgument, Unsupported, check_known
from karikomi.keras.facts.layer_calls import batches
from karikomi.keras.internals import all_layers, graph_of
from karikomi.keras.labelling.label_run import LabelRun, computes_weights
from karikomi.keras.layers.codes import holds_codes
from karikomi.keras.layers.prunable import NORMS, is_weight, oriented
from karikomi.keras.shrinking.costs import macs_of
from karikomi.keras.shrinking.kept import WHERE, KeptWeights
from karikomi.keras.shrinking.proof import Proof
from karikomi.keras.shrinking.rewriting import rewritten
from karikomi.keras.shrinking.sample_inputs import samples_of
from karikomi.keras.shrinking.unit_scores import made_axes, unit_scores
from karikomi.prune import as_score
from karikomi.prune.scores.score import Score
from karikomi.select import select
from karikomi.shrink.account import ShrinkReport
from karikomi.shrink.labels import Block
from karikomi.shrink.unit_groups import ALLOCATIONS, Group, groups_of, kept_of, to_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How units are chosen: the target, the score, and the limits."""

    unit: str
    value: float
    score: Score
    allocation: str
    multiple: int
    least: int
    data: Iterable[Any] | None
    loss: Any
    only: Any
    exclude: Any


class Shrinking:
    """One shrink of a model: its labels, what is chosen, and the report."""

    def __init__(self, model: Any, choice: Choice) -> None:
        self.model, self.choice = model, choice
        self.variables = oriented(model, where=WHERE)
        self.axes = made_axes(model, self.variables)
        names = {id(item.variable): name for name, item in self.variables.items()}
        self.found = LabelRun(model, names, whole=choice.unit == "heads").run()
        self.every = np.ones(len(self.found.classes.roots), bool)

    def chosen(self) -> np.ndarray:
        """Return a boolean per label: whether it stays."""
        choice, groups = self.choice, self._groups()
        scores = unit_scores(
            self.model, groups, self.variables, choice.score, data=choice.data, loss=choice.loss
        )
        allocate = ALLOCATIONS[choice.allocation]

        def kept(share: float) -> np.ndarray:
            gone = allocate(groups, scores, share, choice.multiple, choice.least)
            return kept_of(self.found.classes, gone)

        if choice.unit in ("width", "heads"):
            return kept(choice.value)

        def cost(share: float) -> float:
            return self._cost(kept(share))

        share = choice.value <= 1 and not isinstance(choice.value, int)
        budget = choice.value * self._cost(self.every) if share else choice.value
        return kept(to_budget(cost, budget, unit=choice.unit, where=WHERE))

    def _cost(self, kept: np.ndarray) -> float:
        if self.choice.unit == "macs":
            return float(macs_of(KeptWeights(self.found, kept)))
        return float(self.stored(kept, sizes=self.choice.unit == "bytes"))

    def stored(self, kept: np.ndarray, *, sizes: bool = False) -> int:
        """Return the parameters that stay, running statistics apart, or their bytes."""
        stays = KeptWeights(self.found, kept)
        return sum(
            math.prod(stays.of(item.variable)) * (_itemsize(item.variable) if sizes else 1)
            for item in self.variables.values()
            if is_weight(item)
        )

    def _groups(self) -> list[Group]:
        found = groups_of(self.found.classes, rows=self._is_made)
        picked = set(
            select(
                list(self.variables),
                only=self.choice.only,
                exclude=self.choice.exclude,
                where=WHERE,
            )
        )
        free = [
            group
            for group in found
            if len(group) > 1
            and all(block.owner in picked for block, _ in group.members if self._is_made(block))
        ]
        if not free:
            why = [f"{name}: {reason}" for name, reason in self.frozen().items()]
            raise Unsupported(
                "no unit can go",
                where=WHERE,
                got="; ".join(why[:3]) or "no layer",
                allowed="units that are no outputs, of layers that only= and exclude= leave",
            )
        return free

    def _is_made(self, block: Block) -> bool:
        """Return whether an axis holds the units that its layer makes."""
        return block.axis in self.axes.get(block.owner, ())

    def report(self, kept: np.ndarray, small: Any, worst: float) -> ShrinkReport:
        """Return the account of what was removed."""
        classes = self.found.classes
        groups = groups_of(classes, rows=self._is_made)
        return ShrinkReport(
            widths_before=self.widths(self.every),
            widths_after=self.widths(kept),
            parameters_before=self.stored(self.every),
            parameters_after=sum(
                math.prod(item.variable.shape)
                for item in oriented(small, where=WHERE).values()
                if is_weight(item)
            ),
            left_alone=self.frozen(),
            max_difference=worst,
            macs_before=macs_of(KeptWeights(self.found, self.every)),
            macs_after=macs_of(KeptWeights(self.found, kept)),
            frozen={**self.frozen(), **self.found.unknown},
            together={group.name: list(group.sites) for group in groups if group.sites},
            statistics=list(self.found.statistics.values()),
        )

    def widths(self, kept: np.ndarray) -> dict[str, int]:
        """Return layer -> number of units that stay."""
        stays = KeptWeights(self.found, kept)
        return {
            self._layer(name): math.prod(
                stays.of(self.variables[name].variable)[axis] for axis in axes
            )
            for name, axes in self._layers().items()
        }

    def frozen(self) -> dict[str, str]:
        """Return layer -> why none of its units can go."""
        classes, found = self.found.classes, {}
        blocks = {(block.owner, block.axis): block for block in classes.blocks}
        for name, axes in self._layers().items():
            reasons = [
                [classes.reasons.get(root, "") for root in classes.roots[block.labels].tolist()]
                for axis in axes
                if (block := blocks.get((name, axis))) is not None
            ]
            if all(all(own) for own in reasons):
                met = id(self.variables[name].variable) in self.found.variables
                alone = "it has one unit" if met else "no rule of shrink reaches it"
                found[self._layer(name)] = reasons[-1][0] if reasons else alone
        return found

    def _layers(self) -> dict[str, tuple[int, ...]]:
        return {
            name: axes
            for name, axes in self.axes.items()
            if not isinstance(self.variables[name].layer, NORMS)
        }

    def _layer(self, name: str) -> str:
        return name.rpartition("/")[0] or name


def _itemsize(variable: Any) -> int:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return int(dtype.removeprefix("b").removeprefix("float")) // 8


def shrink(
    model: Any,
    *,
    width: float | None = None,
    heads: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,
    score: str | Score = "magnitude",
    allocation: str = "uniform",
    data: Iterable[Any] | None = None,
    loss: Any = None,
    inputs: Any = None,
    multiple_of: int = 1,
    least: int = 1,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> tuple[Any, ShrinkReport]:
    """Return a smaller copy of a model, whose neurons, channels, heads or hidden units are removed, and a report.

    For functional and sequential models on any backend, also nested and with shared layers. The graph of layers is run
    on labels, one per index of each axis of each weight: what meets in a layer goes together or not at all.
    Inputs and outputs of the model stay, and what reaches a layer without a rule (a ``Lambda``, a layer of your
    own); ``report.frozen`` has the reasons.

    One target: the units of the lowest score go. `width`, the share of units that stays in each group, in
    (0, 1]; `heads`, the same for whole heads of attention and groups of convolutions instead of their inner units; or a
    budget for the whole model, a share in (0, 1] or a whole number: `parameters` (running statistics
    apart), `macs` (of one example), `bytes`.

    `score`: a registered score (``karikomi list scores``) or one of `karikomi.prune`; of all weights that a unit
    is found in, together. `data`, `loss`: as in `prune_`. `allocation`: "uniform", the same share of each group,
    or "global", by the scores relative to the mean of their group. `multiple_of`: round the units that stay of
    each group. `least`: so many stay of each group. `only`, `exclude`: globs over paths of kernels. `inputs`: a batch
    of inputs for the proof; needed for inputs that are strings.

    The copy has the same layers with smaller configurations, so that ``small.save("small.keras")`` can be loaded
    without karikomi; what is trainable stays so. If the model was compiled, so is the copy, with a new optimizer.

    Every shrink is proven: removing units must equal making them zero, to 1e-5 of the largest output on random
    inputs. Where a normalisation, a softmax or a mean is taken over entries of which some went, its statistics change;
    both sides of the proof then use its affine part, and ``report.statistics`` has the places.

    Raises `Unsupported` for a subclassed model, if nothing can go, for a layer that cannot be made from its
    configuration, and if the proof fails; `InvalidArgument` for no target or two, for a model that is not
    built, and for a budget that is too small.

    >>> import keras, karikomi as kk
    >>> net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu", name="hidden"), keras.layers.Dense(2)])
    >>> small, report = kk.keras.shrink(net, width=0.5)
    >>> small.get_layer("hidden").units, report.removed, report.parameters_after
    (4, 4, 30)

    Source: groups as in Fang et al. 2023 (DepGraph), found by labels that are propagated through the
    graph of layers instead of tables of patterns.
    """
    targets = {
        "width": width,
        "heads": heads,
        "parameters": parameters,
        "macs": macs,
        "bytes": bytes,
    }
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise InvalidArgument(
            "one target is needed",
            where=WHERE,
            got=", ".join(given) or None,
            allowed=", ".join(targets),
        )
    ((unit, value),) = given.items()
    _check_target(unit, value)
    check_known(allocation, ALLOCATIONS, "unknown allocation", where=WHERE)
    _check_model(model)
    choice = Choice(
        unit=unit,
        value=value,
        score=as_score(score),
        allocation=allocation,
        multiple=multiple_of,
        least=least,
        data=data,
        loss=loss,
        only=only,
        exclude=exclude,
    )
    run = Shrinking(model, choice)
    kept = run.chosen()
    small = rewritten(model, run.found, kept)
    if inputs is None and data is not None:
        inputs = next(batches(data, where=WHERE))[0]
    worst = Proof(model, small).difference(samples_of(model, inputs))
    small.fill_(model)
    return small.model, run.report(kept, small.model, worst)


def _check_target(unit: str, value: Any) -> None:
    share = unit in ("width", "heads")
    number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if not number or (share and value > 1):
        raise InvalidArgument(
            "the target is a share" if share else "the target is positive",
            where=f"{WHERE}: {unit}",
            got=value,
            allowed="in (0, 1]" if share else "a share in (0, 1], or a whole number",
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Layer):
        raise InvalidArgument("not a Keras model", where=WHERE, got=type(model).__name__)
    if isinstance(model, keras.Sequential) and not model.built:
        raise InvalidArgument(
            "the model has no variables yet", where=WHERE, hint="model.build(input_shape) first"
        )
    if graph_of(model) is None:
        raise Unsupported(
            "the layers of a subclassed model cannot be followed",
            where=WHERE,
            got=type(model).__name__,
            allowed="functional and sequential models",
            hint="make a functional model of its layers, keras.Model(inputs, outputs), "
            "or shrink functional parts of it",
        )
    if holds_codes(model):
        raise Unsupported(
            "the weights are quantized, and a shrunk layer has other codes",
            where=WHERE,
            hint="shrink before quantize_",
        )
    quantized = [layer.name for layer in all_layers(model) if computes_weights(layer)]
    if quantized:
        raise Unsupported(
            "the weights are quantized or have LoRA, and a shrunk layer has other ones",
            where=f"{WHERE}: {quantized[0]}",
            hint="shrink before quantizing; merge LoRA by saving and loading the model",
        )
