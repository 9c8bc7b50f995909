"""`shrink`: a smaller copy of a Keras model, with units really removed, proven and reported."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import keras
import numpy as np

import karikomi.keras.labelling  # noqa: F401  (registers the rules)
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.keras.compensation.in_place import compensate_
from karikomi.keras.facts.layer_calls import batches
from karikomi.keras.internals import all_layers, graph_of
from karikomi.keras.labelling.kept import WHERE, KeptWeights
from karikomi.keras.labelling.label_run import LabelRun, computes_weights
from karikomi.keras.layers.codes import holds_codes
from karikomi.keras.layers.prunable import NORMS, is_weight, oriented
from karikomi.keras.shrinking.costs import in_turn, macs_of, milliseconds
from karikomi.keras.shrinking.dead_units import DeadUnits
from karikomi.keras.shrinking.proof import Proof, equal
from karikomi.keras.shrinking.rewriting import rewritten
from karikomi.keras.shrinking.sample_inputs import samples_of
from karikomi.keras.shrinking.unit_scores import made_axes, unit_scores
from karikomi.prune.scores.score import Score
from karikomi.shrink.account import SINGLE, ShrinkReport
from karikomi.shrink.choice import Choice, choice_of
from karikomi.shrink.labels import Block
from karikomi.shrink.unit_groups import Group, groups_of


class Shrinking:
    """One shrink of a model: its labels, what is chosen, and the report."""

    def __init__(self, model: Any, choice: Choice | None, inputs: Any) -> None:
        self.model, self.choice, self.inputs = model, choice, inputs
        self.costs: list[tuple[float, float]] = []
        self.variables = oriented(model, where=WHERE)
        self.axes = made_axes(model, self.variables)
        names = {id(item.variable): name for name, item in self.variables.items()}
        whole, exact = choice is not None and choice.whole, choice is None
        self.found = LabelRun(model, names, whole=whole, exact=exact).run()
        self.every = np.ones(len(self.found.classes.roots), bool)

    def chosen(self) -> np.ndarray:
        """Return a boolean per label: whether it stays."""
        choice = self.choice
        assert choice is not None  # noqa: S101
        groups = choice.free(self.groups, self.variables, self.makes, self.frozen)
        scores = unit_scores(
            self.model, groups, self.variables, choice.score, data=choice.data, loss=choice.loss
        )
        return choice.kept(self.found.classes, groups, scores, self._cost)

    def _cost(self, share: float, kept: np.ndarray) -> float:
        assert self.choice is not None  # noqa: S101
        unit = self.choice.target.unit
        if unit == "macs":
            return float(macs_of(KeptWeights(kept, self.found)))
        if unit == "ms":
            small = rewritten(self.model, self.found, kept).model
            self.costs.append((share, milliseconds(small, self.inputs)))
            return self.costs[-1][1]
        return float(self.stored(kept, sizes=unit == "bytes"))

    def stored(self, kept: np.ndarray, *, sizes: bool = False) -> int:
        """Return the parameters that stay, running statistics apart, or their bytes."""
        stays = KeptWeights(kept, self.found)
        return sum(
            math.prod(stays.of(item.variable)) * (_itemsize(item.variable) if sizes else 1)
            for item in self.variables.values()
            if is_weight(item)
        )

    @cached_property
    def groups(self) -> list[Group]:
        """All groups of units that can go."""
        return groups_of(self.found.classes, rows=self.makes)

    def makes(self, block: Block) -> bool:
        """Return whether an axis holds the units that its layer makes."""
        return block.axis in self.axes.get(block.owner, ())

    def report(
        self, kept: np.ndarray, small: Any, worst: float, left_alone: dict[str, str]
    ) -> ShrinkReport:
        """Return the account of what was removed."""
        ms_before, ms_after = in_turn(self.model, small, self.inputs)
        return ShrinkReport(
            widths_before=self.widths(self.every),
            widths_after=self.widths(kept),
            parameters_before=self.stored(self.every),
            parameters_after=sum(
                math.prod(item.variable.shape)
                for item in oriented(small, where=WHERE).values()
                if is_weight(item)
            ),
            left_alone=left_alone,
            max_difference=worst,
            macs_before=macs_of(KeptWeights(self.every, self.found)),
            macs_after=macs_of(KeptWeights(kept, self.found)),
            ms_before=ms_before,
            ms_after=ms_after,
            latencies=self.costs,
            frozen={**self.frozen, **self.found.unknown},
            together={group.name: list(group.sites) for group in self.groups if group.sites},
            statistics=list(self.found.statistics.values()),
        )

    def widths(self, kept: np.ndarray) -> dict[str, int]:
        """Return layer -> number of units that stay."""
        stays = KeptWeights(kept, self.found)
        return {
            self._layer(name): math.prod(
                stays.of(self.variables[name].variable)[axis] for axis in axes
            )
            for name, axes in self._layers().items()
        }

    @cached_property
    def frozen(self) -> dict[str, str]:
        """Layer -> why none of its units can go."""
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
                alone = SINGLE if met else "no rule of shrink reaches it"
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
    ms: float | None = None,
    score: str | Score = "magnitude",
    allocation: str = "uniform",
    data: Iterable[Any] | None = None,
    loss: Any = None,
    inputs: Any = None,
    multiple_of: int = 1,
    least: int = 1,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    compensate: bool = True,
) -> tuple[Any, ShrinkReport]:
    """Return a smaller copy of a model, whose neurons, channels, heads or hidden units are removed, and a report.

    For functional and sequential models on any backend, also nested and with shared layers. The graph of layers is run
    on labels, one per index of each axis of each weight: what meets in a layer goes together or not at all.
    Inputs and outputs of the model stay, and what reaches a layer without a rule (a ``Lambda``, a layer of your
    own); ``report.frozen`` has the reasons.

    Without a target, only dead units go: those whose outgoing weights are all zero, or whose incoming weights are and
    whose constant output is zero or can be added to the next bias; the outputs do not change. With one target,
    the units of the lowest score go: `width`, the share of units that stays in each group, in
    (0, 1]; `heads`, the same for whole heads of attention and groups of convolutions instead of their inner units; or a
    budget for the whole model, a share in (0, 1] or a whole number: `parameters` (running statistics
    apart), `macs` (of one example), `bytes`; or `ms`, of a forward pass of ``predict_on_batch`` on this machine, on
    `inputs`.

    `score`: a registered score (``karikomi list scores``) or one of `karikomi.prune`; of all weights that a unit
    is found in, together. `data`, `loss`: as in `prune_`. `allocation`: "uniform", the same share of each group,
    "global", by the scores relative to the mean of their group, or "isomorphic", by the scores among groups of the
    same shapes. `multiple_of`: round the units that stay of each group. `least`: so many stay of each group. `only`,
    `exclude`: globs over paths of kernels. `inputs`: a batch of inputs for the proof and for `ms`, by default that of
    the first batch of `data`, or two random examples; needed for inputs that are strings.

    The copy has the same layers with smaller configurations, so that ``small.save("small.keras")`` can be loaded
    without karikomi; what is trainable stays so. If the model was compiled, so is the copy, with a new optimizer.

    Every shrink is proven: removing units must equal making them zero, to 1e-5 of the largest output on random
    inputs. Where a normalisation, a softmax or a mean is taken over entries of which some went, its statistics change;
    both sides of the proof then use its affine part, and ``report.statistics`` has the places.

    With `data`, a target and `compensate`, each layer whose inputs have changed is re-fitted by least squares in the
    order of the forward pass, ``min |Y - W X - c|^2 + 0.01 mean(diag(X X^T)) |W - W_0|^2``: Y is what its kernel makes
    in the original, X what it multiplies in the smaller model, c goes to the bias or to the mean of the batch
    normalisation that follows; other batch normalisations are re-estimated. A fifth of the batches is held out: a
    layer whose error there is no lower stays as it was, and so do all of them if the `loss` (without one, the
    distance of the outputs) of the whole model is no lower; ``report.compensation`` has the errors. Those first
    batches are used whose activations fit in 4 GiB.

    Raises `Unsupported` for a subclassed model, if a target is given and nothing can go, for a layer that cannot be
    made from its configuration, and if the proof fails; `InvalidArgument` for two targets, for a model that is not
    built, and for a budget that is too small.

    >>> import keras, karikomi as kk
    >>> net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu", name="hidden"), keras.layers.Dense(2)])
    >>> small, report = kk.keras.shrink(net, width=0.5)
    >>> small.get_layer("hidden").units, report.removed, report.parameters_after
    (4, 4, 30)

    Source: groups as in Fang et al. 2023 (DepGraph), found by labels that are propagated through the
    graph of layers instead of tables of patterns; re-fits as in He, Zhang and Sun 2017, "Channel Pruning for
    Accelerating Very Deep Neural Networks", with a bias and damped to the original weights.
    """
    targets = {
        "width": width,
        "heads": heads,
        "parameters": parameters,
        "macs": macs,
        "bytes": bytes,
        "ms": ms,
    }
    data = list(data) if isinstance(data, Iterator) else data
    _check_model(model)
    if inputs is None and data is not None:
        inputs = next(batches(data, where=WHERE))[0]
    if all(value is None for value in targets.values()):
        return _without_dead_units(model, inputs)
    choice = choice_of(
        targets,
        where=WHERE,
        score=score,
        allocation=allocation,
        multiple_of=multiple_of,
        least=least,
        data=data,
        loss=loss,
        only=only,
        exclude=exclude,
    )
    samples = samples_of(model, inputs)
    shrinking = Shrinking(model, choice, samples[0])
    kept = shrinking.chosen()
    small = rewritten(model, shrinking.found, kept)
    worst = Proof(model, small).difference(samples)
    small.fill_(model)
    refits = {}
    if compensate and data is not None:
        stays = small.changes.kept
        refits = compensate_(model, small.model, small.layers, stays, data, loss)
    report = shrinking.report(kept, small.model, worst, shrinking.frozen)
    return small.model, replace(report, compensation=refits)


def _without_dead_units(model: Any, inputs: Any) -> tuple[Any, ShrinkReport]:
    samples = samples_of(model, inputs)
    shrinking = Shrinking(model, None, samples[0])
    search = DeadUnits(
        model, shrinking.found, shrinking.groups, shrinking.variables, shrinking.makes, samples
    )
    kept = search.kept()
    small = rewritten(model, shrinking.found, kept)
    small.fill_(model, search.numbers)
    worst = equal(model, small.model, samples)
    left_alone = {**shrinking.frozen, **search.left_alone}
    return small.model, shrinking.report(kept, small.model, worst, left_alone)


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
